"""Training goes on in a fork as it went on in the parent: weights, optimizer, order of the data and RNG."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning_samples import Broken, Model, differences, fingerprint, make_trainer, plain_loader
from test_checkpointer import Training

from ckptmgr.errors import UsageError
from ckptmgr.fork import fork_run
from ckptmgr.lightning import CheckpointManager
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt
from ckptmgr.run.reference import Reference
from ckptmgr.storage.local import LocalStorage


def test_a_plain_loop_goes_on_in_a_fork_bit_by_bit_without_the_parent(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole")
    whole.train()
    # In the middle of the first epoch; the parent goes on behind it.
    Training(tmp_path / "parent", every_n_steps=2, keep_last=9).train(until=4)
    Training(tmp_path / "parent", every_n_steps=2, keep_last=9).train(until=9)
    fork_run(Reference(str(tmp_path / "parent"), "4"), str(tmp_path / "fork"))
    shutil.rmtree(tmp_path / "parent")
    forked = Training(tmp_path / "fork", resume="must")
    assert forked.train() == 12
    assert forked.bits() == whole.bits()
    assert forked.extra["seen"] == whole.extra["seen"]
    catalog = Catalog(LocalStorage(tmp_path / "fork"))
    assert catalog.line.links[2] is not None
    assert catalog.line.links[2].checkpoint == "0000000004-000001-000000"


def test_lightning_goes_on_in_a_fork_bit_by_bit_without_the_parent(tmp_path: Path) -> None:
    def fit(name: str, breaks_at: tuple[str, int] | None) -> tuple[pl.Trainer, Model]:
        model = Model(breaks_at=breaks_at)
        trainer = make_trainer(tmp_path, CheckpointManager(tmp_path / name, every_n_train_steps=2))
        if breaks_at is None:
            trainer.fit(model, plain_loader())
        else:
            with pytest.raises(Broken):
                trainer.fit(model, plain_loader())
        return trainer, model

    pl.seed_everything(1, verbose=False)
    whole = fit("whole", None)
    pl.seed_everything(1, verbose=False)
    fit("parent", ("training_step", 9))
    fork_run(Reference(str(tmp_path / "parent"), "8"), str(tmp_path / "fork"))
    shutil.rmtree(tmp_path / "parent")
    pl.seed_everything(5, verbose=False)
    forked = fit("fork", None)
    assert differences(fingerprint(*whole), fingerprint(*forked)) == []


def test_nobody_trains_from_nothing_in_a_fork_that_was_cut_off(tmp_path: Path) -> None:
    claim_attempt(LocalStorage(tmp_path / "fork"), [])
    with pytest.raises(UsageError, match="fork that was cut off"):
        Training(tmp_path / "fork").train()
    assert [path.name for path in (tmp_path / "fork").iterdir()] == ["attempts"]
