"""Import of Lightning's own checkpoints: a Trainer with a CheckpointManager goes on from them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_samples import (
    NBATCHES,
    Plain,
    fit,
    ordered_loader,
    same_tensors,
    seeded_plain,
    stock_trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_samples import make_trainer
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import Selection
from ckptmgr.cli.main import run
from ckptmgr.diagnose.sniff import sniff
from ckptmgr.errors import CorruptCheckpointError, StateMismatchError, UsageError
from ckptmgr.interop.export import export_checkpoint
from ckptmgr.interop.import_run import ImportedRun, import_run
from ckptmgr.lightning import CheckpointManager

Loader = Callable[[], Any]


def stock_checkpoint(
    root: Path, *, model: Plain | None = None, loader: Loader = ordered_loader, trainer: dict[str, Any], **how: Any
) -> list[Path]:
    """Train with stock Lightning and its ModelCheckpoint; return what it has saved, the oldest first."""
    callback = ModelCheckpoint(root / "stock", filename="{step}", save_top_k=-1, **how)
    stock_trainer(root, callback, **trainer).fit(model or seeded_plain(), loader())
    return sorted((root / "stock").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


def imported(path: Path, root: Path, **options: Any) -> ImportedRun:
    return import_run(str(path), str(root / "run"), **options)


def go_on(
    root: Path, *, model: Plain | None = None, loader: Loader = ordered_loader, **options: Any
) -> tuple[Any, Plain]:
    """Train on in the imported run, from weights that are others."""
    torch.manual_seed(77)
    model = model or Plain()
    trainer = make_trainer(root, CheckpointManager(root / "run", every_n_train_steps=1, resume="must"), **options)
    trainer.fit(model, loader())
    return trainer, model


def moments(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{number} {index} {name}": value
        for number, optimizer in enumerate(trainer.optimizers)
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def assert_same_end(ours: tuple[Any, Plain], whole: tuple[Any, Plain], *, after: int) -> None:
    (trainer, model), (straight, expected) = ours, whole
    assert model.losses == expected.losses[after:]
    assert model.seen == expected.seen[after:]
    assert same_tensors(model.state_dict(), expected.state_dict())
    assert same_tensors(moments(trainer), moments(straight))
    assert (trainer.global_step, trainer.current_epoch) == (straight.global_step, straight.current_epoch)
    schedules = [[c.scheduler.state_dict() for c in t.lr_scheduler_configs] for t in (trainer, straight)]
    assert schedules[0] == schedules[1]
    progress = [str(t.fit_loop.epoch_loop.batch_progress.total) for t in (trainer, straight)]
    assert progress[0] == progress[1]
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == straight.fit_loop.epoch_loop._batches_that_stepped


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 2 * NBATCHES}])
def test_five_steps_of_stock_lightning_and_five_here_are_ten(tmp_path: Path, limit: dict[str, int]) -> None:
    whole = fit(seeded_plain(), stock_trainer(tmp_path, **limit))
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    told = imported(path, tmp_path)
    assert told.step == NBATCHES
    assert told.entries == ("model", "optimizer", "trainer", "data")
    assert_same_end(go_on(tmp_path, **limit), whole, after=NBATCHES)


@pytest.mark.parametrize("step", range(1, 2 * NBATCHES))
def test_every_step_of_an_ordered_loader_is_a_place_to_go_on_from(tmp_path: Path, step: int) -> None:
    whole = fit(seeded_plain(), stock_trainer(tmp_path, max_epochs=2))
    paths = stock_checkpoint(tmp_path, trainer={"max_epochs": 2}, every_n_train_steps=1)
    imported(paths[step - 1], tmp_path)
    assert_same_end(go_on(tmp_path, max_epochs=2), whole, after=step)


class Validated(Plain):
    """Validates twice an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking and batch_idx == 0:
            self.validated.append(self.trainer.global_step)
        self.log("val_loss", self.net(batch[1]).pow(2).mean())

    def val_dataloader(self) -> Any:
        return ordered_loader()


@pytest.mark.parametrize("moment", ["batch", "validation", "epoch"])
def test_validation_that_was_due_runs_once(tmp_path: Path, moment: str) -> None:
    how: dict[str, Any] = {
        "batch": {"every_n_train_steps": 1},
        "validation": {"monitor": "val_loss", "save_on_train_epoch_end": False},
        "epoch": {"save_on_train_epoch_end": True},
    }[moment]
    torch.manual_seed(3)
    expected = Validated()
    options = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    whole = fit(expected, stock_trainer(tmp_path, max_epochs=2, **options))
    torch.manual_seed(3)
    paths = stock_checkpoint(tmp_path, model=Validated(), trainer={"max_epochs": 1, **options}, **how)
    for path in paths:
        step = int(path.stem.partition("=")[2])
        root = tmp_path / f"from-{step}"
        imported(path, root)
        ours = go_on(root, model=Validated(), max_epochs=2, **options)
        assert_same_end(ours, whole, after=step)
        # In on_train_batch_end it was still to come.
        assert ours[1].validated == [s for s in expected.validated if s > step or (moment == "batch" and s == step)]


def test_a_stateful_loader_goes_on_from_its_own_state(tmp_path: Path) -> None:
    def loader() -> StatefulDataLoader:
        torch.manual_seed(5)
        return StatefulDataLoader(ordered_loader().dataset, batch_size=4, shuffle=True)

    torch.manual_seed(3)
    expected = Plain()
    straight = stock_trainer(tmp_path, max_epochs=1)
    straight.fit(expected, loader())
    paths = stock_checkpoint(tmp_path, loader=loader, trainer={"max_epochs": 1}, every_n_train_steps=1)
    imported(paths[1], tmp_path)
    ours = go_on(tmp_path, loader=loader, max_epochs=1)
    assert ours[1].seen == expected.seen[2:]


def test_what_the_file_lacks_is_said_on_import_and_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = stock_checkpoint(tmp_path, trainer={"max_epochs": 1}, every_n_train_steps=1)
    told = imported(paths[1], tmp_path)
    assert any("random number generators" in note for note in told.notes)
    assert any("after batch 2 of epoch 0" in note for note in told.notes)
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        go_on(tmp_path, max_epochs=1)
    warnings = [record.getMessage() for record in caplog.records if "imported from step=2.ckpt" in record.getMessage()]
    assert len(warnings) == 1
    assert "after batch 2 of epoch 0" in warnings[0]


def test_a_second_resume_goes_on_from_our_own_checkpoint_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(seeded_plain(), stock_trainer(tmp_path, max_epochs=3))
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    imported(path, tmp_path)
    go_on(tmp_path, max_epochs=-1, max_steps=NBATCHES + 2)
    caplog.clear()
    assert_same_end(go_on(tmp_path, max_epochs=3), whole, after=NBATCHES + 2)
    assert not any("imported" in record.getMessage() for record in caplog.records)


class ReversedGroups(Plain):
    """Groups in another order than the module has its layers, and layers that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(4, 6)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.twin(batch[1]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.twin.parameters()), "lr": 1e-3}, {"params": list(self.net.parameters())}]
        return torch.optim.Adam(groups, lr=1e-2)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, importable from where the command runs."""
    source = "from test_import_lightning import ReversedGroups, Plain\ndef narrow():\n    return Plain(3)\n"
    (tmp_path / "users_models.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    yield "users_models"
    sys.modules.pop("users_models", None)


@pytest.mark.parametrize("has_model", [True, False])
def test_groups_in_another_order_are_named_by_the_model_or_kept_by_position(
    tmp_path: Path, factories: str, has_model: bool
) -> None:
    torch.manual_seed(3)
    whole = fit(ReversedGroups(), stock_trainer(tmp_path, max_epochs=2))
    torch.manual_seed(3)
    (path,) = stock_checkpoint(tmp_path, model=ReversedGroups(), trainer={"max_epochs": 1})
    told = imported(path, tmp_path, model=f"{factories}:ReversedGroups" if has_model else None)
    assert any("by position" in note for note in told.notes) is not has_model
    assert_same_end(go_on(tmp_path, model=ReversedGroups(), max_epochs=2), whole, after=NBATCHES)


def test_names_that_are_guessed_are_said_to_be_likely(tmp_path: Path) -> None:
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    assert any("likely, not certain" in note for note in imported(path, tmp_path).notes)


def test_state_by_position_is_refused_where_groups_or_shapes_differ(tmp_path: Path) -> None:
    torch.manual_seed(3)
    (path,) = stock_checkpoint(tmp_path, model=ReversedGroups(), trainer={"max_epochs": 1})
    imported(path, tmp_path)

    class OneGroup(ReversedGroups):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class Swapped(ReversedGroups):
        def configure_optimizers(self) -> Any:
            groups = [{"params": reversed(list(self.twin.parameters()))}, {"params": list(self.net.parameters())}]
            return torch.optim.Adam(groups, lr=1e-2)

    with pytest.raises(StateMismatchError, match="cannot be matched"):
        go_on(tmp_path, model=OneGroup(), max_epochs=2)
    with pytest.raises(StateMismatchError, match="is of shape"):
        go_on(tmp_path, model=Swapped(), max_epochs=2)


def test_a_model_that_is_not_the_one_of_the_file_is_refused(tmp_path: Path, factories: str) -> None:
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    with pytest.raises(StateMismatchError, match="not the one of this file"):
        imported(path, tmp_path, model=f"{factories}:narrow")
    with pytest.raises(UsageError, match="there is no 'absent'"):
        imported(path, tmp_path, model=f"{factories}:absent")
    with pytest.raises(UsageError, match="it is MODULE:NAME"):
        imported(path, tmp_path, model=factories)
    assert not (tmp_path / "run").exists()


def test_another_kind_of_scheduler_is_refused_on_resume(tmp_path: Path) -> None:
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    imported(path, tmp_path)

    class Cosine(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]

    with pytest.raises(StateMismatchError, match="none of the live kind"):
        go_on(tmp_path, model=Cosine(), max_epochs=2)


def test_weights_alone_can_be_loaded_and_not_resumed(tmp_path: Path) -> None:
    (path,) = stock_checkpoint(tmp_path, model=seeded_plain(width=5), trainer={"max_epochs": 1}, save_weights_only=True)
    told = imported(path, tmp_path)
    assert any("holds no optimizer" in note for note in told.notes)
    loaded = Plain.load_from_checkpoint(f"ckptmgr://{tmp_path / 'run'}", weights_only=True)
    assert loaded.hparams.width == 5
    with pytest.raises(UsageError, match="cannot be resumed"):
        go_on(tmp_path, model=Plain(5), max_epochs=2)


def test_there_and_back_gives_a_file_that_stock_lightning_resumes_from(tmp_path: Path) -> None:
    whole = fit(seeded_plain(), stock_trainer(tmp_path, max_epochs=2))
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    imported(path, tmp_path)
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "back.ckpt"), format="lightning")
    resumed = fit(Plain(), stock_trainer(tmp_path, max_epochs=2), ckpt_path=tmp_path / "back.ckpt")
    assert resumed[1].losses == whole[1].losses[NBATCHES:]
    assert same_tensors(resumed[1].state_dict(), whole[1].state_dict())


def test_a_selection_goes_on_without_what_it_leaves_out(tmp_path: Path) -> None:
    paths = stock_checkpoint(tmp_path, trainer={"max_epochs": 1}, every_n_train_steps=1)
    imported(paths[2], tmp_path)
    for number, selection in enumerate((Selection.without("rng"), Selection.only("model"))):
        manager = CheckpointManager(
            tmp_path / f"next-{number}", resume=str(tmp_path / "run"), selection=selection, save_top_k=-1
        )
        trainer, model = make_trainer(tmp_path, manager, max_epochs=1), Plain()
        trainer.fit(model, ordered_loader())
        assert trainer.global_step == NBATCHES
        assert len(model.seen) == (2 if number == 0 else NBATCHES)


def test_a_checkpoint_of_pytorch_lightning_1_is_brought_up_to_date(tmp_path: Path) -> None:
    model = seeded_plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    old = {
        "epoch": 3,
        "global_step": 20,
        "pytorch-lightning_version": "1.4.9",
        "state_dict": model.state_dict(),
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }
    torch.save(old, tmp_path / "old.ckpt")
    told = imported(tmp_path / "old.ckpt", tmp_path)
    assert told.step == 20


def damaged(**changes: Any) -> dict[str, Any]:
    model = seeded_plain()
    good = {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "loops": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"loops": {"fit_loop": {"epoch_progress": 3}}},
        {"loops": None},
        {"global_step": "many"},
        {"state_dict": {"a": 1}},
        {"pytorch-lightning_version": "not a version"},
        {"optimizer_states": 7},
    ],
)
def test_a_file_that_only_looks_like_lightnings_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    torch.save(damaged(**changes), tmp_path / "odd.ckpt")
    with pytest.raises(CorruptCheckpointError, match="not as Lightning writes"):
        imported(tmp_path / "odd.ckpt", tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_command_tells_what_it_made_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    capsys.readouterr()
    assert run(["import", str(path), str(tmp_path / "run")]) == 0
    output = capsys.readouterr()
    assert f"imported {path.name}, a checkpoint of Lightning, as " in output.out
    assert "note: it holds no state of random number generators" in output.err
    assert run(["show", f"{tmp_path / 'run'}@latest"]) == 0
    assert f"imported from {path.name}" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert run(["doctor", str(tmp_path / "run")]) == 0
    # What it was imported from is no change of the environment.
    assert "source." not in capsys.readouterr().out
    assert run(["import", str(path), str(tmp_path / "run")]) == 2


def test_the_doctor_says_that_a_trainer_goes_on_from_it_and_after_that_how_to_resume(tmp_path: Path) -> None:
    (path,) = stock_checkpoint(tmp_path, trainer={"max_epochs": 1})
    imported(path, tmp_path)
    place = str(tmp_path / "run")
    advice = sniff(place).advice
    assert f"to train on: Trainer(callbacks=[CheckpointManager({place!r})]).fit(model)" in advice
    assert not any("ckptmgr resume" in line for line in advice)
    go_on(tmp_path, max_epochs=2)
    assert f"ckptmgr resume {place}" in sniff(place).advice
