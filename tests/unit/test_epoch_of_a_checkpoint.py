"""The epoch that a checkpoint belongs to is the same in both loops, so that policies can count epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning_samples import Model, make_trainer, plain_loader
from torch import nn

from ckptmgr import Checkpointer, CheckpointManager, KeepAll, KeepEveryEpochs
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage


def epochs(run_dir: Path) -> list[int | None]:
    catalog = Catalog(LocalStorage(run_dir))
    return [catalog.manifest(id).epoch for id in catalog.on_line]


class WithoutValidation(Model):
    validation_step = None  # type: ignore[assignment]
    val_dataloader = None  # type: ignore[assignment]


@pytest.mark.parametrize("model", [Model, WithoutValidation])
def test_lightning_saves_the_end_of_an_epoch_as_part_of_it(tmp_path: Path, model: type[Model]) -> None:
    manager = CheckpointManager(tmp_path / "run", every="1ep", retention=KeepAll())
    make_trainer(tmp_path, manager, max_epochs=4).fit(model(), plain_loader())
    assert list(dict.fromkeys(epochs(tmp_path / "run"))) == [0, 1, 2, 3]


def test_every_second_epoch_is_kept_in_both_loops(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "lightning", every="1ep", retention=KeepEveryEpochs(2))
    make_trainer(tmp_path, manager, max_epochs=5).fit(WithoutValidation(), plain_loader())
    with Checkpointer(
        tmp_path / "plain", {"model": nn.Linear(1, 1)}, every="1ep", retention=KeepEveryEpochs(2)
    ) as ckpt:
        step = ckpt.resume()
        for _ in ckpt.batches(range(3), epochs=5):
            step += 1
            ckpt.step(step)
    assert epochs(tmp_path / "lightning") == [1, 3, 4]
    assert epochs(tmp_path / "plain") == [1, 3, 4]
