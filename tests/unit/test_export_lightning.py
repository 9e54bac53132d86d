"""Export as a ``.ckpt``: stock Lightning, without ckptmgr, goes on from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_samples import (
    NBATCHES,
    Plain,
    fit,
    managed_run,
    ordered_loader,
    same_tensors,
    saved_run,
    seeded_plain,
    stock_trainer,
)
from lightning_samples import make_trainer
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr.errors import UsageError
from ckptmgr.interop.export import Exported, export_checkpoint
from ckptmgr.lightning import CheckpointManager


def exported(run_dir: Path, step: int, target: Path) -> Exported:
    return export_checkpoint(f"{run_dir}@{step}", str(target), format="lightning")


def optimizer_state(trainer: Any) -> dict[str, torch.Tensor]:
    states = trainer.optimizers[0].state_dict()["state"]
    return {f"{index} {name}": value for index, slots in states.items() for name, value in slots.items()}


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 2 * NBATCHES}])
def test_stock_lightning_goes_on_from_the_end_of_an_epoch_bit_by_bit(tmp_path: Path, limit: dict[str, int]) -> None:
    whole, model = fit(seeded_plain(), stock_trainer(tmp_path, **limit))
    run_dir = managed_run(tmp_path, max_epochs=1)
    exported(run_dir, NBATCHES, tmp_path / "five.ckpt")
    trainer, resumed = fit(Plain(), stock_trainer(tmp_path, **limit), ckpt_path=tmp_path / "five.ckpt")
    assert resumed.losses == model.losses[NBATCHES:]
    assert same_tensors(resumed.state_dict(), model.state_dict())
    assert same_tensors(optimizer_state(trainer), optimizer_state(whole))
    assert trainer.global_step == whole.global_step == 2 * NBATCHES
    assert trainer.current_epoch == whole.current_epoch
    schedules = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (trainer, whole)]
    assert schedules[0] == schedules[1]


def test_stock_lightning_counts_on_from_mid_epoch_and_is_said_to_read_from_the_beginning(tmp_path: Path) -> None:
    run_dir = managed_run(tmp_path, max_epochs=2)
    told = exported(run_dir, 7, tmp_path / "seven.ckpt")
    assert any("mid-epoch, after batch 2" in note for note in told.notes)
    trainer, resumed = stock_trainer(tmp_path, max_epochs=2), Plain()
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        fit(resumed, trainer, ckpt_path=tmp_path / "seven.ckpt")
    assert trainer.global_step == 2 * NBATCHES
    assert resumed.seen[0] == [0, 1, 2, 3]
    assert len(resumed.seen) == 3


def test_a_stateful_loader_goes_on_in_mid_epoch_bit_by_bit(tmp_path: Path) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(ordered_loader().dataset, batch_size=4)

    torch.manual_seed(3)
    model = Plain()
    stock_trainer(tmp_path, max_epochs=2).fit(model, loader())
    manager = CheckpointManager(tmp_path / "run", every_n_train_steps=1, save_top_k=-1, keep_last=100)
    make_trainer(tmp_path, manager, max_epochs=2).fit(seeded_plain(), loader())
    assert not any("mid-epoch" in note for note in exported(tmp_path / "run", 7, tmp_path / "seven.ckpt").notes)
    resumed = Plain()
    stock_trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "seven.ckpt")
    assert resumed.seen == model.seen[7:]
    assert resumed.losses == model.losses[7:]
    assert same_tensors(resumed.state_dict(), model.state_dict())


def test_the_file_has_lightnings_own_form_and_loads_restricted(tmp_path: Path) -> None:
    run_dir = managed_run(tmp_path, model=seeded_plain(width=5), max_epochs=1)
    exported(run_dir, NBATCHES, tmp_path / "five.ckpt")
    checkpoint = torch.load(tmp_path / "five.ckpt", weights_only=True)
    own = stock_trainer(tmp_path, max_epochs=1)
    fit(seeded_plain(width=5), own)
    own.save_checkpoint(tmp_path / "own.ckpt")
    expected = torch.load(tmp_path / "own.ckpt", weights_only=False)
    assert checkpoint.keys() == expected.keys()
    assert checkpoint["hyper_parameters"] == expected["hyper_parameters"]
    assert checkpoint["loops"].keys() == expected["loops"].keys()
    for theirs, ours in zip(expected["optimizer_states"], checkpoint["optimizer_states"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        assert ours["param_groups"] == theirs["param_groups"]
    assert checkpoint["lr_schedulers"] == expected["lr_schedulers"]
    assert isinstance(checkpoint["lr_schedulers"][0]["milestones"], type(expected["lr_schedulers"][0]["milestones"]))
    loaded = Plain.load_from_checkpoint(tmp_path / "five.ckpt", weights_only=True)
    assert loaded.hparams.width == 5
    assert same_tensors(dict(loaded.state_dict()), dict(checkpoint["state_dict"]))


def test_lightning_needs_no_ckptmgr_to_resume(tmp_path: Path) -> None:
    run_dir = managed_run(tmp_path, max_epochs=1)
    exported(run_dir, NBATCHES, tmp_path / "five.ckpt")
    code = (
        "import sys; sys.modules['ckptmgr'] = None\n"
        "import torch\n"
        f"checkpoint = torch.load({str(tmp_path / 'five.ckpt')!r}, weights_only=True)\n"
        "assert checkpoint['global_step'] == 5\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TwoGroups(Plain):
    """Two optimizers, one of them with two groups in another order than the module has them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        last, first = self.net[3], self.net[0]
        groups = [{"params": last.parameters(), "lr": 1e-3}, {"params": [first.bias, first.weight], "lr": 1e-2}]
        return [torch.optim.Adam(groups), torch.optim.SGD(self.net[2].parameters(), lr=1e-2, momentum=0.9)], []


def test_several_optimizers_and_groups_keep_their_order(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = TwoGroups()
    whole, _ = fit(model, stock_trainer(tmp_path, max_epochs=2))
    torch.manual_seed(3)
    run_dir = managed_run(tmp_path, model=TwoGroups(), max_epochs=1)
    exported(run_dir, 2 * NBATCHES, tmp_path / "five.ckpt")
    trainer, resumed = fit(TwoGroups(), stock_trainer(tmp_path, max_epochs=2), ckpt_path=tmp_path / "five.ckpt")
    assert resumed.losses == model.losses[NBATCHES:]
    assert same_tensors(resumed.state_dict(), model.state_dict())
    assert same_tensors(optimizer_state(trainer), optimizer_state(whole))


def test_weights_alone_are_exported_as_weights_alone(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run", save_weights_only=True, every_n_train_steps=5)
    fit(seeded_plain(), make_trainer(tmp_path, manager, max_epochs=1))
    told = export_checkpoint(str(tmp_path / "run"), str(tmp_path / "w.ckpt"), format="lightning")
    assert any("save_weights_only" in note for note in told.notes)
    assert "optimizer_states" not in torch.load(tmp_path / "w.ckpt", weights_only=True)
    Plain.load_from_checkpoint(tmp_path / "w.ckpt", weights_only=True)


def test_a_run_of_a_plain_loop_is_no_checkpoint_of_lightnings(tmp_path: Path) -> None:
    run_dir = saved_run(tmp_path / "run", {"model": nn.Linear(1, 1)})
    with pytest.raises(UsageError, match="not saved by a CheckpointManager"):
        export_checkpoint(str(run_dir), str(tmp_path / "m.ckpt"), format="lightning")
    assert not (tmp_path / "m.ckpt").exists()
