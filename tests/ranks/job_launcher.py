"""Starts the ranks of a job as plain processes, without a launcher that ends the others when one of them dies."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import Ended, Forge

__all__ = ["Launcher", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What became of one rank.

    Attributes:
        rank: Its number.
        exit_code: Negative for a signal.
        log: What it wrote to stdout and stderr.
        notes: What it noted down, in order.
    """

    rank: int
    exit_code: int
    log: str
    notes: list[dict[str, Any]]

    def noted(self, key: str) -> list[Any]:
        """Return all that it noted under a key, in order."""
        return [note[key] for note in self.notes if key in note]

    def error(self) -> dict[str, Any]:
        """Return its only error."""
        (error,) = self.noted("error")
        return dict(error)


class Launcher:
    """Starts jobs, one after the other.

    Args:
        forge: Forks the ranks.
        folder: For what they write, but for the runs.
    """

    def __init__(self, forge: Forge, folder: Path) -> None:
        self._forge = forge
        self._folder = folder
        self._numbers = itertools.count()

    def __call__(self, scenario: str, *, world_size: int, stopped: int | None = None, **fields: Any) -> list[Outcome]:
        """Run a scenario of `rank_program`, and wait until all ranks have ended.

        Args:
            scenario: Its name.
            world_size: Number of ranks.
            stopped: A rank that will be stopped; it is killed once all others have ended.
            fields: What else the scenario takes.
        """
        folder = self._folder / f"launch-{next(self._numbers)}"
        folder.mkdir()

        def run(rank: int) -> Ended:
            job = {"scenario": scenario, "rank": rank, "world_size": world_size, "folder": str(folder), **fields}
            return self._forge.run("rank_program", job, log=folder / f"rank-{rank}.log")

        with ThreadPoolExecutor(world_size) as pool:
            running = {rank: pool.submit(run, rank) for rank in range(world_size)}
            try:
                ended = {rank: future.result() for rank, future in running.items() if rank != stopped}
            finally:
                if stopped is not None:
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        os.kill(int((folder / f"rank-{stopped}.stopped").read_text()), signal.SIGKILL)
            if stopped is not None:
                ended[stopped] = running[stopped].result()
        return [
            Outcome(rank, ended[rank].exit_code, ended[rank].log, _notes(folder / f"rank-{rank}.jsonl"))
            for rank in range(world_size)
        ]


def _notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
