"""A plain loop that was changed since its checkpoint: what is named, what is applied, and what is refused unwritten."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer, StateMismatchError, UsageError

NSAMPLES = 22


class Program:
    """A loop over 22 samples with SGD and a schedule, or what a changed program has instead."""

    def __init__(
        self,
        run_dir: Path,
        *,
        lr: float = 0.1,
        batch_size: int = 4,
        width: int = 3,
        optimizer: Any = torch.optim.SGD,
        has_scheduler: bool = True,
        mode: Any = "keep",
        **options: Any,
    ) -> None:
        torch.manual_seed(batch_size)
        self.model = nn.Linear(1, width)
        self.optimizer = optimizer(self.model.parameters(), lr=lr, **options)
        state = {"model": self.model, "optimizer": self.optimizer}
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5) if has_scheduler else None
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler
        self.loader = DataLoader(TensorDataset(torch.arange(NSAMPLES)), batch_size=batch_size, shuffle=True)
        self.ckpt = Checkpointer(run_dir, state, every_n_steps=1, on_changed_options=mode)
        self.seen: list[Any] = []

    def train(self, nsteps: int | None = None, epochs: int = 1) -> Program:
        with self.ckpt as ckpt:
            step = ckpt.resume()
            for (index,) in ckpt.batches(self.loader, epochs=epochs):
                self.seen.append((ckpt.epoch, self.optimizer.param_groups[0]["lr"], index.tolist()))
                self.optimizer.zero_grad()
                self.model(index[:, None].float()).sum().backward()
                self.optimizer.step()
                if self.scheduler is not None:
                    self.scheduler.step()
                step += 1
                ckpt.step(step)
                if len(self.seen) == nsteps:
                    break
        return self

    @property
    def rates(self) -> list[float]:
        return [rate for _, rate, _ in self.seen]


def said(caplog: Any) -> list[str]:
    return [message for message in caplog.messages if "learning rate" in message or "batch size" in message]


def test_a_changed_learning_rate_is_named_and_kept_and_applied_on_request(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "ckptmgr")
    Program(tmp_path).train(2, epochs=3)
    kept = Program(tmp_path, lr=0.01).train(2, epochs=3)
    assert kept.rates == [0.05, 0.05]
    assert kept.ckpt.changes == []
    assert said(caplog) == [
        "the checkpoint's options stay in force: learning rate of optimizer: built with 0.01, the checkpoint was built "
        "with 0.1; kept at 0.05. on_changed_options='apply' goes on with this program's"
    ]
    caplog.clear()
    applied = Program(tmp_path, lr=0.01, mode="apply").train(3, epochs=3)
    assert applied.rates == pytest.approx([0.0025, 0.0025, 0.00125])
    assert [str(change) for change in applied.ckpt.changes] == ["learning rate of optimizer: 0.1 -> 0.01"]
    assert said(caplog) == ["applied: learning rate of optimizer: 0.1 -> 0.01 (0.025 -> 0.0025 at this point)"]
    caplog.clear()
    again = Program(tmp_path, lr=0.01, mode="apply").train(2, epochs=3)
    assert again.rates == pytest.approx([0.00125, 0.000625])
    assert again.ckpt.changes == []
    assert said(caplog) == []


def test_another_batch_size_trains_what_is_left_of_the_epoch_and_is_named(tmp_path: Path, caplog: Any) -> None:
    before = Program(tmp_path).train(2)
    after = Program(tmp_path, batch_size=5).train()
    batches = [batch for _, _, batch in [*before.seen, *after.seen]]
    assert [len(batch) for batch in batches] == [4, 4, 5, 5, 4]
    assert sorted(index for batch in batches for index in batch) == list(range(NSAMPLES))
    assert said(caplog) == ["batch size 4 -> 5: going on after 8 samples of epoch 0"]
    assert [str(change) for change in after.ckpt.changes] == ["batch size of train loader: 4 -> 5"]


def test_a_restore_from_another_run_names_and_applies_too(tmp_path: Path, caplog: Any) -> None:
    Program(tmp_path / "one").train(2)
    fork = Program(tmp_path / "two", lr=0.01)
    fork.ckpt.restore(f"{tmp_path / 'one'}@latest")
    assert fork.optimizer.param_groups[0]["lr"] == 0.05
    assert len(said(caplog)) == 1
    applied = Program(tmp_path / "three", lr=0.01, mode="apply")
    applied.ckpt.restore(f"{tmp_path / 'one'}@latest")
    assert applied.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert len(applied.ckpt.changes) == 1


def test_a_mode_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="on_changed_options='never'"):
        Program(tmp_path, mode="never")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"width": 5}, "weight"),
        ({"optimizer": torch.optim.Adam}, "of another kind: SGD, the live one Adam"),
        ({"has_scheduler": False}, "the live state has no 'scheduler'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, changed: Any, what: str) -> None:
    with Program(tmp_path).ckpt as training:
        training.resume()
        training.step(1)
        training.wait()
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for mode in ("keep", "apply"):
            with pytest.raises(StateMismatchError) as refused:
                Program(tmp_path, mode=mode, **changed).train()
            assert what in str(refused.value)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
        # Who trains in the run is not disturbed.
        training.step(2)
        training.wait()


def test_an_option_that_cannot_be_applied_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    Program(tmp_path, optimizer=torch.optim.Adam).train(2)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(StateMismatchError, match="amsgrad of optimizer: False -> True cannot be applied"):
        Program(tmp_path, optimizer=torch.optim.Adam, amsgrad=True, mode="apply").train()
    assert sorted(tmp_path.rglob("*")) == files
    assert Program(tmp_path, optimizer=torch.optim.Adam, amsgrad=True).train().seen != []


SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_loop_changes import Program

program = Program(Path(sys.argv[2]), lr=float(sys.argv[3]), batch_size=int(sys.argv[4]), mode="apply")
dies_after = int(sys.argv[5])
step = program.ckpt.step

def step_and_die(number):
    step(number)
    print(json.dumps(program.seen[-1]), flush=True)
    if number == dies_after:
        program.ckpt.wait()
        os.kill(os.getpid(), signal.SIGKILL)

program.ckpt.step = step_and_die
program.train()
print(json.dumps([str(change) for change in program.ckpt.changes]))
"""


def test_a_killed_loop_goes_on_with_another_rate_and_batch_size(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )

    first = run(0.1, 4, 3)
    assert first.returncode == -9, first.stderr
    second = run(0.02, 5, -1)
    assert second.returncode == 0, second.stderr
    before = [json.loads(line) for line in first.stdout.splitlines()]
    *after, changes = [json.loads(line) for line in second.stdout.splitlines()]
    # Steps 4 and 5 of a schedule that halves at every second one.
    assert [rate for _, rate, _ in after] == pytest.approx([0.01, 0.005])
    assert sorted(index for _, _, batch in [*before, *after] for index in batch) == list(range(NSAMPLES))
    assert changes == ["learning rate of optimizer: 0.1 -> 0.02", "batch size of train loader: 4 -> 5"]
    assert "batch size 4 -> 5: going on after 12 samples of epoch 0" in second.stderr
