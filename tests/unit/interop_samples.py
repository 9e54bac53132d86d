"""Small models, and runs that hold them, for exports and imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_samples import Numbered, make_trainer
from torch import nn
from torch.utils.data import DataLoader

from ckptmgr import Checkpointer
from ckptmgr.lightning import CheckpointManager

NBATCHES = 5
"""Batches of an epoch of `ordered_loader`."""


class Tied(nn.Module):
    """An embedding and a head that are one tensor, a buffer, and a bfloat16 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.half = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


class Plain(pl.LightningModule):
    """Nothing random: dense layers, AdamW, a schedule. So two ways of training it can be compared bit by bit."""

    def __init__(self, width: int = 6, *, every: str = "epoch") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.losses: list[float] = []
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[1]).pow(2).mean()
        self.losses.append(float(loss.detach()))
        self.seen.append(batch[0].int().tolist())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.hparams.every}}


def ordered_loader() -> DataLoader:
    return DataLoader(Numbered(4 * NBATCHES), batch_size=4, shuffle=False)


def stock_trainer(root: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    """A Trainer without ckptmgr."""
    return make_trainer(root, *callbacks, enable_checkpointing=bool(callbacks), **options)


def straight(root: Path, **options: Any) -> tuple[pl.Trainer, Plain]:
    """Train without a break, and without ckptmgr."""
    return fit(Plain(**options.pop("model", {})), stock_trainer(root, **options))


def fit(model: Plain, trainer: pl.Trainer, **options: Any) -> tuple[pl.Trainer, Plain]:
    trainer.fit(model, ordered_loader(), **options)
    return trainer, model


def seeded_plain(**options: Any) -> Plain:
    torch.manual_seed(3)
    return Plain(**options)


def managed_run(root: Path, name: str = "run", *, model: Plain | None = None, **options: Any) -> Path:
    """Train with a manager that saves every step."""
    manager = CheckpointManager(root / name, every_n_train_steps=1, save_top_k=-1, keep_last=100)
    fit(model or seeded_plain(), make_trainer(root, manager, **options))
    return root / name


def saved_run(root: Path, state: dict[str, Any], *, steps: int = 1) -> Path:
    """A run of a plain loop that saved ``state`` once."""
    with Checkpointer(root, state=state, every_n_steps=steps) as checkpointer:
        checkpointer.resume()
        checkpointer.step(steps)
    return root


def same_tensors(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
