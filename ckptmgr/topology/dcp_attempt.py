"""The attempt under which a process saves through DCP.

DCP makes one call for each save, and nobody says which is the last. So the process claims the run at its first save,
and holds the attempt until it ends: a second process that saves into the run takes it over, and this one is told.
"""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import threading
from contextlib import suppress

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError
from ckptmgr.format.layout import CheckpointId, attempt_key
from ckptmgr.format.manifest import AttemptClaim, Continuation, Outcome
from ckptmgr.format.record import encode_record
from ckptmgr.launch.cut_off_fork import refuse_cut_off_fork
from ckptmgr.launch.redact import redact_text, secret_values
from ckptmgr.launch.start_record import describe_start
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, create_marker, read_attempt_record, record_end, record_line
from ckptmgr.storage.protocol import Storage

__all__ = ["HeldRun", "hold_run", "record_failure"]

_MAX_ERROR_LENGTH = 2000


class HeldRun:
    """An attempt that this process has claimed.

    Args:
        storage: The run's root.
        run_id: The run's id.
        claim: The claim.
        continues: The checkpoint after which it goes on.

    Attributes:
        storage: The run's root.
        run_id: The run's id.
        continues: The checkpoint after which it goes on.
    """

    def __init__(self, storage: Storage, run_id: str, claim: AttemptClaim, continues: Continuation | None) -> None:
        self.storage = storage
        self.run_id = run_id
        self.continues = continues
        self._claim = claim
        self._nsaves = 0
        self._step = 0

    def next_save(self, step: int) -> CheckpointId:
        """Return the id of a new checkpoint."""
        checkpoint = CheckpointId(step, self._claim.attempt, self._nsaves)
        self._nsaves += 1
        self._step = step
        return checkpoint

    def is_there(self) -> bool:
        """Say whether the claim is still where it was made: a run may have been removed, and another one made."""
        try:
            return read_attempt_record(self.storage, self._claim.attempt, "claim", AttemptClaim) == self._claim
        except (FileNotFoundError, CorruptCheckpointError):
            return False

    def goes_on_at(self, step: int) -> bool:
        """Say whether a checkpoint of this step continues the attempt.

        It does not if the attempt has ended in a failure, or has saved a later step: then training went back.
        """
        if step < self._step:
            return False
        with suppress(FileNotFoundError):
            self.storage.read(attempt_key(self._claim.attempt, "end"))
            return False
        return True

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Record how the attempt ended, unless that is recorded."""
        with suppress(FileExistsError):
            record_end(self.storage, self._claim.attempt, outcome, step=self._step, error=error)


_held: dict[tuple[int, str], HeldRun] = {}
_lock = threading.Lock()


def hold_run(storage: Storage, run_dir: str, *, step: int) -> HeldRun:
    """Return this process's attempt at a run; claims the run if there is none that goes on at a step.

    A new attempt continues the newest intact checkpoint of the line that is not beyond the step.

    Args:
        storage: The run's root.
        run_dir: The same, as the user named it.
        step: Optimizer updates completed.

    Raises:
        UsageError: The run is a fork that was cut off.
        FormatVersionError: The run was made by a newer format.
        StorageError: The storage failed.
    """
    key = (os.getpid(), storage.url)
    with _lock:
        held = _held.get(key)
        if held is not None:
            # The storage may be another view of the same place.
            held.storage = storage
            if held.is_there():
                if held.goes_on_at(step):
                    return held
                with suppress(CkptmgrError):
                    held.end("finished")
            del _held[key]
        _held[key] = held = _claim(storage, run_dir, step)
        return held


def record_failure(storage: Storage, checkpoint: CheckpointId, error: BaseException, *, rank: int) -> None:
    """Record that an attempt has failed, and on which rank. Whichever rank fails first does it.

    DCP does not tell rank 0's storage that another rank has failed. A storage that fails again is left alone: the error
    that is being raised says more.
    """
    text = redact_text(f"rank {rank}: {type(error).__name__}: {error}", secret_values(os.environ))
    with suppress(FileExistsError, CkptmgrError):
        record_end(storage, checkpoint.attempt, "failed", step=checkpoint.step, error=text[:_MAX_ERROR_LENGTH])


def _claim(storage: Storage, run_dir: str, step: int) -> HeldRun:
    before = Catalog(storage)
    # A line that cannot be followed is found before the run is taken from somebody.
    _ = before.line
    refuse_cut_off_fork(before, run_dir)
    if not before.is_run:
        create_marker(storage, before.run_id or secrets.token_hex(8))
    claim = claim_attempt(storage, before.attempts)
    # Listed again: what was committed before the claim, and only that, can be continued.
    catalog = Catalog(storage)
    storage.write(attempt_key(claim.attempt, "start"), [encode_record(describe_start(run_dir=run_dir))])
    continued = next((manifest for manifest in catalog.newest_first() if manifest.step <= step), None)
    continues = record_line(storage, claim.attempt, continued)
    return HeldRun(storage, catalog.run_id or "", claim, continues)


def _end_all() -> None:
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    for (pid, _), held in _held.items():
        if pid == os.getpid():
            # The process is ending, and so may be what its storage needs.
            with suppress(Exception):
                if not held.is_there():
                    continue
                if error is None:
                    held.end("finished")
                else:
                    text = redact_text(f"{type(error).__name__}: {error}", secret_values(os.environ))
                    held.end("failed", text[:_MAX_ERROR_LENGTH])


atexit.register(_end_all)
