"""Arguments of Lightning's ModelCheckpoint, as this manager understands them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ckptmgr.errors import UsageError

__all__ = ["refuse_shared_run", "warn_of_unused"]

_log = logging.getLogger("ckptmgr")

# Accepted so that replacing ModelCheckpoint is one word; with why they do nothing.
_UNUSED = {
    "filename": "checkpoints are named by step, and found by reference",
    "save_last": "the newest checkpoint is always known as @latest",
    "verbose": "saves are logged by the logger 'ckptmgr'",
    "auto_insert_metric_name": "checkpoints are named by step",
    "save_on_train_epoch_end": "an epoch's checkpoint is taken before validation, and its metrics are added after it",
    "enable_version_counter": "nothing is ever overwritten",
}

_NAMES_IN_CHECKPOINTER = {"every_n_steps": "every_n_train_steps", "time_interval": "train_time_interval"}


def warn_of_unused(run_dir: str | os.PathLike[str] | None, others: Mapping[str, Any]) -> str | os.PathLike[str] | None:
    """Return the run directory, which ModelCheckpoint calls ``dirpath``; warn of arguments that do nothing.

    Raises:
        TypeError: An argument that ModelCheckpoint has not got either.
    """
    others = dict(others)
    dirpath = others.pop("dirpath", None)
    if unknown := sorted(others.keys() - _UNUSED.keys()):
        meant = _NAMES_IN_CHECKPOINTER.get(unknown[0])
        hint = f": with Lightning it is called {meant!r}" if meant else ""
        raise TypeError(f"CheckpointManager() got an unexpected keyword argument {unknown[0]!r}{hint}")
    if dirpath is not None and run_dir is not None:
        raise UsageError(
            f"both run_dir={str(run_dir)!r} and dirpath={str(dirpath)!r} were given",
            why="dirpath is ModelCheckpoint's name for run_dir",
            next="give one of them",
        )
    for name, why in _UNUSED.items():
        # What was left at its neutral value asks for nothing.
        if name in others and others[name] not in (None, False):
            _log.warning("%s=%r does nothing in CheckpointManager: %s", name, others[name], why)
    return dirpath if run_dir is None else run_dir


def refuse_shared_run(run_dir: str, run_dirs: Sequence[str | None]) -> None:
    """Refuse two managers of one Trainer that save into one run.

    Args:
        run_dir: That of one manager.
        run_dirs: Those of all of them, None where it is not settled yet.

    Raises:
        UsageError: The run is that of two of them.
    """
    if list(run_dirs).count(run_dir) > 1:
        raise UsageError(
            f"two CheckpointManagers of one Trainer save into {run_dir}",
            why="a run has one writer",
            next="give each its own run directory, or join their triggers in one manager",
        )
