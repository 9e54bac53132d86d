"""What is not as it was is told once, graded, before training goes on; and refused where that is asked for."""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer, CheckpointManager, training_run
from ckptmgr.cli.main import run as command
from ckptmgr.errors import EnvironmentDriftError, StateMismatchError
from ckptmgr.launch.requested import STRICT_VARIABLE
from ckptmgr.run.environment import recorded_versions

SOURCE = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, width=2):
        super().__init__(2, width)

    def forward(self, x):
        return super().forward(x){extra}
"""


def train(run_dir: Path, model: nn.Module | None = None, **options: Any) -> int:
    with Checkpointer(run_dir, {"model": model or nn.Linear(2, 2)}, background=False, **options) as ckpt:
        step = ckpt.resume()
        ckpt.step(step + 1)
        ckpt.save()
    return step


def fit(run_dir: Path, **options: Any) -> None:
    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    manager = CheckpointManager(run_dir, every_n_train_steps=1, **options)
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[manager],
    )
    trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(8, 2)), 2))


@pytest.fixture
def older_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Save as a process with other versions would."""
    versions = {**recorded_versions(), "torch": "3.5.0", "numpy": "1.26.4", "safetensors": "0.4.0"}
    with monkeypatch.context() as patched:
        patched.setattr(training_run, "recorded_versions", lambda: versions)
        yield patched


def drift_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("not as it was")]


def test_the_same_environment_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptmgr")
    train(tmp_path)
    assert train(tmp_path, strict_environment=True) == 1
    assert drift_told(caplog) == []


def test_drift_is_told_once_with_grades_the_likeliest_cause_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, older_torch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    older_torch.undo()
    assert train(tmp_path) == 1
    (told,) = drift_told(caplog)
    first, *others = told.splitlines()[1:]
    assert first.startswith(f"  warning: torch 3.5.0 -> {torch.__version__.partition('+')[0]}")
    assert any(line.startswith("  warning: numpy 1.26.4 -> ") for line in others)
    assert others[-1].startswith("  info: safetensors 0.4.0 -> ")


def test_a_strict_manager_refuses_and_claims_nothing(tmp_path: Path, older_torch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    older_torch.undo()
    with pytest.raises(EnvironmentDriftError, match=r"torch 3\.5\.0 -> "):
        train(tmp_path, strict_environment=True)
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["000001"]
    assert train(tmp_path) == 1


@pytest.mark.parametrize(("value", "refuses"), [("1", True), ("0", False), ("", False)])
def test_the_environment_can_ask_for_it(
    tmp_path: Path, older_torch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, value: str, refuses: bool
) -> None:
    train(tmp_path)
    older_torch.undo()
    monkeypatch.setenv(STRICT_VARIABLE, value)
    if refuses:
        with pytest.raises(EnvironmentDriftError):
            train(tmp_path)
    else:
        train(tmp_path)


@pytest.mark.parametrize("other", [False, True])
def test_lightning_tells_and_refuses_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, older_torch: pytest.MonkeyPatch, other: bool
) -> None:
    fit(tmp_path / "a")
    older_torch.undo()
    options = {"resume": f"{tmp_path / 'a'}@1"} if other else {"resume": "1"}
    target = tmp_path / ("b" if other else "a")
    with pytest.raises(EnvironmentDriftError, match="torch"):
        fit(target, strict_environment=True, **options)
    fit(target, **options)
    assert len(drift_told(caplog)) == 1


def test_a_class_whose_source_has_changed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "drifting_net.py"
    try:
        for step, extra in enumerate(("", "", " * 2")):
            file.write_text(SOURCE.format(extra=extra))
            sys.modules.pop("drifting_net", None)
            importlib.invalidate_caches()
            module = importlib.import_module("drifting_net")
            assert train(tmp_path / "run", module.Net()) == step
        (told,) = drift_told(caplog)
        assert "warning: code.drifting_net.Net " in told
        assert "the source of this class is not what it was" in told
    finally:
        sys.modules.pop("drifting_net", None)


def test_drift_stands_beside_the_failure_that_it_may_explain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, older_torch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    older_torch.undo()
    with pytest.raises(StateMismatchError):
        train(tmp_path, nn.Linear(3, 2))
    assert len(drift_told(caplog)) == 1


def test_the_command_takes_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older_torch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "driftpkg.py").write_text(
        "def loop(checkpointer, model):\n    step = checkpointer.resume()\n    checkpointer.step(step + 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "conf.yaml").write_text(
        "loop: {_target_: driftpkg.loop}\nmodel: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}\n"
    )
    assert command(["run", "conf.yaml", "run_dir=runs/a", "--allow", "driftpkg.loop"]) == 0
    older_torch.undo()
    assert command(["resume", "runs/a", "--allow", "driftpkg.loop", "--strict-environment"]) == 1
    assert "EnvironmentDriftError [drift]" in capsys.readouterr().err
    assert command(["resume", "runs/a", "--allow", "driftpkg.loop"]) == 0
