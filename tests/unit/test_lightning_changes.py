"""A Lightning program that was changed since its checkpoint: other options, and another batch size in mid-epoch."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_samples import Broken, Model, Numbered, Stream, make_trainer
from torch.utils.data import DataLoader

from ckptmgr import StateMismatchError, UsageError
from ckptmgr.lightning import CheckpointManager


def step_lr(optimizer: Any, trainer: Any) -> Any:
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5), "interval": "step"}


class Rates(Model):
    """Knows the learning rate of each of its steps."""

    def __init__(self, lr: float, breaks_at: tuple[str, int] | None = None, **more: Any) -> None:
        super().__init__(breaks_at, scheduler=step_lr, **more)
        self.lr = lr
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": step_lr(optimizer, None)}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


def fit(root: Path, model: Model, *, batch_size: int = 4, data: Any = None, mode: Any = "keep", **options: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    manager = CheckpointManager(root / "run", every_n_train_steps=1, on_changed_options=mode)
    trainer = make_trainer(root, manager, **options)
    loader = DataLoader(data or Numbered(22), batch_size=batch_size, shuffle=data is None, drop_last=model.drops_last)
    try:
        trainer.fit(model, loader)
    except Broken:
        assert model.breaks_at is not None
    return trainer, manager


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "drops_last", False, raising=False)


def test_a_changed_learning_rate_is_named_and_kept_and_applied_on_request(tmp_path: Path, caplog: Any) -> None:
    fit(tmp_path, Rates(0.1, ("training_step", 6)))
    kept = Rates(0.01, ("training_step", 3))
    _, manager = fit(tmp_path, kept)
    assert kept.rates == [0.05, 0.05, 0.05]
    assert manager.changes == []
    assert [message for message in caplog.messages if "learning rate" in message] == [
        "the checkpoint's options stay in force: learning rate of optimizer: built with 0.01, the checkpoint was built "
        "with 0.1; kept at 0.05. on_changed_options='apply' goes on with this program's"
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "ckptmgr"):
        applied = Rates(0.01, ("training_step", 3))
        _, manager = fit(tmp_path, applied, mode="apply")
        assert applied.rates == pytest.approx([0.005, 0.0025, 0.0025])
        assert [str(change) for change in manager.changes] == ["learning rate of optimizer: 0.1 -> 0.01"]
        assert "applied: learning rate of optimizer: 0.1 -> 0.01 (0.05 -> 0.005 at this point)" in caplog.messages
        caplog.clear()
        again = Rates(0.01)
        _, manager = fit(tmp_path, again)
        assert again.rates == pytest.approx([0.0025, 0.0025, 0.0025])
        assert not [message for message in caplog.messages if "learning rate" in message]


def test_a_mode_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="on_changed_options='always'"):
        CheckpointManager(on_changed_options="always")  # type: ignore[arg-type]


def samples(model: Model, epoch: int) -> list[int]:
    return [index for e, _, batch in model.seen if e == epoch for index in batch]


@pytest.mark.parametrize(
    ("drops_last", "sizes", "expected"),
    [
        (False, (4, 8, 6), [4, 4, 8, 6]),
        (True, (4, 6, 5), [4, 4, 6, 5]),
        (False, (4, 7, 4), [4, 4, 7, 4, 3]),
        (False, (2, 16, 2), [2, 2, 16, 2]),
    ],
)
def test_the_epoch_goes_on_with_the_samples_that_were_not_trained(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch, drops_last: bool, sizes: Any, expected: list[int]
) -> None:
    monkeypatch.setattr(Model, "drops_last", drops_last)
    whole = Model()
    fit(tmp_path / "whole", whole, batch_size=sizes[0], max_epochs=1)
    order = samples(whole, 0)
    seen: list[Any] = []
    for size, count in zip(sizes, (2, 1, None), strict=True):
        model = Model(None if count is None else ("training_step", count + 1))
        trainer, manager = fit(tmp_path, model, batch_size=size)
        seen += model.seen
    first = [batch for epoch, _, batch in seen if epoch == 0]
    assert [len(batch) for batch in first] == expected
    trained = [index for batch in first for index in batch]
    assert trained[: len(order)] == order[: len(trained)]
    assert len(set(trained)) == len(trained)
    second = [batch for epoch, _, batch in seen if epoch == 1]
    assert len(second) == (22 // sizes[-1] if drops_last else -(-22 // sizes[-1]))
    assert trainer.current_epoch == 2
    assert f"batch size {sizes[0]} -> {sizes[1]}: going on after {2 * sizes[0]} samples of epoch 0" in caplog.messages
    assert [str(change) for change in manager.changes] == [f"batch size of train loader: {sizes[1]} -> {sizes[2]}"]


def test_an_epoch_that_is_over_for_batches_of_the_new_size_ends_as_epochs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "drops_last", True)
    fit(tmp_path, Model(("training_step", 3)), batch_size=4)
    model = Model()
    fit(tmp_path, model, batch_size=16)
    assert [(epoch, index) for epoch, index, _ in model.seen] == [(1, 0)]
    assert model.calls["on_train_epoch_end"] == 2
    # Validation of both epochs.
    assert len(model.validated) == 4


def test_validation_is_due_by_the_new_count_of_batches(tmp_path: Path) -> None:
    fit(tmp_path, Model(("training_step", 2)), batch_size=2, val_check_interval=1)
    model = Model()
    # One batch of 2 is none of 4: nothing can be due.
    fit(tmp_path, model, batch_size=4, val_check_interval=2, max_epochs=1)
    assert [len(batch) for _, _, batch in model.seen] == [4, 4, 4, 4, 4]
    assert [step for step, _ in model.validated[::2]] == [2, 4, 6]


def test_a_step_that_gathers_fewer_batches_is_named(tmp_path: Path, caplog: Any) -> None:
    fit(tmp_path, Model(("training_step", 3)), batch_size=2, accumulate_grad_batches=2)
    model = Model()
    trainer, _ = fit(tmp_path, model, batch_size=4, accumulate_grad_batches=2, max_epochs=1)
    assert "not exact: the next step gathers 1 of 2 batches, once, by the new batch size" in caplog.messages
    assert [len(batch) for _, _, batch in model.seen] == [4, 4, 4, 4, 2]
    assert trainer.global_step == 4


def test_a_stream_is_refused_with_the_remedy(tmp_path: Path) -> None:
    fit(tmp_path, Model(("training_step", 3)), data=Stream(22))
    with pytest.raises(StateMismatchError, match="the batch size was 4 and is 8, in the middle of epoch 0") as refused:
        fit(tmp_path, Model(), batch_size=8, data=Stream(22))
    assert "give batch_size=4" in str(refused.value)


def test_workers_read_the_trained_batches_again_in_their_own_sizes(tmp_path: Path, caplog: Any) -> None:
    def loader(size: int) -> Any:
        return DataLoader(Numbered(22, noise=True), size, shuffle=True, num_workers=1, multiprocessing_context="fork")

    order: dict[int, list[int]] = {}
    for size, count in ((4, 2), (6, 1), (5, None)):
        pl.seed_everything(1, verbose=False)
        model = Model(None if count is None else ("training_step", count + 1))
        manager = CheckpointManager(tmp_path / "run", every_n_train_steps=1)
        try:
            make_trainer(tmp_path, manager, max_epochs=1).fit(model, loader(size))
        except Broken:
            assert count is not None
        order.setdefault(0, []).extend(index for _, _, batch in model.seen for index in batch)
    assert sorted(order[0]) == list(range(22))
    assert any(message.startswith("replaying 3 batches of epoch 0") for message in caplog.messages)


def test_another_optimizer_or_schedule_is_refused_and_the_line_of_the_run_stays(tmp_path: Path) -> None:
    fit(tmp_path, Rates(0.1, ("training_step", 4)))
    lines = sorted(tmp_path.rglob("line.json"))
    checkpoints = sorted(tmp_path.rglob("manifest.json"))
    for changed, what in ((Model(optimizer=torch.optim.SGD), "LR scheduler"), (Model(scheduler=step_lr), "AdamW")):
        weights = {name: value.clone() for name, value in changed.state_dict().items()}
        with pytest.raises(StateMismatchError, match=what):
            fit(tmp_path, changed)
        assert changed.seen == []
        assert all(torch.equal(weights[name], value) for name, value in changed.state_dict().items())
    assert sorted(tmp_path.rglob("line.json")) == lines
    assert sorted(tmp_path.rglob("manifest.json")) == checkpoints
    model = Rates(0.1)
    fit(tmp_path, model, max_epochs=1)
    assert model.rates == pytest.approx([0.1, 0.05, 0.05])


def test_a_model_of_another_width_is_refused_before_the_run_is_claimed(tmp_path: Path) -> None:
    fit(tmp_path, Model(("training_step", 4)))
    files = sorted(tmp_path.rglob("*"))
    model = Model()
    model.net[0] = torch.nn.Linear(4, 8)
    with pytest.raises(StateMismatchError, match=r"net\.0\.weight"):
        fit(tmp_path, model)
    assert sorted(tmp_path.rglob("*")) == files


PROGRAM = """
import json, os, signal, sys
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader
sys.path.insert(0, sys.argv[1])
from lightning_samples import Model, Numbered, make_trainer
from ckptmgr.lightning import CheckpointManager

root, lr, size, dies_at = sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])

class Program(Model):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=lr)
    def training_step(self, batch, batch_idx):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        print(json.dumps([self.current_epoch, rate, batch[0].int().tolist()]), flush=True)
        if self.trainer.global_step == dies_at:
            self.trainer.callbacks[-1].wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

pl.seed_everything(size, verbose=False)
manager = CheckpointManager(root + "/run", every_n_train_steps=1, on_changed_options="apply")
trainer = make_trainer(root, manager, max_epochs=1)
trainer.fit(Program(), DataLoader(Numbered(22), batch_size=size, shuffle=True))
print(json.dumps([str(change) for change in manager.changes]))
"""


def test_a_killed_program_goes_on_with_another_rate_and_batch_size(tmp_path: Path) -> None:
    def run(lr: float, size: int, dies_at: int) -> subprocess.CompletedProcess[str]:
        arguments = [str(Path(__file__).parent), str(tmp_path), str(lr), str(size), str(dies_at)]
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environ, check=False
        )

    first = run(0.1, 4, 3)
    assert first.returncode == -9, first.stderr
    second = run(0.02, 5, -1)
    assert second.returncode == 0, second.stderr
    before = [json.loads(line) for line in first.stdout.splitlines()][:3]
    *after, changes = [json.loads(line) for line in second.stdout.splitlines()]
    assert [rate for _, rate, _ in after] == [0.02, 0.02]
    trained = [index for _, _, batch in [*before, *after] for index in batch]
    assert sorted(trained) == list(range(22))
    assert changes == ["learning rate of optimizer: 0.1 -> 0.02", "batch size of train loader: 4 -> 5"]
    assert "batch size 4 -> 5: going on after 12 samples of epoch 0" in second.stderr
