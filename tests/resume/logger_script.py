"""A user's Lightning script with a logger of every kind; without ``kill_at`` the uninterrupted reference."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ingredients import Setup, make_loader, make_model, validation_loader
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn

from ckptmgr.lightning import CheckpointManager

__all__ = ["main"]


class Task(pl.LightningModule):
    """Logs at each step, at each epoch, in validation, on an axis of its own, and from the ninth step on a new name."""

    def __init__(self, lr: float, kill_at: int | None) -> None:
        super().__init__()
        self.save_hyperparameters("lr")
        self.net = make_model()
        self.kill_at = kill_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, x, y = batch
        loss = nn.functional.mse_loss(self.net(x).float(), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        if self.global_step >= 9:
            self.log("late", loss.detach() * 2)
        for logger in self.loggers:
            logger.log_metrics({"backwards": loss.item()}, step=1000 - self.global_step)
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        self.log("val", nn.functional.mse_loss(self.net(x).float(), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def make_loggers(folder: Path, *, with_wandb: bool) -> list[Any]:
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    return [
        CSVLogger(folder, name="csv"),
        TensorBoardLogger(folder, name="tb"),
        MLFlowLogger("tests", tracking_uri=f"file:{folder}/mlflow"),
        *([WandbLogger(save_dir=folder, project="tests", offline=True)] if with_wandb else []),
    ]


def main(job: dict[str, Any]) -> None:
    """Train to the end, or until it is killed."""
    logging.basicConfig(level=logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # W&B and MLflow never look for a server. MLflow wants to be told that files will do.
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    pl.seed_everything(5, verbose=False)
    folder = Path(job["folder"])
    manager = CheckpointManager(folder / "run", every_n_train_steps=3, resume=job["resume"], background=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        log_every_n_steps=1,
        logger=make_loggers(folder, with_wandb=job["wandb"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[LearningRateMonitor("step"), manager],
    )
    trainer.fit(Task(job["lr"], job["kill_at"]), make_loader(Setup()), validation_loader())
