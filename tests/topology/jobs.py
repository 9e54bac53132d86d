"""What the two training programs have in common: their jobs, what a rank notes down, and how one job's failure ends.

The programs get the path of a JSON list of jobs, all for the same number of processes:

==========  ============================================================================================================
topology    its name
run_dir     the run; null to train without saving
resumes     whether to go on from the run's step 3 instead of beginning
result      where rank 0 puts what it found; a rank that fails puts ``<result>.rank<R>.error`` beside it
==========  ============================================================================================================
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import GLOBAL_BATCH, Sequences
from topologies import TOPOLOGIES, Topology, digest, start_processes
from torch.utils.data import DataLoader

import ckptmgr

__all__ = ["END", "SAVE_AT", "Job", "Record", "do_jobs", "global_mean", "loader_of"]

SAVE_AT, END = 3, 6
# How long the ranks that are done with a job wait for the others, before they give up together.
PATIENCE = timedelta(seconds=30)


@dataclass(frozen=True)
class Job:
    """One cell of the matrix, or the run that a row of it begins with."""

    topology: Topology
    result: Path
    run_dir: str | None
    resumes: bool

    def seed_model(self) -> None:
        """Seed for the model's first weights. After a resume they all have to come from the checkpoint.

        So each rank then begins with wrong ones of its own.
        """
        torch.manual_seed(50 + _rank() if self.resumes else 0)

    def seed_training(self) -> None:
        """Seed for everything else: on each rank otherwise."""
        torch.manual_seed(90 + _rank() if self.resumes else 10 + _rank())


@dataclass
class Record:
    """What one rank sees of a training.

    Attributes:
        losses: The global mean loss of each step.
        rates: The learning rate of each group with which each step was made.
        samples: The numbers of the samples of each step that this rank trained.
        draws: A random number for each step, drawn from this rank's generator.
        states: Whole states by moment: ``saved``, ``restored``, ``final``.
        is_tied: Whether embedding and head were one parameter at the end.
    """

    losses: dict[int, float] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    draws: dict[int, float] = field(default_factory=dict)
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    is_tied: bool = False

    def together(self, data_rank: int) -> dict[str, Any]:
        """Return what all ranks saw. To be called on every rank."""
        return {
            "states": self.states,
            "is_tied": self.is_tied,
            "losses": self.losses,
            "rates": self.rates,
            "ranks": _from_all(
                {
                    "data_rank": data_rank,
                    "samples": self.samples,
                    "draws": self.draws,
                    "digests": {moment: digest(state) for moment, state in self.states.items()},
                }
            ),
        }


def loader_of(data_rank: int, data_world_size: int) -> DataLoader[Any]:
    """Return the loader of a rank that takes this part of each batch."""
    data = Sequences()
    sampler = ckptmgr.ElasticSampler(
        len(data), global_batch_size=GLOBAL_BATCH, seed=7, rank=data_rank, world_size=data_world_size
    )
    return DataLoader(data, batch_sampler=sampler)


def global_mean(loss: torch.Tensor) -> float:
    """Return the mean over all samples of the step. Where ranks train the same samples, all samples count as often."""
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def do_jobs(train: Callable[[Job], dict[str, Any]]) -> None:
    """Do all jobs in order."""
    jobs = [
        Job(TOPOLOGIES[entry["topology"]], Path(entry["result"]), entry["run_dir"], entry["resumes"])
        for entry in json.loads(Path(sys.argv[1]).read_text())
    ]
    start_processes(jobs[0].topology.processes)
    for job in jobs:
        _do(job, train)
    if dist.is_initialized():
        dist.destroy_process_group()


def _do(job: Job, train: Callable[[Job], dict[str, Any]]) -> None:
    """Do a job, and leave behind what it came to. Its failure is its own, unless the ranks cannot meet any more."""
    try:
        found = train(job)
        if _rank() == 0:
            torch.save(found, job.result)
    except Exception as error:
        first = "".join(traceback.format_exception_only(error)).splitlines()[0]
        job.result.with_name(f"{job.result.name}.rank{_rank()}.error").write_text(f"{first}\n{traceback.format_exc()}")
    if dist.is_initialized():
        # One rank may have failed while the others wait for it. Then this raises, and the jobs that are left are begun
        # by new processes.
        dist.monitored_barrier(timeout=PATIENCE)


def _rank() -> int:
    return int(os.environ["RANK"])


def _from_all(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
