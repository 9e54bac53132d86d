"""A user's project: a package of its own, a pyproject.toml that allows it, and configurations."""

from __future__ import annotations

import textwrap
from pathlib import Path

__all__ = ["LIGHTNING", "LOOP", "PACKAGE", "write_project"]

PACKAGE = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckptmgr

POINTS = torch.linspace(-1, 1, 64).unsqueeze(1)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(POINTS, 2 * POINTS), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(POINTS, 2 * POINTS), 64)


class Model(L.LightningModule):
    def __init__(self, hidden: int = 4, lr: float = 0.1, fails_at: int | None = None):
        super().__init__()
        self.lr, self.fails_at = lr, fails_at
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.Linear(hidden, 1))

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise ArithmeticError("the loss is negative")
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.layers(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Bare(Model):
    configure_optimizers = L.LightningModule.configure_optimizers


class Net(nn.Sequential):
    def __init__(self, hidden: int = 4):
        super().__init__(nn.Linear(1, hidden), nn.Dropout(0.1), nn.Linear(hidden, 1))


class Points(TensorDataset):
    def __init__(self):
        super().__init__(POINTS, 2 * POINTS)


def undeclared(checkpointer, **others):
    raise AssertionError("nobody allowed this")


@ckptmgr.factory
def train(checkpointer, model, optimizer, train_loader, epochs, scheduler=None, scaler=None):
    step = checkpointer.resume()
    for x, y in checkpointer.batches(train_loader, epochs=epochs):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        step += 1
        checkpointer.step(step, metrics={"loss": loss.item()})
"""

LIGHTNING = """
seed: 1
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, logger: false}
model: {_target_: PACKAGE.Model, hidden: 4, lr: 0.1, fails_at: null}
data: {_target_: PACKAGE.Data, batch_size: 8}
checkpoint: {every_n_train_steps: 4, monitor: val_loss}
"""

LOOP = """
seed: 1
loop: {_target_: PACKAGE.train, epochs: 2}
model: {_target_: PACKAGE.Net, hidden: 4}
loaders:
  train: {_target_: torch.utils.data.DataLoader, dataset: {_target_: PACKAGE.Points}, batch_size: 8, shuffle: true}
optimizer: {_target_: torch.optim.SGD, lr: 0.1, momentum: 0.9}
checkpoint: {every_n_steps: 4, monitor: loss}
"""


def write_project(folder: Path, package: str) -> Path:
    """Write a project and return its root.

    Args:
        folder: Where it goes.
        package: Name of its package: one for each test, since a module is imported once in a process.
    """
    root = folder / "project"
    (root / package).mkdir(parents=True)
    (root / package / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    (root / "pyproject.toml").write_text(f'[tool.ckptmgr]\nallow = ["{package}.*"]\n')
    (root / "fit.yaml").write_text(LIGHTNING.replace("PACKAGE", package))
    (root / "loop.yaml").write_text(LOOP.replace("PACKAGE", package))
    return root
