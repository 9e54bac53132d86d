"""The matrix: saves on every topology, resumes on every topology, each launched when the first test asks for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import TOLERANCE, Cell, judge
from launches import Failure, Task, launch_all
from table import RECORD
from topologies import TOPOLOGIES

__all__ = ["NOT_WHOLE", "WRITES", "Matrix", "differing_cells", "write_record"]

WRITES = "CKPTMGR_WRITE_MATRIX"
"""The environment variable with which what this session finds becomes the record."""


NOT_WHOLE = "only some of the matrix was run"


class Matrix:
    """Saves and resumes of one face, on some topologies.

    Args:
        script: The training program.
        names: The topologies.
        folder: For runs and results.
    """

    def __init__(self, script: str, names: Sequence[str], folder: Path) -> None:
        self._script = script
        self.names = tuple(names)
        self._folder = folder
        self.saved = cache(self._saved)
        self._saves = cache(self._save_with)
        self._resumes = cache(self._resume_with)
        self.cells: dict[tuple[str, str], Cell] = {}

    def cell(self, saved: str, resumed: str) -> Cell:
        """Return what became of a save on one topology that was resumed on another."""
        key = (saved, resumed)
        if key not in self.cells:
            self.cells[key] = judge(self.saved(saved), self._resumed(saved, resumed), is_same=saved == resumed)
        return self.cells[key]

    @property
    def is_complete(self) -> bool:
        """Whether every cell is known."""
        return len(self.cells) == len(self.names) ** 2

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Return the outcomes of all cells, as plain values: by topology of the save, and of the resume."""
        rows: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for (saved, resumed), cell in sorted(
            self.cells.items(), key=lambda item: tuple(map(self.names.index, item[0]))
        ):
            outcome: dict[str, Any] = {"is_well": not cell.problems, "loss_difference": cell.loss_difference}
            rows[saved][resumed] = outcome | ({"problem": cell.problems[0]} if cell.problems else {})
        return rows

    def _saved(self, name: str) -> dict[str, Any] | Failure:
        """Return what the run on this topology found, which saves and is not interrupted."""
        return self._saves(TOPOLOGIES[name].processes)[name]

    def _resumed(self, saved: str, resumed: str) -> dict[str, Any] | Failure:
        return self._resumes(TOPOLOGIES[resumed].processes)[saved, resumed]

    def _save_with(self, processes: int) -> dict[str, dict[str, Any] | Failure]:
        tasks = [Task(name, self._folder / f"save-{name}", self._run_dir(name)) for name in self._with(processes)]
        found = launch_all(self._script, tasks, processes=processes)
        return {task.topology: outcome for task, outcome in found.items()}

    def _resume_with(self, processes: int) -> dict[tuple[str, str], dict[str, Any] | Failure]:
        """Resume every save on every topology of so many processes: importing torch takes longer than all of them."""
        tasks: dict[Task, str] = {}
        found: dict[tuple[str, str], dict[str, Any] | Failure] = {}
        for saved in self.names:
            for resumed in self._with(processes):
                outcome = self.saved(saved)
                if isinstance(outcome, Failure):
                    found[saved, resumed] = outcome
                    continue
                run_dir = self._folder / f"run-{saved}-on-{resumed}"
                shutil.copytree(self._run_dir(saved), run_dir)
                tasks[Task(resumed, self._folder / f"resume-{saved}-on-{resumed}", run_dir, resumes=True)] = saved
        for task, outcome in launch_all(self._script, list(tasks), processes=processes).items():
            found[tasks[task], task.topology] = outcome
        return found

    def _with(self, processes: int) -> list[str]:
        return [name for name in self.names if TOPOLOGIES[name].processes == processes]

    def _run_dir(self, name: str) -> Path:
        return self._folder / f"run-{name}"


def write_record(face: str, matrix: Matrix, versions: dict[str, str], *, notes: Sequence[str] = ()) -> None:
    """Put a face's outcomes into the record, if this session was asked to.

    Args:
        face: ``plain`` or ``lightning``.
        matrix: What was found.
        versions: Of the libraries that it depends on besides torch.
        notes: What the table cannot show.
    """
    if WRITES not in os.environ or not matrix.is_complete:
        return
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[face] = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, **versions},
        "tolerance": TOLERANCE,
        "notes": list(notes),
        "cells": matrix.outcomes(),
    }
    RECORD.write_text(json.dumps(dict(sorted(record.items(), reverse=True)), indent=1) + "\n")


def differing_cells(face: str, matrix: Matrix) -> list[str]:
    """Return the cells that are well in the record and not in this session, or the other way round."""
    recorded, found = json.loads(RECORD.read_text())[face]["cells"], matrix.outcomes()
    assert list(recorded) == list(found)
    pairs = [(saved, resumed) for saved in found for resumed in found]
    return [f"{a} -> {b}" for a, b in pairs if recorded[a][b]["is_well"] != found[a][b]["is_well"]]
