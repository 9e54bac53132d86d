"""A user's Lightning script with `CheckpointManager`; without it (``run_dir`` None) the uninterrupted reference."""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from faults import Fault, Faults
from ingredients import Setup, make_loader, make_model, make_optimizers, make_scheduler, seed_all, validation_loader
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from results import digest_of, write_result
from torch import nn

from ckptmgr import PerSampleSeed
from ckptmgr.lightning import CheckpointManager

__all__ = ["main"]


class Task(pl.LightningModule):
    """What the plain script trains, with the trace as a part of its checkpoint."""

    def __init__(self, setup: Setup, faults: Faults, *, is_reference: bool) -> None:
        super().__init__()
        self.setup_of_case = setup
        self.faults = faults
        self.net = make_model()
        self.is_reference = is_reference
        self.trace: list[dict[str, Any]] = []
        self.automatic_optimization = setup.optimizer != "two"

    def __deepcopy__(self, memo: dict[int, Any]) -> Task:
        # Averaging copies the module; a copy of the trace would be saved with it.
        copy = Task(self.setup_of_case, self.faults, is_reference=self.is_reference)
        copy.load_state_dict(self.state_dict())
        return copy

    def configure_optimizers(self) -> Any:
        optimizers = make_optimizers(self.setup_of_case, self.net)
        scheduler = make_scheduler(self.setup_of_case, optimizers["optimizer"])
        if scheduler is None:
            return list(optimizers.values())
        how = {"interval": "step"} if self.setup_of_case.scheduler == "onecycle" else {"monitor": "val"}
        return list(optimizers.values()), [{"scheduler": scheduler, **how}]

    @property
    def turn(self) -> int:
        return len(self.trace) + 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.faults.reached("fetched", self.turn)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        loss = nn.functional.mse_loss(self.net(x).float(), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.faults.reached("forward", self.turn)
        if not self.automatic_optimization:
            self._optimize(loss, batch_idx)
        return loss

    def _optimize(self, loss: torch.Tensor, batch_idx: int) -> None:
        self.manual_backward(loss / self.setup_of_case.accumulate)
        flush = self.setup_of_case.flush and self.trainer.is_last_batch
        # Counted over epochs: without the flush, gradients of one are used in the next.
        ngathered = (batch_idx if self.setup_of_case.flush else self.turn - 1) + 1
        if ngathered % self.setup_of_case.accumulate and not flush:
            return
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            self.faults.reached("optimizing", self.turn)
            optimizer.zero_grad()
        self.faults.reached("stepped", self.turn)
        if self.setup_of_case.scheduler == "onecycle":
            self.lr_schedulers().step()  # type: ignore[union-attr]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.faults.reached("optimizing", self.turn)
        self.faults.reached("stepped", self.turn)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].item().hex()
        row = {"epoch": self.current_epoch, "samples": batch[0].tolist(), "loss": loss, "net": digest_of(self.net)}
        self.trace.append(row)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        self.log("val", nn.functional.mse_loss(self.net(x).float(), y))
        if not self.trainer.sanity_checking:
            self.faults.reached("validating", self.turn - 1)

    def on_validation_epoch_end(self) -> None:
        manual_plateau = self.setup_of_case.scheduler == "plateau" and not self.automatic_optimization
        if manual_plateau and not self.trainer.sanity_checking:
            self.lr_schedulers().step(self.trainer.callback_metrics["val"])  # type: ignore[union-attr]

    def on_train_epoch_end(self) -> None:
        self.faults.reached("epoch-hooks", self.turn - 1)

    def on_train_epoch_start(self) -> None:
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if self.is_reference and isinstance(dataset, PerSampleSeed):
            # Lightning tells the epoch to samplers only. The manager tells it to this one.
            dataset.set_epoch(self.current_epoch)
        self.faults.reached("turn-end", self.turn - 1)
        # The train loader has been iterated, and its first batch not fetched.
        torch.rand(1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trace"] = list(self.trace)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trace = checkpoint["trace"]


def main(job: dict[str, Any]) -> None:
    """Train to the end, or to the fault; ``job`` as in the plain script."""
    logging.basicConfig(level=logging.WARNING)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    setup = Setup(**job["setup"])
    faults = Faults(Fault(**job["fault"]) if job["fault"] else None)
    seed_all(job["seed"])
    task = Task(setup, faults, is_reference=not job["run_dir"])
    stopping = EarlyStopping("val", patience=100, strict=False)
    averaging = EMAWeightAveraging(decay=0.9, update_every_n_steps=2) if setup.ema else None
    manager = [CheckpointManager(job["run_dir"], **job["options"])] if job["run_dir"] else []
    accumulate = {"accumulate_grad_batches": setup.accumulate} if task.automatic_optimization else {}
    limits: dict[str, Any] = {"max_epochs": setup.epochs}
    if setup.max_steps is not None:
        limits["max_steps"] = setup.max_steps
    if setup.validate_every:
        limits["val_check_interval"] = setup.validate_every
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(manager),
        default_root_dir=tempfile.gettempdir(),
        precision="bf16-mixed" if setup.precision == "bf16" else "32-true",
        callbacks=[stopping, *([averaging] if averaging else []), *manager],
        **accumulate,
        **limits,
    )
    trainer.fit(task, make_loader(setup), validation_loader())
    average = averaging._average_model if averaging else None
    result = {
        "trace": task.trace,
        "step": trainer.global_step,
        "net": task.state_dict(),
        "ema": None if average is None else average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scheduler": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": dict(trainer.callback_metrics),
        "stopping": stopping.state_dict(),
        "epoch": trainer.current_epoch,
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
    }
    write_result(job["result"], result)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
