"""Launches training programs with torchrun, and reads what they found."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Failure", "Task", "launch", "launch_all"]

ROOM = Path(__file__).parent
# A launch trains a few dozen steps; most of its time is the import of torch, several times on few cores.
DEADLINE_S = 240.0


@dataclass(frozen=True)
class Failure:
    """What became of a training that did not come to its end.

    Attributes:
        first_line: Of the error, with its class.
        report: Where it happened.
    """

    first_line: str
    report: str


@dataclass(frozen=True)
class Task:
    """A job, as `jobs.py` reads it."""

    topology: str
    result: Path
    run_dir: Path | None
    resumes: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return it as the program reads it."""
        run_dir = None if self.run_dir is None else str(self.run_dir)
        return {"topology": self.topology, "result": str(self.result), "run_dir": run_dir, "resumes": self.resumes}

    def found(self) -> dict[str, Any] | Failure | None:
        """Return what it found; None if it is not over."""
        errors = sorted(self.result.parent.glob(f"{self.result.name}.rank*.error"))
        if errors:
            first_line, _, rest = errors[0].read_text().partition("\n")
            names = ", ".join(path.name.removesuffix(".error").rpartition(".")[2] for path in errors)
            return Failure(first_line, f"failed on {names}\n{rest}")
        if self.result.exists():
            found: dict[str, Any] = torch.load(self.result, weights_only=True)
            return found
        return None


def launch_all(script: str, tasks: Sequence[Task], *, processes: int) -> dict[Task, dict[str, Any] | Failure]:
    """Do all tasks with one launch; where a task takes its launch with it, with another one for those after it.

    Args:
        script: Name of the program.
        tasks: All for as many processes.
        processes: How many.
    """
    found: dict[Task, dict[str, Any] | Failure] = {}
    for number in itertools.count():
        left = [task for task in tasks if task not in found]
        if not left:
            return found
        jobs = left[0].result.with_name(f"{left[0].result.name}.launch{number}.json")
        jobs.write_text(json.dumps([task.as_json() for task in left]))
        code, log = launch(script, str(jobs), processes=processes)
        for task in left:
            outcome = task.found()
            if outcome is None:
                found[task] = Failure(f"the launch ended with code {code} in the middle of it", log)
                break
            found[task] = outcome
    raise AssertionError("unreachable")


def launch(script: str, *arguments: str, processes: int) -> tuple[int | None, str]:
    """Start a program under torchrun and wait until it has ended; return its exit code and what it wrote."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # nn.DataParallel would take any GPU that it sees, and the others train on the CPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, str(ROOM / script), *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            log, _ = process.communicate(timeout=DEADLINE_S)
            return process.returncode, log
        except subprocess.TimeoutExpired:
            # Torchrun ends its processes when it is told to end; killed at once, it would leave them behind.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                log, _ = process.communicate(timeout=60)
                return None, f"not done after {DEADLINE_S:g} s\n{log}"
            process.kill()
            return None, f"not done after {DEADLINE_S:g} s, and did not end when it was told to"
