"""Rows 14 and 20: the code and the configuration that the weights belong to."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from row_samples import MODELS, doctor, forget, read_record, saved, write_package

from ckptmgr import Checkpointer, CkptmgrError, GoldenMismatchError, load_inference
from ckptmgr.cli.main import run
from ckptmgr.errors import EnvironmentDriftError

Log = pytest.LogCaptureFixture
Output = pytest.CaptureFixture[str]

# Row 14


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``shop`` under git, and a run of its model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_package(tmp_path, {"__init__.py": "", "models.py": MODELS, "layers.py": LAYERS})
    (tmp_path / "pyproject.toml").write_text('[tool.ckptmgr]\nallow = ["shop.*"]\n')
    (tmp_path / ".gitignore").write_text("run*\n*.pt\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    from shop.layers import WithOwn  # type: ignore[import-not-found]

    torch.manual_seed(0)
    saved(tmp_path / "run", {"model": WithOwn()}, golden=[torch.ones(1, 4)])
    yield tmp_path
    forget("shop")


LAYERS = """
from torch import nn
from shop.models import Net


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class WithOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Scaled(4, 4)
        self.net = Net()

    def forward(self, x):
        return self.net(self.first(x))
"""


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_row_14_import_path_source_digest_and_commit_are_recorded(project: Path, capsys: Output) -> None:
    (manifest,) = (project / "run").glob("checkpoints/*/manifest.json")
    (entry,) = (it for it in read_record(manifest)["entries"] if it["name"] == "model")
    assert set(entry["classes"]) == {"shop.layers.Scaled", "shop.layers.WithOwn", "shop.models.Net"}
    assert all(len(digest) == 32 for digest in entry["classes"].values())
    (start,) = (project / "run").glob("attempts/*/start.json")
    assert read_record(start)["git"]["commit"] == git("rev-parse", "HEAD")


def test_row_14_nothing_is_said_while_the_code_is_as_it_was(project: Path, caplog: Log, capsys: Output) -> None:
    assert doctor(capsys, "run", "--model", "shop.layers:WithOwn")[0] == 0
    assert doctor(capsys, "run")[1]["drift"] == []
    from shop.layers import WithOwn

    load_inference("run", model=WithOwn)
    assert not [message for message in caplog.messages if "not as it was" in message]


@pytest.mark.parametrize("arguments", [(), ("--model", "shop.layers:WithOwn")])
def test_row_14_a_changed_class_is_named_by_the_doctor(
    arguments: tuple[str, ...], project: Path, capsys: Output
) -> None:
    write_package(project, {"layers.py": LAYERS.replace("2 * super", "3 * super")})
    found = doctor(capsys, "run", *arguments)[1]
    (drift,) = (it for it in found["drift"] if it["name"].startswith("code."))
    assert (drift["name"], drift["grade"]) == ("code.shop.layers.Scaled", "warning")
    assert drift["why"] == "the source of this class is not what it was"
    # The tree differs from the commit too.
    assert "git.changes" in {it["name"] for it in found["drift"]}


@pytest.mark.parametrize("arguments", [(), ("--model", "shop.layers:WithOwn")])
def test_row_14_a_class_that_is_missing_is_named_by_the_doctor_with_where_it_is_now(
    arguments: tuple[str, ...], project: Path, capsys: Output
) -> None:
    write_package(
        project, {"models.py": None, "nets.py": MODELS, "layers.py": LAYERS.replace("shop.models", "shop.nets")}
    )
    status, found = doctor(capsys, "run", *arguments)
    assert status == 0
    assert "warning: code.shop.models.Net" in found["text"]
    assert (
        "shop.models is not importable here: shop/__init__.py has no models, but shop/nets.py has a Net"
        in (found["text"])
    )


def test_row_14_what_changed_or_is_missing_is_named_before_anything_is_loaded(project: Path, caplog: Log) -> None:
    write_package(
        project,
        {
            "models.py": None,
            "nets.py": MODELS,
            "layers.py": LAYERS.replace("shop.models", "shop.nets").replace("2 * super", "3 * super"),
        },
    )
    from shop.layers import WithOwn

    live = WithOwn()
    with pytest.raises(GoldenMismatchError, match=r"not as it was then(?s:.)*code\.shop\.layers\.Scaled"):
        load_inference("run", model=live)
    (told,) = (message for message in caplog.messages if message.startswith("not as it was"))
    assert "code.shop.layers.Scaled" in told
    assert "code.shop.models.Net" in told
    assert "shop/nets.py has a Net" in told
    caplog.clear()
    ckpt = Checkpointer("run", {"model": WithOwn()}, golden=[torch.ones(1, 4)], strict_environment=True)
    with pytest.raises(EnvironmentDriftError, match=r"code\.shop\.layers\.Scaled(?s:.)*code\.shop\.models\.Net"), ckpt:
        ckpt.resume()
    assert len(list((project / "run" / "attempts").iterdir())) == 1


def test_row_14_without_a_model_the_classes_that_are_needed_are_named(project: Path) -> None:
    with pytest.raises(CkptmgrError) as refusal:
        load_inference("run")
    assert "shop.layers.Scaled, shop.layers.WithOwn, shop.models.Net" in str(refusal.value)


def test_row_14_a_missing_class_of_a_configured_run_is_named_before_anything_is_loaded(
    project: Path, capsys: Output
) -> None:
    write_package(project, {"loop.py": LOOP})
    (project / "conf.yaml").write_text(CONFIG)
    assert run(["run", "conf.yaml", "run_dir=runs/a", "--allow", "shop.loop.loop"]) == 0
    assert load_inference("runs/a", golden=False).step == 1
    write_package(project, {"models.py": MODELS.replace("class Net", "class Network")})
    with pytest.raises(CkptmgrError, match=r"there is no 'Net' in the module shop\.models(?s:.)*shop\.models\.Network"):
        load_inference("runs/a", golden=False)
    assert run(["resume", "runs/a", "--allow", "shop.loop.loop"]) == 2
    assert "did you mean shop.models.Network?" in capsys.readouterr().err


# Row 20

LOOP = """
def loop(checkpointer, model, lr):
    step = checkpointer.resume()
    checkpointer.step(step + 1)
"""
CONFIG = """
loop: {_target_: shop.loop.loop, lr: 0.1}
model: {_target_: shop.models.Net, nclasses: 5}
checkpoint: {every_n_steps: 1}
"""


def test_row_20_config_commit_and_uncommitted_changes_are_kept_and_diff_shows_what_changed(
    project: Path, capsys: Output
) -> None:
    write_package(project, {"loop.py": LOOP})
    (project / "conf.yaml").write_text(CONFIG)
    git("add", "-A")
    git("commit", "-qm", "second")
    commits = [git("rev-parse", "HEAD")]
    assert run(["run", "conf.yaml", "run_dir=runs/a", "seed=1", "--allow", "shop.*", "--allow", "shop.loop.loop"]) == 0
    write_package(project, {"models.py": MODELS + "\n# another thought\n"})
    git("commit", "-qam", "third")
    commits.append(git("rev-parse", "HEAD"))
    # And something that is not committed: a digest of the diff is kept, not the diff.
    write_package(project, {"models.py": MODELS + "\n# a thought that is not committed\n"})
    assert run(["run", "conf.yaml", "run_dir=runs/b", "seed=1", "loop.lr=0.5", "--allow", "shop.*",
                "--allow", "shop.loop.loop"]) == 0  # fmt: skip
    capsys.readouterr()
    recorded = []
    for name, commit in zip("ab", commits, strict=True):
        (start,) = (project / "runs" / name).glob("attempts/*/start.json")
        recorded.append(read_record(start)["git"])
        assert recorded[-1]["commit"] == commit
        assert run(["show", f"runs/{name}", "--config"]) == 0
        assert ("lr: 0.5" if name == "b" else "lr: 0.1") in capsys.readouterr().out
    assert "diff_digest" not in recorded[0]
    assert len(recorded[1]["diff_digest"]) == 64
    assert run(["diff", "runs/a@1", "runs/b@1"]) == 0
    printed = capsys.readouterr().out
    assert "loop.lr: 0.1 -> 0.5" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["commit", *(commit[:10] for commit in commits)] in lines
    assert ["uncommitted", "changes", "-", recorded[1]["diff_digest"][:10]] in lines


def test_row_20_code_that_does_not_belong_to_the_checkpoint_is_told(project: Path, caplog: Log) -> None:
    caplog.set_level(logging.INFO, "ckptmgr")
    write_package(project, {"layers.py": LAYERS.replace("2 * super", "3 * super")})
    git("commit", "-qam", "second")
    from shop.layers import WithOwn

    with Checkpointer("run", {"model": WithOwn()}) as ckpt:
        assert ckpt.resume() == 1
    (told,) = (message for message in caplog.messages if message.startswith("not as it was"))
    assert "git.commit" in told
    assert "code.shop.layers.Scaled" in told
    assert "code.shop.models.Net" not in told
