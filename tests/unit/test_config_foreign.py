"""What LightningCLI and Hydra have stored is read as a configuration of ours."""

from __future__ import annotations

import io
import json
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config.compose import Composition, compose
from ckptmgr.config.overrides import apply_overrides
from ckptmgr.config.resolving import resolve
from ckptmgr.config.tree import plain
from ckptmgr.errors import ConfigError

ARGUMENTS = """--seed_everything 7 --trainer.max_epochs 5 --trainer.accelerator cpu
 --trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor val_acc
 --trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor
 --trainer.logger lightning.pytorch.loggers.CSVLogger --trainer.logger.save_dir logs
 --trainer.strategy lightning.pytorch.strategies.DDPStrategy --trainer.strategy.find_unused_parameters true
 --optimizer torch.optim.Adam --optimizer.lr 0.1
 --lr_scheduler torch.optim.lr_scheduler.StepLR --lr_scheduler.step_size 2"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configurations that the real LightningCLI prints: classes given by the program, and by the user."""
    with warnings.catch_warnings():
        # jsonargparse's and Lightning's own, and nothing of ours runs in here.
        warnings.simplefilter("ignore")
        from cli_samples import Data, Model
        from lightning.pytorch.cli import LightningCLI

        folder = tmp_path_factory.mktemp("cli")
        for kind, more in {
            "fixed": "--model.width 9",
            "open": "--model cli_samples.Model --data cli_samples.Data",
        }.items():
            args = ["fit", *ARGUMENTS.split(), *more.split(), "--print_config"]
            is_open = kind == "open"
            text = io.StringIO()
            with redirect_stdout(text), pytest.raises(SystemExit):
                LightningCLI(Model, Data, args=args, subclass_mode_model=is_open, subclass_mode_data=is_open)
            (folder / f"{kind}.yaml").write_text(text.getvalue())
    return {kind: folder / f"{kind}.yaml" for kind in ("fixed", "open")}


def tree_of(composition: Composition) -> Any:
    return plain(composition.config)


def test_the_configuration_of_a_real_lightning_cli_is_read(printed: dict[str, Path]) -> None:
    composition = compose(printed["open"])
    tree = plain(apply_overrides(composition.config, ["trainer.max_epochs=6", "model.act.inplace=true"]))
    assert list(tree) == ["seed", "trainer", "loggers", "callbacks", "model", "data", "optimizer", "scheduler"]
    assert tree["seed"] == 7
    trainer = tree["trainer"]
    assert (trainer["_target_"], trainer["max_epochs"], trainer["accelerator"]) == (
        "lightning.pytorch.Trainer",
        6,
        "cpu",
    )
    assert trainer["strategy"]["_target_"] == "lightning.pytorch.strategies.DDPStrategy"
    assert trainer["strategy"]["find_unused_parameters"] is True
    assert not {"callbacks", "logger"} & set(trainer)
    assert [each["_target_"].rpartition(".")[2] for each in tree["callbacks"]] == [
        "EarlyStopping",
        "LearningRateMonitor",
    ]
    assert tree["callbacks"][0]["monitor"] == "val_acc"
    assert tree["loggers"][0]["_target_"] == "lightning.pytorch.loggers.CSVLogger"
    assert tree["loggers"][0]["save_dir"] == "logs"
    assert tree["model"] == {
        "_target_": "cli_samples.Model",
        "width": 3,
        "act": {"_target_": "torch.nn.ReLU", "inplace": True},
    }
    assert tree["data"] == {"_target_": "cli_samples.Data", "batch_size": 4}
    assert (tree["optimizer"]["_target_"], tree["optimizer"]["lr"]) == ("torch.optim.Adam", 0.1)
    assert tree["scheduler"]["step_size"] == 2
    assert "class_path" not in json.dumps(tree)
    assert "init_args" not in json.dumps(tree)
    assert "LightningCLI's configuration was translated" in composition.notes[0]
    resolve(composition.config, where="x")


def test_a_class_that_only_the_program_names_must_be_given(printed: dict[str, Path]) -> None:
    composition = compose(printed["fixed"])
    assert any("give model._target_=your_package.YourClass" in note for note in composition.notes)
    assert any("give data._target_=your_package.YourClass" in note for note in composition.notes)
    with pytest.raises(ConfigError) as caught:
        resolve(composition.config, where="config.yaml")
    assert "no value is given for model._target_, data._target_" in caught.value.what
    assert caught.value.why == "nothing says which class to build"
    given = apply_overrides(composition.config, ["model._target_=pkg.Model", "+data._target_=pkg.Data"])
    assert plain(given)["model"]["_target_"] == "pkg.Model"
    assert plain(given)["model"]["width"] == 9
    resolve(given, where="x")


def compose_text(folder: Path, text: str) -> Composition:
    (folder / "config.yaml").write_text(text)
    return compose(folder / "config.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed_everything: true\ntrainer: {max_epochs: 1}", {"trainer": {"max_epochs": 1}}),
        ("seed_everything: 0\ntrainer: null", {"seed": 0}),
        ("seed_everything: null\nckpt_path: null\nweights_only: null\nmodel: {class_path: a.M}", {"model": {}}),
        ("seed_everything: 1\ntrainer: {logger: false}", {"seed": 1, "trainer": {}, "loggers": False}),
        ("seed_everything: 1\ntrainer: {logger: true, callbacks: null}", {"seed": 1, "trainer": {}}),
        (
            "seed_everything: 1\ntrainer: {callbacks: {class_path: EarlyStopping}, logger: [{class_path: CSVLogger}]}",
            {"seed": 1, "trainer": {}, "callbacks": [{}], "loggers": [{}]},
        ),
        ("model: {class_path: a.M, init_args: null}", {"model": {}}),
        ("model: {class_path: a.M, init_args: {a: Unable to serialize instance ReLU(), b: 1}}", {"model": {"b": 1}}),
        ("model: {class_path: a.M, init_args: {}, dict_kwargs: {x: 1}}", {"model": {"x": 1}}),
        (
            "model: {class_path: a.M, init_args: {x: {class_path: a.N, init_args: {y: []}}}}",
            {"model": {"x": {"y": []}}},
        ),
        ("fit: {trainer: {max_epochs: 1}, seed_everything: 1}", {"seed": 1, "trainer": {"max_epochs": 1}}),
        ("seed_everything: 1\nmy_early_stopping: {monitor: x}", {"seed": 1}),
        (
            "model: {class_path: a.M, init_args: {n: '${data.init_args.n}', s: '${seed_everything}'}}\n"
            "data: {class_path: a.D, init_args: {n: 1, m: '${.n}'}}\nseed_everything: 5",
            {"model": {"n": "${data.n}", "s": "${seed}"}, "data": {"n": 1, "m": "${data.n}"}, "seed": 5},
        ),
    ],
)
def test_each_part_of_lightning_cli_has_its_slot(tmp_path: Path, text: str, expected: Any) -> None:
    def without_targets(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_targets(item) for key, item in value.items() if key != "_target_"}
        return [without_targets(item) for item in value] if isinstance(value, list) else value

    tree = tree_of(compose_text(tmp_path, text))
    assert without_targets(tree) == expected
    assert "???" not in json.dumps(tree)


def test_short_names_of_classes_get_their_module(tmp_path: Path) -> None:
    text = (
        "# pytorch_lightning==2.6.6\ntrainer: {callbacks: [{class_path: EarlyStopping}]}\noptimizer: {class_path: SGD}"
    )
    tree = tree_of(compose_text(tmp_path, text))
    assert tree["trainer"]["_target_"] == "pytorch_lightning.Trainer"
    assert tree["callbacks"][0]["_target_"] == "pytorch_lightning.callbacks.EarlyStopping"
    assert tree["optimizer"]["_target_"] == "torch.optim.SGD"


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    text = "seed_everything: 1\nckpt_path: last.ckpt\nmine: {a: 1}\ntrainer: {max_time: '0:30:00'}"
    notes = " ".join(compose_text(tmp_path, text).notes)
    assert "ckpt_path was left out: nothing is restored from 'last.ckpt'." in notes
    assert "only LightningCLI's program knows them: mine." in notes
    assert "trainer.max_time is the duration '0:30:00' as text" in notes


@pytest.mark.parametrize(
    "text",
    [
        "model: {_target_: a.M, class_path: x}\ntrainer: {max_epochs: 1}",
        "trainer: {max_epochs: 1}\nmodel: {_target_: a.M, layer: {class_path: x}}",
        "model: {_target_: a.M, seed_everything: 1}",
        "",
    ],
)
def test_a_configuration_of_our_own_stays_as_it_is(tmp_path: Path, text: str) -> None:
    composition = compose_text(tmp_path, text)
    assert composition.notes == ()
    assert "class_path" not in text or "class_path" in json.dumps(tree_of(composition))


@pytest.mark.parametrize("place", ["hydra_run", "hydra_run/.hydra/config.yaml"])
def test_the_configuration_of_a_real_hydra_run_is_read(place: str) -> None:
    composition = compose(Path(__file__).parent / place)
    tree = plain(apply_overrides(composition.config, ["data.batch_size=32", "+loggers.csv.save_dir=logs"]))
    assert tree == {
        "seed": 8,
        "data": {"_target_": "digits.DigitsData", "batch_size": 32},
        "trainer": {
            "_target_": "lightning.pytorch.Trainer",
            "max_epochs": 2,
            "log_every_n_steps": "${data.batch_size}",
        },
        "model": {
            "_target_": "digits.Model",
            "width": 8,
            "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.001},
        },
        "callbacks": {
            "early": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val_acc", "patience": 3},
            "bar": None,
            "summary": {
                "_target_": "lightning.pytorch.callbacks.ModelSummary",
                "max_depth": "${..early.patience}",
            },
        },
        "loggers": {
            "csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "csv", "save_dir": "logs"},
        },
    }
    assert resolve(composition.config, where="x")["callbacks"]["summary"]["max_depth"] == 3
    notes = " ".join(composition.notes)
    for said in ("datamodule became data", "paths.output_dir, paths.work_dir, trainer.default_root_dir", "task_name"):
        assert said in notes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: '${hydra:a.b}'\nmodel: {w: '${x}', v: '${y}'}\ny: 1", {"model": {"v": "${y}"}, "y": 1}),
        ("x: '${hydra:a}'\nlogger: {_target_: a.L}", {"loggers": [{"_target_": "a.L"}]}),
        ("x: '${hydra:a}'\ncallbacks: {_target_: a.C, n: '${.m}', m: 1}",
         {"callbacks": [{"_target_": "a.C", "n": "${callbacks.0.m}", "m": 1}]}),
        ("x: '${hydra:a}'\nmodel: {_recursive_: false}", {"model": {"_recursive_": False}}),
        ("x: '${hydra:a}'\ndatamodule: {a: 1}\ndata: {b: 2}", {"data": {"b": 2}}),
        ("x: '${hydra:a}'\nmodel: {w: '${big.${size}}'}\nbig: {s: 1}\nsize: s",
         {"model": {"w": "${big.${size}}"}, "big": {"s": 1}, "size": "s"}),
        ("x: '${hydra:a}'\nmodel: {l: [1, '${hydra:b}', 3]}", {"model": {"l": [1, 3]}}),
        ("x: ['${hydra:a}']", {}),
    ],
)  # fmt: skip
def test_what_comes_from_hydra_is_left_out_with_all_that_refers_to_it(tmp_path: Path, text: str, expected: Any) -> None:
    composition = compose_text(tmp_path, text)
    tree = tree_of(composition)
    tree.pop("x", None)
    assert tree == expected
    assert composition.notes
