"""Forks that were cut off: a run directory that holds one is no place to train from nothing."""

from __future__ import annotations

from contextlib import suppress

from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record
from ckptmgr.words import printable_place

__all__ = ["is_started", "refuse_cut_off_fork"]


def refuse_cut_off_fork(catalog: Catalog, run_dir: str) -> None:
    """Raise if a run directory holds nothing but a fork that was cut off: it is not meant to be trained from nothing.

    Raises:
        UsageError: It does.
    """
    if catalog.committed or not catalog.attempts or is_started(catalog):
        return
    if catalog.is_run:
        parent = catalog.marker.parent
        if parent is None:
            return
    else:
        # A listing that ran beside the start of a new run may have missed its marker, but no read does.
        with suppress(FileNotFoundError):
            catalog.storage.read(RUN_MARKER)
            return
        parent = None
    raise UsageError(
        f"{printable_place(run_dir)} holds a fork that was cut off, and no checkpoint",
        why=f"it was to begin with {parent}" if parent else "the process that copied the checkpoint was killed",
        next="fork into it again: that goes on; or remove it, and start from nothing",
    )


def is_started(found: Catalog) -> bool:
    """Return whether a process has started to train in a run: then it is more than a fork that was cut off."""
    for attempt, records in found.attempts.items():
        if "start" in records:
            try:
                if read_attempt_record(found.storage, attempt, "start", StartRecord).fork_of is None:
                    return True
            except (CkptmgrError, FileNotFoundError):
                return True
    return False
