"""Trains six steps with Lightning, saving or resuming on the way, on each topology that a list of jobs names.

DDP is Lightning's ``DDPStrategy``, FSDP2 and tensor parallel are its ``ModelParallelStrategy``.

Usage: torchrun --nproc-per-node N train_lightning.py JOBS; ``jobs.py`` says what JOBS is.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from jobs import END, SAVE_AT, Job, Record, do_jobs, global_mean, loader_of
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from model import Model, build_optimizer, loss_of
from topologies import Topology, full_state, shard
from torch.utils.data import DataLoader

import ckptmgr

__all__ = ["strategy_of"]


class Module(L.LightningModule):
    """The model of the matrix, its names with Lightning's usual prefix in front."""

    def __init__(self, job: Job, record: Record) -> None:
        super().__init__()
        self.net = Model()
        self._job = job
        self._record = record
        self._step = 0

    def configure_model(self) -> None:
        """Shard the model, where the strategy has a mesh for it."""
        mesh = self.device_mesh
        if mesh is not None and not getattr(self.net, "is_sharded", False):
            tensor = mesh["tensor_parallel"] if mesh["tensor_parallel"].size() > 1 else None
            shard(self.net, mesh["data_parallel"], tensor)
            self.net.is_sharded = True  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        """Make the optimizer and a scheduler that goes on at each step."""
        optimizer, scheduler = build_optimizer(self.net)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's part."""
        return loader_of(*self.data_place())

    def data_place(self) -> tuple[int, int]:
        """Return which part of each batch this process takes, and how many parts there are."""
        if self.device_mesh is None:
            return self.global_rank, self.trainer.world_size
        data = self.device_mesh["data_parallel"]
        return data.get_local_rank(), data.size()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note the state that a resume begins with: everything has been restored by now, and nothing trained."""
        self._step = self.global_step + 1
        optimizer = self.trainer.optimizers[0]
        if self._job.resumes and "restored" not in self._record.states:
            self._record.states["restored"] = full_state(self.net, optimizer)
        self._record.rates[self._step] = [float(group["lr"]) for group in optimizer.param_groups]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        numbers, words = batch
        loss = loss_of(self.net, words)
        self._record.losses[self._step] = global_mean(loss)
        self._record.samples[self._step] = numbers.tolist()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the state that is saved."""
        self._record.draws[self._step] = torch.rand(()).item()
        if self._step == SAVE_AT:
            self._record.states["saved"] = full_state(self.net, self.trainer.optimizers[0])


def strategy_of(topology: Topology) -> Strategy | str:
    """Return the strategy for a topology."""
    if topology.wrapper == "none":
        return "auto"
    if topology.wrapper == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    tensor = 2 if topology.wrapper == "fsdp+tp" else 1
    return ModelParallelStrategy(data_parallel_size=topology.processes // tensor, tensor_parallel_size=tensor)


def train(job: Job) -> dict[str, Any]:
    """Train; return on every rank what all of them saw."""
    job.seed_model()
    record = Record()
    module = Module(job, record)
    callbacks: list[L.Callback] = []
    if job.run_dir is not None:
        resume = str(SAVE_AT) if job.resumes else "auto"
        callbacks.append(ckptmgr.CheckpointManager(job.run_dir, every_n_train_steps=SAVE_AT, resume=resume))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=job.topology.processes,
        strategy=strategy_of(job.topology),
        max_steps=END,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    job.seed_training()
    with warnings.catch_warnings():
        # Advice on speed, for one; and what Lightning uses of torch is deprecated.
        warnings.simplefilter("ignore")
        trainer.fit(module)
    record.states["final"] = full_state(module.net, trainer.optimizers[0])
    record.is_tied = module.net.head.weight is module.net.embed.weight
    return record.together(module.data_place()[0])


if __name__ == "__main__":
    for name in ("utilities.rank_zero", "accelerators.cuda"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.ERROR)
    do_jobs(train)
