"""``ckptmgr run`` and ``ckptmgr resume`` of configured experiments, as their user meets them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from experiment_samples import write_project

from ckptmgr import Checkpointer
from ckptmgr.cli.main import run
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import decode_record, encode_record
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.loading import load_checkpoint

Output = pytest.CaptureFixture[str]


@pytest.fixture
def package(request: pytest.FixtureRequest) -> str:
    return "pkg_" + "".join(letter if letter.isalnum() else "_" for letter in request.node.name)[:60].lower()


@pytest.fixture
def project(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's project, as the current directory."""
    root = write_project(tmp_path, package)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("CKPTMGR_RUN_DIR", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("ckptmgr")
    handlers, level = list(logger.handlers), logger.level
    yield root
    logger.handlers[:], logger.level = handlers, level


def attempts(run_dir: str) -> list[str]:
    return sorted(path.name for path in Path(run_dir, "attempts").iterdir())


def start_of(run_dir: str, attempt: int) -> StartRecord:
    key = attempt_key(attempt, "start")
    return decode_record(Path(run_dir, key).read_bytes(), StartRecord, where=key)


def story(run_dir: str, capsys: Output) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["show", "--json", run_dir]) == 0
    chapters: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["attempts"]
    return chapters


def lr_of(reference: str, entry: str = "optimizer") -> float:
    groups = load_checkpoint(reference).entries[entry].tree["groups"]
    return float(groups[0]["lr"])


# run


@pytest.mark.parametrize("config", ["fit.yaml", "loop.yaml"])
def test_an_experiment_is_trained_and_tells_its_story(project: Path, config: str, capsys: Output) -> None:
    assert run(["run", config, "run_dir=runs/a", "--quiet"]) == 0
    (chapter,) = story("runs/a", capsys)
    assert (chapter["began"], chapter["outcome"]) == ("started", "finished at step 16")
    assert chapter["start"]["experiment"]["source"] == config
    assert run(["show", "--config", "runs/a"]) == 0
    assert "lr: 0.1" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["fit.yaml", "loop.yaml"])
def test_what_a_dry_run_prints_is_a_configuration_and_nothing_is_written(
    project: Path, config: str, capsys: Output
) -> None:
    assert run(["run", config, "run_dir=runs/a", "--dry-run", "seed=5"]) == 0
    printed = capsys.readouterr().out
    assert "# would build" in printed
    assert not Path("runs").exists()
    Path("again.yaml").write_text(printed)
    assert run(["run", "again.yaml", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "seed: 5" in document["config"]
    assert {target["allowed_by"] for target in document["targets"]} <= {"built in", "pyproject.toml"}


def test_the_options_are_overrides(project: Path, capsys: Output) -> None:
    options = ["--seed", "7", "--name", "seven", "--run-dir", "runs/b", "loop.epochs=1", "--quiet"]
    assert run(["run", "loop.yaml", *options]) == 0
    assert start_of("runs/b", 1).experiment.overrides == ("loop.epochs=1", "seed=7", "name=seven", "run_dir=runs/b")
    assert run(["show", "--config", "runs/b"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_an_experiment_without_a_place_gets_a_fresh_one(project: Path, capsys: Output) -> None:
    for _ in range(2):
        assert run(["run", "loop.yaml", "loop.epochs=1", "--quiet", "--json"]) == 0
    assert len(list(Path("runs").glob("loop-*"))) == 2
    document = json.loads(capsys.readouterr().out.split("}\n{")[0].rstrip().rstrip("}") + "}}")
    assert document["step"] == 8


def test_the_same_command_again_goes_on_and_another_configuration_is_told(
    project: Path, capsys: Output, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a"]) == 0
    assert run(["run", "loop.yaml", "run_dir=runs/a"]) == 0
    assert "is finished" in caplog.text
    capsys.readouterr()
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=3", "optimizer.lr=0.01"]) == 0
    told = capsys.readouterr().err
    assert "loop.epochs: 2 -> 3" in told
    assert "optimizer.lr: 0.1 -> 0.01" in told
    assert "applied: learning rate" in caplog.text
    assert [chapter["changes"] for chapter in story("runs/a", capsys)] == [
        [],
        [],
        ["loop.epochs: 2 -> 3", "optimizer.lr: 0.1 -> 0.01"],
    ]
    assert lr_of("runs/a") == 0.01


def test_an_exception_in_the_users_code_is_shown_where_it_came_from(project: Path, capsys: Output) -> None:
    assert run(["run", "fit.yaml", "run_dir=runs/a", "model.fails_at=6"]) == 1
    told = capsys.readouterr().err
    assert 'raise ArithmeticError("the loss is negative")' in told
    assert "please report it" not in told
    (chapter,) = story("runs/a", capsys)
    assert chapter["outcome"] == "failed at step 6: ArithmeticError: the loss is negative"


def test_a_lightning_experiment_takes_its_optimizer_from_the_configuration(
    project: Path, package: str, capsys: Output
) -> None:
    changes = [
        f"model._target_={package}.Bare",
        "optimizer={_target_: torch.optim.AdamW, lr: 0.5}",
        "scheduler={_target_: torch.optim.lr_scheduler.StepLR, step_size: 4, gamma: 0.1, _interval_: step}",
    ]
    assert run(["run", "fit.yaml", "run_dir=runs/a", "trainer.max_epochs=1", *changes]) == 0
    assert lr_of("runs/a@8") == pytest.approx(0.005)


def test_the_tree_of_lightning_is_that_of_the_model(project: Path, package: str) -> None:
    source = project / package / "__init__.py"
    source.write_text(source.read_text().replace("import lightning as L", "import pytorch_lightning as L"))
    assert run(["run", "fit.yaml", "run_dir=runs/a", "trainer.max_epochs=1", "--quiet"]) == 0
    assert load_checkpoint("runs/a").manifest.step == 8


def test_a_loop_saves_what_the_slot_state_holds(project: Path) -> None:
    state = "state={scaler: {_target_: torch.amp.GradScaler, device: cpu}}"
    assert run(["run", "loop.yaml", "run_dir=runs/a", state, "--allow", "torch.amp.GradScaler"]) == 0
    assert "scaler" in load_checkpoint("runs/a").entries


# Refused, before anything is written


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["nowhere.yaml"], 2, "nowhere.yaml"),
        (["fit.yaml", "model.hiden=3"], 2, "model.hidden"),
        (["fit.yaml", "+model.depth=3"], 2, "depth"),
        (["fit.yaml", "model._target_=os.system"], 2, "not allowed"),
        (["fit.yaml", "model._target_=PACKAGE.Net"], 2, "LightningModule"),
        (["fit.yaml", "model._target_=PACKAGE.Nett"], 2, "Net"),
        (["fit.yaml", "data._target_=PACKAGE.Points", "~data.batch_size"], 2, "LightningDataModule"),
        (["fit.yaml", "optimizer={_target_: PACKAGE.Net}"], 2, "torch.optim.Optimizer"),
        (["fit.yaml", "callbacks={a: {_target_: PACKAGE.Model}}"], 2, "Callback"),
        (["fit.yaml", "callbacks={a: {_target_: ckptmgr.CheckpointManager, run_dir: x}}"], 2, "slot 'checkpoint'"),
        (["fit.yaml", "data=null"], 2, "'data'"),
        (["fit.yaml", "+trainer.devices=2"], 2, "trainer.devices"),
        (["fit.yaml", "checkpoint.every_n_train_steps=0"], 2, "checkpoint"),
        (["fit.yaml", "checkpoint.every_n_train_steps=0", "--dry-run"], 2, "checkpoint"),
        (["fit.yaml", "+checkpoint.keep_lst=3", "--dry-run"], 2, "keep_lst"),
        (["loop.yaml", "+checkpoint.every=10mn", "--dry-run"], 2, "10mn"),
        (["fit.yaml", "+checkpoint.run_dir=x"], 2, "run_dir"),
        (["fit.yaml", "+trainer.callbacks=[]"], 2, "callbacks"),
        (["fit.yaml", "trainer.max_epochs=many"], 2, "trainer"),
        (["loop.yaml", "loop._target_=PACKAGE.undeclared"], 2, "factory"),
        (["loop.yaml", "+loop.eposchs=1"], 2, "epochs"),
        (["loop.yaml", "~loop.epochs"], 2, "epochs"),
        (["loop.yaml", "state={ema: {_target_: PACKAGE.Net}}"], 2, "ema"),
        (["loop.yaml", "optimizer.lr=-1"], 2, "optimizer"),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_written(
    project: Path, package: str, capsys: Output, arguments: list[str], status: int, told: str
) -> None:
    arguments = [argument.replace("PACKAGE", package) for argument in arguments]
    assert run(["run", *arguments, "run_dir=runs/a"]) == status
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert "unexpected" not in error.splitlines()[0]
    assert not Path("runs").exists()


# resume


@pytest.mark.parametrize(("config", "epochs"), [("fit.yaml", "trainer.max_epochs"), ("loop.yaml", "loop.epochs")])
def test_a_resume_applies_records_and_names_what_is_overridden(
    project: Path, config: str, epochs: str, capsys: Output
) -> None:
    assert run(["run", config, "run_dir=runs/a"]) == 0
    lr = "model.lr" if config == "fit.yaml" else "optimizer.lr"
    assert run(["resume", "runs/a", f"{epochs}=3", f"{lr}=0.01"]) == 0
    told = capsys.readouterr().err
    assert f"{lr}: 0.1 -> 0.01" in told
    chapter = story("runs/a", capsys)[-1]
    assert (chapter["began"], chapter["outcome"]) == ("resumed at step 16", "finished at step 24")
    assert set(chapter["changes"]) == {f"{epochs}: 2 -> 3", f"{lr}: 0.1 -> 0.01"}
    assert start_of("runs/a", 2).experiment.overrides == (f"{epochs}=3", f"{lr}=0.01")
    # What was overridden stays: it is the run's configuration now.
    assert run(["resume", "runs/a", f"{epochs}=4"]) == 0
    assert story("runs/a", capsys)[-1]["changes"] == [f"{epochs}: 3 -> 4"]


@pytest.mark.parametrize("config", ["fit.yaml", "loop.yaml"])
def test_what_makes_the_checkpoint_unloadable_is_refused_before_anything_starts(
    project: Path, config: str, capsys: Output
) -> None:
    assert run(["run", config, "run_dir=runs/a", "--quiet"]) == 0
    before = attempts("runs/a")
    capsys.readouterr()
    assert run(["resume", "runs/a", "model.hidden=5"]) == 1
    assert "StateMismatchError" in capsys.readouterr().err
    assert run(["resume", "runs/a", "model.hidden=5", "--to", "runs/b"]) == 1
    assert attempts("runs/a") == before
    assert not Path("runs/b").exists()


def test_going_back_takes_the_configuration_that_the_checkpoint_was_trained_with(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "+checkpoint.keep_last=9", "--quiet"]) == 0
    assert run(["resume", "runs/a", "loop.epochs=4", "optimizer.lr=0.01", "--quiet"]) == 0
    assert run(["resume", "runs/a@16", "loop.epochs=3"]) == 0
    chapter = story("runs/a", capsys)[-1]
    assert chapter["began"] == "went back to step 16"
    assert chapter["changes"] == ["loop.epochs: 4 -> 3", "optimizer.lr: 0.01 -> 0.1"]
    assert lr_of("runs/a") == 0.1


def test_a_finished_run_says_so(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a"]) == 0
    assert run(["resume", "runs/a"]) == 0
    assert "is finished" in caplog.text


def test_a_fork_goes_on_by_itself_and_names_its_parent(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "--quiet"]) == 0
    assert run(["resume", "runs/a@12", "--to", "runs/b", "optimizer.lr=0.02"]) == 0
    first, second = story("runs/b", capsys)
    assert first["began"] == "forked"
    assert "runs/a@0000000012-" in first["start"]["fork_of"]
    assert (second["began"], second["outcome"]) == ("resumed at step 12", "finished at step 16")
    assert second["changes"] == ["optimizer.lr: 0.1 -> 0.02"]
    assert lr_of("runs/b") == 0.02
    assert len(attempts("runs/a")) == 1, "the parent was not touched"
    assert run(["show", "runs/a", "runs/b"]) == 0
    compared = capsys.readouterr().out
    assert "optimizer.lr" in compared
    assert "loop.epochs" not in compared
    assert run(["resume", "runs/b", "loop.epochs=3", "--quiet"]) == 0, "it is resumed as any other run"


def test_the_place_of_a_run_is_not_overridden(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    assert run(["resume", "runs/a", "run_dir=runs/b"]) == 2
    assert "--to" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was_moved_to(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    Path("runs/a").rename("runs/moved")
    assert run(["resume", "runs/moved", "loop.epochs=2", "--quiet"]) == 0
    assert not Path("runs/a").exists()
    assert run(["show", "--config", "runs/moved"]) == 0
    assert "run_dir: runs/moved" in capsys.readouterr().out


def test_a_fork_that_cannot_be_made_is_refused_before_anything_is_built(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    assert run(["run", "loop.yaml", "run_dir=runs/b", "loop.epochs=1", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["resume", "runs/a", "--to", "runs/b", "model._target_=nobody.allowed.This"]) == 2
    assert "cannot fork into runs/b" in capsys.readouterr().err


def test_a_dry_resume_says_what_would_change(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    before = attempts("runs/a")
    assert run(["resume", "runs/a", "optimizer.lr=0.5", "--dry-run"]) == 0
    output = capsys.readouterr()
    assert "optimizer.lr: 0.1 -> 0.5" in output.err
    assert "runs/a would go on from step 8" in output.err
    assert "lr: 0.5" in output.out
    assert attempts("runs/a") == before


def test_a_run_directory_does_not_decide_what_is_imported(
    project: Path, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    before = attempts("runs/a")
    # Whoever made the run put a project file and a package into it, and the user changes into it.
    (project / "runs/a/pyproject.toml").write_text(f'[tool.ckptmgr]\nallow = ["{package}.*"]\n')
    other = tmp_path / "other"
    (project / "runs").rename(other)
    monkeypatch.chdir(other / "a")
    assert run(["resume", "."]) == 2
    error = capsys.readouterr().err
    assert "not allowed" in error
    assert str(project) in error, "it says where the run was started"
    assert attempts(".") == before


@pytest.mark.parametrize(
    ("link", "target"),
    [("elsewhere/hparams.yaml", "mine/profile"), ("elsewhere/version_9", "mine"), ("new.csv", "mine/not_there")],
)
def test_nothing_is_written_through_a_link_that_came_with_the_run(
    project: Path, tmp_path: Path, capsys: Output, link: str, target: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "profile").write_text("mine")
    assert run(["run", "fit.yaml", "run_dir=runs/a", "--quiet"]) == 0
    before = attempts("runs/a")
    Path("runs/a", link).parent.mkdir(parents=True, exist_ok=True)
    Path("runs/a", link).unlink(missing_ok=True)
    Path("runs/a", link).symlink_to(tmp_path / target)
    assert run(["resume", "runs/a", "trainer.max_epochs=3"]) == 1
    assert f"{link} in " in capsys.readouterr().err
    assert attempts("runs/a") == before
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["profile"]
    assert (tmp_path / "mine" / "profile").read_text() == "mine"
    # What leads to another place within the run harms nobody.
    Path("runs/a", link).unlink()
    Path("runs/a", link).symlink_to("ckptmgr.json")
    Path("runs/b").symlink_to("a")
    assert run(["resume", "runs/b", "trainer.max_epochs=3", "--quiet"]) == 0


@pytest.mark.parametrize("harm", ["cut", "edited", "removed", "its record is damaged"])
def test_a_damaged_configuration_is_told_and_nothing_else_is_used(project: Path, harm: str, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    config = Path("runs/a", attempt_key(1, "start" if "record" in harm else "config"))
    text = config.read_text()
    config.chmod(0o644)
    if harm == "removed":
        config.unlink()
    else:
        config.write_text(text.replace("0.1", "0.2") if harm == "edited" else text[:40])
    assert run(["resume", "runs/a"]) == 12
    assert "ckptmgr run CONFIG" in capsys.readouterr().err
    assert run(["run", "loop.yaml", "run_dir=runs/a", "--quiet"]) in (0, 12)


def test_a_class_that_takes_other_arguments_now_is_told_with_the_key(
    project: Path, package: str, capsys: Output
) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    before = attempts("runs/a")
    module = sys.modules.pop(package)
    source = Path(str(module.__file__))
    source.write_text(
        source.read_text().replace("def __init__(self, hidden: int = 4):", "def __init__(self, width=4):")
    )
    source.write_text(source.read_text().replace("nn.Linear(1, hidden), nn.Dropout", "nn.Linear(1, width), nn.Dropout"))
    source.write_text(
        source.read_text().replace("nn.Dropout(0.1), nn.Linear(hidden", "nn.Dropout(0.1), nn.Linear(width")
    )
    assert run(["resume", "runs/a"]) == 2
    error = capsys.readouterr().err
    assert "hidden" in error
    assert "width" in error
    assert attempts("runs/a") == before
    assert run(["resume", "runs/a", "~model.hidden", "+model.width=4", "loop.epochs=2", "--quiet"]) == 0


def test_a_secret_reaches_no_file_and_is_asked_for_again(project: Path, package: str, capsys: Output) -> None:
    secret = "hunter2hunter2hunter2"
    source = project / package / "__init__.py"
    source.write_text(
        source.read_text() + "\n\nclass Vault(TensorDataset):\n    def __init__(self, api_key):\n"
        "        super().__init__(POINTS, 2 * POINTS)\n"
    )
    dataset = f"loaders.train.dataset={{_target_: {package}.Vault, api_key: {secret}}}"
    assert run(["run", "loop.yaml", "loaders.train.dataset=null", dataset, "run_dir=runs/a", "--quiet"]) == 0
    for path in Path("runs/a").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    assert run(["resume", "runs/a"]) == 2
    assert "loaders.train.dataset.api_key" in capsys.readouterr().err
    assert run(["resume", "runs/a", f"loaders.train.dataset.api_key={secret}", "--quiet"]) == 0
    for path in Path("runs/a").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_run_of_a_newer_format_is_not_guessed_at(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    key = Path("runs/a", attempt_key(1, "start"))
    newer = msgspec.structs.replace(start_of("runs/a", 1), version=99)
    key.chmod(0o644)
    key.write_bytes(encode_record(newer))
    assert run(["resume", "runs/a"]) == 1
    assert "version 99" in capsys.readouterr().err


def test_a_message_quotes_no_secret_of_the_environment(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2hunter2hunter2")
    assert run(["run", "fit.yaml", "model.hidden=${oc.env:SERVICE_PASSWORD}", "run_dir=runs/a"]) == 2
    error = capsys.readouterr().err
    assert "given '[redacted]'" in error
    assert "hunter2" not in error


def test_a_run_in_which_somebody_trains_is_not_taken_over_by_a_command(project: Path, capsys: Output) -> None:
    assert run(["run", "fit.yaml", "run_dir=runs/a", "--quiet"]) == 0
    # This very process lives, and has recorded no end.
    Path("runs/a", attempt_key(1, "end")).unlink()
    assert run(["resume", "runs/a", "trainer.max_epochs=3"]) == 11
    assert "RunInUseError" in capsys.readouterr().err
    assert attempts("runs/a") == ["000001"]
    assert run(["resume", "runs/a", "trainer.max_epochs=3", "--dry-run"]) == 0
    assert run(["resume", "runs/a", "trainer.max_epochs=3", "--to", "runs/b", "--quiet"]) == 0


def test_a_script_has_no_configuration_to_override(project: Path, capsys: Output) -> None:
    with Checkpointer("runs/s", {"values": {"a": 1}}) as checkpointer:
        checkpointer.resume()
        checkpointer.step(1)
        checkpointer.save()
    assert run(["resume", "runs/s", "lr=1"]) == 2
    assert "script" in capsys.readouterr().err


def test_a_run_is_no_configuration(project: Path, capsys: Output) -> None:
    assert run(["run", "loop.yaml", "run_dir=runs/a", "loop.epochs=1", "--quiet"]) == 0
    assert run(["run", "runs/a"]) == 2
    assert "ckptmgr resume runs/a" in capsys.readouterr().err
