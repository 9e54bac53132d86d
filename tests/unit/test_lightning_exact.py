"""Resuming in Lightning is bit-identical, also where Lightning's own resume repeats, skips or forgets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning_samples import (
    Model,
    Numbered,
    StatefulStream,
    Stream,
    TwoOptimizers,
    assert_resumes_exactly,
    plain_loader,
)
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import PerSampleSeed

# 24 samples in batches of 4: 6 steps in an epoch.
PLACES = [
    ("training_step", 4),
    ("training_step", 7),
    ("on_train_batch_end", 6),
    ("validation_step", 1),
    ("validation_step", 2),
    ("on_train_epoch_end", 1),
    ("on_train_epoch_start", 2),
    ("training_step", 12),
    ("on_train_epoch_end", 2),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_run_that_broke_anywhere_ends_as_one_that_did_not(place: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, place)


@pytest.mark.parametrize("every", [2, 3, 6])
def test_steps_since_the_last_save_are_trained_again_with_the_same_numbers(every: int, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, ("training_step", 9), manager={"every_n_train_steps": every})


def test_a_run_may_break_again_and_again(tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, ("training_step", 4), ("training_step", 2), ("validation_step", 2))


def test_what_an_epoch_end_saves_is_taken_before_validation(tmp_path: Path) -> None:
    starts = assert_resumes_exactly(tmp_path, ("validation_step", 2), manager={"every_n_train_steps": None})
    assert starts == ["0000000006-000001-000000"]


LOADERS = {
    "no shuffle": lambda: DataLoader(Numbered(), batch_size=4),
    "augmentation in the main process": lambda: DataLoader(Numbered(noise=True), batch_size=4, shuffle=True),
    "a generator of its own": lambda: plain_loader(generator=torch.Generator().manual_seed(3)),
    "stateful": lambda: StatefulDataLoader(Numbered(), batch_size=4, shuffle=True),
    "stateful, augmentation": lambda: StatefulDataLoader(Numbered(noise=True), batch_size=4, shuffle=True),
    "stateful, own generator": lambda: StatefulDataLoader(
        Numbered(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "without length": lambda: DataLoader(Stream(), batch_size=4),
    "stateful without length": lambda: StatefulDataLoader(Stream(), batch_size=4),
    "stateful data without length": lambda: StatefulDataLoader(StatefulStream(), batch_size=4),
    "plain loader, stateful data": lambda: DataLoader(StatefulStream(), batch_size=4),
}


@pytest.mark.parametrize("place", [("training_step", 4), ("validation_step", 1), ("training_step", 7)], ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_no_sample_is_lost_or_repeated(loader: str, place: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, place, loader=LOADERS[loader])


WORKERS = {
    "plain": lambda: plain_loader(num_workers=2),
    "plain, augmentation": lambda: DataLoader(Numbered(noise=True), batch_size=4, shuffle=True, num_workers=2),
    "seeded per sample": lambda: DataLoader(
        PerSampleSeed(Numbered(noise=True)), batch_size=4, shuffle=True, num_workers=2
    ),
    "persistent": lambda: plain_loader(num_workers=2, persistent_workers=True),
    "stateful": lambda: StatefulDataLoader(Numbered(), batch_size=4, shuffle=True, num_workers=2),
    "without length": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
}


@pytest.mark.parametrize("loader", WORKERS)
def test_workers_read_on_where_they_were(loader: str, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, ("training_step", 9), loader=WORKERS[loader], manager={"every_n_train_steps": 4})


def plateau(interval: str, monitor: str) -> Any:
    def make(optimizer: Any, trainer: Any) -> dict[str, Any]:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7, threshold=0.2)
        return {"scheduler": scheduler, "monitor": monitor, "interval": interval}

    return make


def one_cycle(optimizer: Any, trainer: Any) -> dict[str, Any]:
    # Asking for the number of steps makes Lightning set the loaders up before anything was restored.
    steps = trainer.estimated_stepping_batches
    return {"scheduler": lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps), "interval": "step"}


@pytest.mark.parametrize("place", [("training_step", 4), ("validation_step", 2)], ids=str)
@pytest.mark.parametrize(
    "scheduler",
    [plateau("epoch", "val_loss"), plateau("step", "loss"), plateau("epoch", "mean"), one_cycle],
    ids=["plateau on validation", "plateau on each step", "plateau on a mean", "one cycle"],
)
def test_schedulers_go_on(scheduler: Any, place: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, place, model=lambda breaks_at: Model(breaks_at, scheduler=scheduler))


def test_a_stateful_loader_keeps_its_position_beside_estimated_stepping_batches(tmp_path: Path) -> None:
    assert_resumes_exactly(
        tmp_path,
        ("training_step", 4),
        model=lambda breaks_at: Model(breaks_at, scheduler=one_cycle),
        loader=LOADERS["stateful"],
    )


@pytest.mark.parametrize("optimizer", ["fused", "momentum"])
def test_optimizers_go_on(optimizer: str, tmp_path: Path) -> None:
    def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
        if optimizer == "fused":
            return torch.optim.AdamW(parameters, lr=lr, fused=True)
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    assert_resumes_exactly(tmp_path, ("training_step", 4), model=lambda breaks_at: Model(breaks_at, optimizer=make))


@pytest.mark.parametrize("place", [("training_step", 4), ("validation_step", 2), ("on_train_epoch_end", 1)], ids=str)
def test_two_optimizers_in_manual_optimization(place: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, place, model=TwoOptimizers)


OPTIONS = {
    "accumulation": {"accumulate_grad_batches": 4},
    "bfloat16": {"precision": "bf16-mixed"},
    "validation in mid-epoch": {"val_check_interval": 2},
    "validation every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "no sanity check": {"num_sanity_val_steps": 0},
    "max_steps in mid-epoch": {"max_steps": 10, "max_epochs": -1},
    "max_steps at the end of an epoch": {"max_steps": 12, "max_epochs": -1},
    "limited epochs": {"limit_train_batches": 4},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "no validation": {"limit_val_batches": 0},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_trainer(option: str, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, ("on_train_batch_end", 6), **OPTIONS[option])


def test_a_stateful_loader_with_max_steps_goes_on_in_the_right_epoch(tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, ("training_step", 7), loader=LOADERS["stateful"], max_steps=11, max_epochs=-1)


CALLBACKS = {
    "EMA": lambda: [EMAWeightAveraging(decay=0.9)],
    "weight averaging": lambda: [WeightAveraging()],
    "early stopping": lambda: [EarlyStopping("val_loss", patience=1, min_delta=1.0)],
    "ModelCheckpoint": lambda: [ModelCheckpoint(monitor="val_loss")],
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("place", [("training_step", 4), ("validation_step", 1)], ids=str)
@pytest.mark.parametrize("callback", CALLBACKS)
def test_it_lives_beside_other_callbacks(callback: str, place: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, place, callbacks=CALLBACKS[callback], max_epochs=3)


def test_several_loaders_at_once(tmp_path: Path) -> None:
    class Paired(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            super().training_step(batch["short"], batch_idx)
            return super().training_step(batch["long"], batch_idx)

    def loaders() -> dict[str, DataLoader]:
        return {"long": plain_loader(), "short": DataLoader(Numbered(12), batch_size=4, shuffle=True)}

    assert_resumes_exactly(tmp_path, ("training_step", 9), model=Paired, loader=loaders)
