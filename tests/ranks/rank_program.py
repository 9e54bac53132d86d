"""What one rank does in each scenario: trains a small model, meets a fault, and notes down what it saw."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from xxhash import xxh3_64_hexdigest

from ckptmgr import Checkpointer, training_run
from ckptmgr.errors import CkptmgrError, Preempted, StorageError
from ckptmgr.golden.samples import Golden
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.faulty import FaultyStorage


class Counter:
    """Something else than a dict."""

    def state_dict(self) -> dict[str, int]:
        return {"count": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("it was to be refused")


class Rank:
    """One rank of a job.

    Args:
        job: The fields of the launch.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.number: int = job["rank"]
        self.step = 0
        self._folder = Path(job["folder"])
        self.fault: dict[str, Any] | None = None
        self.model, self.module = self._build(job.get("kind", "ddp"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def note(self, **fields: Any) -> None:
        """Write something down, so that it survives what comes next."""
        with (self._folder / f"rank-{self.number}.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **fields}) + "\n")

    def checkpointer(self, **options: Any) -> Checkpointer:
        """Return a checkpointer for this rank's state."""
        state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "own": {
                "rank": self.number,
                "noise": torch.randn(300),
                **self.job.get("own", {}).get(str(self.number), {}),
            },
        }
        if self.number == self.job.get("counts"):
            state["own"] = Counter()
        golden = self.job.get("golden")
        fields = {
            "keep_last": 100,
            "ranks_timeout": self.job.get("timeout_s", 30),
            "golden": Golden(golden, predict=self._predict) if "cannot_predict" in self.job else golden,
        } | options
        return Checkpointer(self.job["run_dir"], state, **fields)

    def _predict(self, model: nn.Module, inputs: torch.Tensor) -> Any:
        if self.step == 2 and self.number == self.job.get("cannot_predict"):
            raise RuntimeError("out of something")
        return model(inputs)

    def train(self) -> None:
        """Make a step."""
        generator = torch.Generator().manual_seed(1000 * self.step + self.number)
        loss = self.model(torch.randn(4, 8, generator=generator)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def weights(self) -> str:
        """Return a digest of this rank's parameters and moments."""
        tensors = [*self.module.parameters()]
        for slots in self.optimizer.state.values():
            tensors += [value for value in slots.values() if isinstance(value, torch.Tensor)]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return xxh3_64_hexdigest(b"".join(t.detach().contiguous().numpy().tobytes() for t in local))

    def buffers(self) -> dict[str, list[float]]:
        """Return the floating point buffers."""
        return {name: buffer.tolist() for name, buffer in self.module.named_buffers() if buffer.is_floating_point()}

    def draws(self) -> list[float]:
        """Return a number of each global generator, which moves it on."""
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Note down an error, and go on."""
        try:
            yield
        except Exception as error:
            self.note(error=_described(error))

    def _build(self, kind: str) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        width = self.job.get("widths", {}).get(str(self.number), 16)
        norm = [nn.BatchNorm1d(width)] if self.job.get("has_buffers") else []
        module = nn.Sequential(nn.Linear(8, width), *norm, nn.Linear(width, 64), nn.Linear(64, 1))
        torch.manual_seed(100 + self.number)
        np.random.seed(100 + self.number)
        random.seed(100 + self.number)
        if kind == "ddp":
            with warnings.catch_warnings():
                # The argument gets another name some day.
                warnings.simplefilter("ignore", FutureWarning)
                broadcasts = self.job.get("broadcast_buffers", True)
                return DistributedDataParallel(module, broadcast_buffers=broadcasts), module
        if kind == "fsdp2":
            for layer in module:
                fully_shard(layer)
            fully_shard(module)
        return module, module

    def on_point(self, point: str) -> None:
        """Do mischief, if this is its place and its rank."""
        fault = self.fault
        if fault is None or fault["rank"] != self.number or not point.endswith(fault["point"]):
            return
        if f"/{self.step:010d}-" not in point or ("manifest" in point) != ("manifest" in fault["point"]):
            return
        match fault["kind"]:
            case "storage error":
                raise StorageError(f"cannot write at {point}", why="the cable is out", next="plug it in")
            case "disk full":
                cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise StorageError(f"cannot write at {point}", why=cause.strerror) from cause
            case "bug":
                raise ZeroDivisionError("a defect")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                (self._folder / f"rank-{self.number}.stopped").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)


def saves_with_faults(rank: Rank) -> None:
    """Save at each step; at some of them a rank fails. Each failure is caught, and training goes on."""
    faults = {int(step): fault for step, fault in rank.job["faults"].items()}
    with rank.checkpointer() as checkpointer:
        checkpointer.resume()
        for _ in range(rank.job["steps"]):
            rank.train()
            rank.fault = faults.get(rank.step)
            with rank.told():
                checkpointer.step(rank.step)
                checkpointer.save()
                checkpointer.wait()
                rank.note(saved=rank.weights())
    rank.note(end="finished")


def loses_a_rank(rank: Rank) -> None:
    """Save; in the next save a rank is lost. The others learn of it, and a further save fails as well."""
    checkpointer = rank.checkpointer()
    with checkpointer:
        checkpointer.resume()
        rank.train()
        checkpointer.step(rank.step)
        checkpointer.save()
        checkpointer.wait()
        rank.note(saved=rank.weights())
        rank.train()
        rank.fault = rank.job["fault"]
        checkpointer.step(rank.step)
        checkpointer.save()
        with rank.told():
            checkpointer.wait()
        checkpointer.save()


def is_told_to_stop(rank: Rank) -> None:
    """Train until somebody is told to stop: one rank sends itself the signal."""
    with rank.checkpointer(save_on_signal=True) as checkpointer:
        checkpointer.resume()
        try:
            while rank.step < 3000:
                rank.train()
                if rank.step == 40 and rank.number == rank.job["victim"]:
                    os.kill(os.getpid(), signal.SIGTERM)
                checkpointer.step(rank.step)
        except Preempted:
            rank.note(preempted=rank.step)
            raise


def ends_early(rank: Rank) -> None:
    """Train; one rank's data is over sooner."""
    with rank.checkpointer() as checkpointer:
        checkpointer.resume()
        for _ in range(4 if rank.number == rank.job["victim"] else 6):
            rank.train()
            checkpointer.step(rank.step)


def resumes(rank: Rank) -> None:
    """Resume several runs, one after the other, and note down what came back."""
    for run_dir in rank.job["run_dirs"]:
        rank.job["run_dir"] = run_dir
        rank.step = 0
        rank.model, rank.module = rank._build(rank.job.get("kind", "ddp"))
        # Not what was saved: it has to come from the checkpoint.
        with torch.no_grad():
            for parameter in rank.module.parameters():
                parameter.fill_(0.5)
        rank.optimizer = torch.optim.AdamW(rank.model.parameters(), lr=0.01)
        before = rank.weights()
        with rank.told(), rank.checkpointer() as checkpointer:
            try:
                rank.note(resumed=checkpointer.resume(), weights=rank.weights(), buffers=rank.buffers())
                rank.note(draws=rank.draws())
            except CkptmgrError:
                rank.note(untouched=rank.weights() == before)
                raise
        dist.barrier()


def fills_the_disk(rank: Rank) -> None:
    """Save at each of three steps; at the second the disk is full, and afterwards there is room again."""
    ballast = Path(rank.job["run_dir"]).parent / "ballast"
    with rank.checkpointer() as checkpointer:
        checkpointer.resume()
        for _ in range(3):
            rank.train()
            if rank.step == 2 and rank.number == 0:
                with ballast.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(1024))
            dist.barrier()
            with rank.told():
                checkpointer.step(rank.step)
                checkpointer.save()
                checkpointer.wait()
                rank.note(saved=rank.weights())
            dist.barrier()
            if rank.number == 0:
                ballast.unlink(missing_ok=True)


def trains(rank: Rank) -> None:
    """Train and save at each step, and note down what a resume has to bring back."""
    with rank.checkpointer(on_divergence=rank.job.get("on_divergence", "warn")) as checkpointer:
        checkpointer.resume()
        for _ in range(rank.job["steps"]):
            rank.train()
            if rank.number == rank.job.get("perturbed") and rank.step == 2:
                with torch.no_grad():
                    next(rank.module.parameters())[0, 0] += 1
            with rank.told():
                checkpointer.step(rank.step)
                checkpointer.save()
                checkpointer.wait()
                rank.note(saved=rank.weights(), buffers=rank.buffers())
                if rank.step == rank.job["steps"]:
                    rank.note(draws=rank.draws())


SCENARIOS: dict[str, Callable[[Rank], None]] = {
    scenario.__name__: scenario
    for scenario in (saves_with_faults, loses_a_rank, is_told_to_stop, ends_early, resumes, fills_the_disk, trains)
}


def main(job: dict[str, Any]) -> None:
    """Be one rank of a job."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.environ |= {"RANK": str(job["rank"]), "WORLD_SIZE": str(job["world_size"]), "MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{job['folder']}/store", rank=job["rank"], world_size=job["world_size"]
    )
    rank = Rank(job)

    def open_faulty(run_dir: str, **options: Any) -> Storage:
        return FaultyStorage(open_storage(run_dir, **options), on_point=lambda _, point: rank.on_point(point))

    training_run.open_storage = open_faulty  # type: ignore[attr-defined]
    try:
        SCENARIOS[job["scenario"]](rank)
    except Exception as error:
        rank.note(ended=_described(error))
        raise
    dist.destroy_process_group()


def _described(error: BaseException) -> dict[str, Any]:
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__
    return {"classes": causes, "text": str(error)}
