"""Trains six steps in a plain loop, saving or resuming on the way, on each topology that a list of jobs names.

Usage: torchrun --nproc-per-node N train.py JOBS; ``jobs.py`` says what JOBS is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jobs import END, SAVE_AT, Job, Record, do_jobs, global_mean, loader_of
from model import Model, build_optimizer, loss_of
from topologies import full_state, inner, wrap
from torch.utils.data import DataLoader

import ckptmgr


def train(job: Job) -> dict[str, Any]:
    """Train; return on every rank what all of them saw."""
    job.seed_model()
    wrapped = wrap(job.topology, Model())
    model = wrapped.model
    optimizer, scheduler = build_optimizer(model)
    loader = loader_of(wrapped.data_rank, wrapped.data_world_size)
    job.seed_training()
    record = Record()

    def make_step(step: int, batch: Any) -> None:
        numbers, words = batch
        loss = loss_of(model, words)
        optimizer.zero_grad()
        loss.backward()
        record.rates[step] = [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
        record.losses[step] = global_mean(loss)
        record.samples[step] = numbers.tolist()
        record.draws[step] = torch.rand(()).item()

    if job.run_dir is None:
        for step, batch in enumerate(two_epochs(loader), 1):
            make_step(step, batch)
            if step == SAVE_AT:
                record.states["saved"] = full_state(model, optimizer)
            if step == END:
                break
    else:
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        resume = str(SAVE_AT) if job.resumes else "auto"
        with ckptmgr.Checkpointer(job.run_dir, state=state, every_n_steps=SAVE_AT, resume=resume) as ckpt:
            step = ckpt.resume()
            if job.resumes:
                record.states["restored"] = full_state(model, optimizer)
            for batch in ckpt.batches(loader, epochs=2):
                step += 1
                make_step(step, batch)
                ckpt.step(step, metrics={"loss": record.losses[step]})
                if step == SAVE_AT:
                    record.states["saved"] = full_state(model, optimizer)
                if step == END:
                    break
    record.states["final"] = full_state(model, optimizer)
    record.is_tied = inner(model).head.weight is inner(model).embed.weight
    return record.together(wrapped.data_rank)


def two_epochs(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield what `Checkpointer.batches` does in a run that begins."""
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        yield from loader


if __name__ == "__main__":
    do_jobs(train)
