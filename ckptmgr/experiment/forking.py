"""Beginning a run with the checkpoint of another, once it is known to fit what was built."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ckptmgr.loading import LoadedCheckpoint, load_checkpoint
from ckptmgr.run.reference import Reference

__all__ = ["fork_if_it_fits"]

_log = logging.getLogger("ckptmgr")


def fork_if_it_fits(parent: Reference, run_dir: str, *, check: Callable[[LoadedCheckpoint], None]) -> None:
    """Copy a checkpoint into a new run.

    Args:
        parent: The checkpoint.
        run_dir: The new run.
        check: Raises if the checkpoint does not fit. Asked first: a fork that cannot be trained is not made.

    Raises:
        StateMismatchError: What ``check`` raised; nothing was written.
        CheckpointNotFoundError, CorruptCheckpointError: There is nothing (whole) to copy.
        UsageError: The new run's directory is not empty.
    """
    from ckptmgr.fork import fork_run

    loaded = load_checkpoint(parent)
    check(loaded)
    # That very checkpoint, whatever happens to the parent in the meantime.
    chosen = Reference(parent.run_dir, loaded.manifest.checkpoint)
    del loaded
    fork_run(chosen, run_dir)
    _log.info("forked %s at step %d to %s", parent.run_dir, int(chosen.selector.split("-")[0]), run_dir)
