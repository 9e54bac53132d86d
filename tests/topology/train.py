"""Trains six steps on each of several topologies of as many processes, saving or resuming on the way.

Usage: torchrun --nproc-per-node N train.py JOBS, a JSON list of jobs, each with these fields:

==========  ============================================================================================================
topology    its name
result      where rank 0 puts what it found; a rank that fails puts ``<result>.rank<R>.error`` beside it
run_dir     the run; null to train without a Checkpointer
resumes     whether to go on from the run's step 3 instead of beginning
==========  ============================================================================================================
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import GLOBAL_BATCH, Model, Sequences, build_optimizer, loss_of
from topologies import TOPOLOGIES, Topology, Wrapped, full_state, inner, start_processes, wrap
from torch.utils.data import DataLoader

import ckptmgr

SAVE_AT, END = 3, 6
# How long the ranks that are done with a job wait for the others, before they give up together.
PATIENCE = timedelta(seconds=30)


@dataclass(frozen=True)
class Job:
    """One cell of the matrix, or the run that its row begins with."""

    topology: Topology
    result: Path
    run_dir: str | None
    resumes: bool


class Record:
    """What one rank sees of a training.

    Attributes:
        losses: The global mean loss of each step.
        rates: The learning rate of each group with which each step was made.
        samples: The numbers of the samples of each step that this rank trained.
        draws: A random number for each step, drawn from this rank's generator.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.rates: dict[int, list[float]] = {}
        self.samples: dict[int, list[int]] = {}
        self.draws: dict[int, float] = {}


def train(job: Job) -> dict[str, Any]:
    """Train; return on every rank what was found."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    # On a resume everything has to come from the checkpoint: each rank begins with weights of its own, and wrong ones.
    torch.manual_seed(50 + rank if job.resumes else 0)
    wrapped = wrap(job.topology, Model())
    optimizer, scheduler = build_optimizer(wrapped.model)
    torch.manual_seed(90 + rank if job.resumes else 10 + rank)
    sampler = ckptmgr.ElasticSampler(
        len(Sequences()),
        global_batch_size=GLOBAL_BATCH,
        seed=7,
        rank=wrapped.data_rank,
        world_size=wrapped.data_world_size,
    )
    loader = DataLoader(Sequences(), batch_sampler=sampler)
    record = Record()
    states: dict[str, Any] = {}

    def step_on(step: int, batch: Any) -> None:
        numbers, words = batch
        loss = loss_of(wrapped.model, words)
        optimizer.zero_grad()
        loss.backward()
        record.rates[step] = [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
        record.losses[step] = global_mean(loss.detach(), wrapped)
        record.samples[step] = numbers.tolist()
        record.draws[step] = torch.rand(()).item()

    if job.run_dir is None:
        for step, batch in enumerate([*loader, *next_epoch(sampler, loader)][:END], 1):
            step_on(step, batch)
            if step == SAVE_AT:
                states["saved"] = full_state(wrapped.model, optimizer)
    else:
        with ckptmgr.Checkpointer(
            job.run_dir,
            state={"model": wrapped.model, "optimizer": optimizer, "scheduler": scheduler},
            every_n_steps=SAVE_AT,
            resume=str(SAVE_AT) if job.resumes else "never",
        ) as ckpt:
            step = ckpt.resume()
            if job.resumes:
                states["restored"] = full_state(wrapped.model, optimizer)
            for batch in ckpt.batches(loader, epochs=2):
                step += 1
                step_on(step, batch)
                ckpt.step(step, metrics={"loss": record.losses[step]})
                if step == SAVE_AT:
                    states["saved"] = full_state(wrapped.model, optimizer)
                if step == END:
                    break
    states["final"] = full_state(wrapped.model, optimizer)
    model = inner(wrapped.model)
    return {
        "states": states,
        "is_tied": model.head.weight is model.embed.weight,
        "losses": record.losses,
        "rates": record.rates,
        "ranks": from_all_ranks({"data_rank": wrapped.data_rank, "samples": record.samples, "draws": record.draws}),
    }


def next_epoch(sampler: ckptmgr.ElasticSampler, loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader at the beginning of epoch 1."""
    sampler.set_epoch(1)
    return loader


def global_mean(loss: torch.Tensor, wrapped: Wrapped) -> float:
    """Return the mean over all samples of the step. Ranks that trained the same samples count them equally often."""
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def from_all_ranks(value: Any) -> list[Any]:
    """Return every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(job: Job) -> None:
    """Do a job, and leave behind what it came to. Its failure is its own, unless the ranks cannot meet any more."""
    rank = int(os.environ["RANK"])
    try:
        found = train(job)
        if rank == 0:
            torch.save(found, job.result)
    except Exception:
        job.result.with_name(f"{job.result.name}.rank{rank}.error").write_text(traceback.format_exc())
    if dist.is_initialized():
        # One rank may have failed while the others wait for it. Then this raises, and the jobs that are left are begun
        # by new processes.
        dist.monitored_barrier(timeout=PATIENCE)


def main() -> None:
    """Do all jobs in order."""
    jobs = [
        Job(TOPOLOGIES[entry["topology"]], Path(entry["result"]), entry["run_dir"], entry["resumes"])
        for entry in json.loads(Path(sys.argv[1]).read_text())
    ]
    start_processes(jobs[0].topology.processes)
    for job in jobs:
        run(job)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
