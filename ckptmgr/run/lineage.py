"""Attempts and the line that they form: which checkpoints belong to the run as it is now.

Every process start claims the next attempt number by an exclusive create, and then records which checkpoint it
continues. A checkpoint is on the run's line if the newest attempt wrote it, or an ancestor of that attempt did, not
beyond the point where the line branched off. So going back to an older step, a fork, and a paused process that wakes
up too late are one mechanism, and no clock is ever asked.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ckptmgr.errors import CorruptCheckpointError, Fenced
from ckptmgr.format.layout import RUN_MARKER, CheckpointId, attempt_key
from ckptmgr.format.manifest import AttemptClaim, AttemptEnd, AttemptLine, Continuation, Manifest, Outcome, RunMarker
from ckptmgr.format.record import FORMAT_VERSION, decode_record, encode_record
from ckptmgr.run.clock import utc_now
from ckptmgr.storage.protocol import Storage

__all__ = [
    "Line",
    "claim_attempt",
    "create_marker",
    "read_attempt_record",
    "read_line",
    "record_end",
    "record_line",
    "refuse_if_fenced",
    "trace_line",
]

T = TypeVar("T", bound=msgspec.Struct)


def create_marker(storage: Storage, run_id: str) -> None:
    """Make a location a run, unless another process has done so at the same moment."""
    marker = RunMarker(version=FORMAT_VERSION, run_id=run_id, created_at=utc_now())
    with suppress(FileExistsError):
        storage.write(RUN_MARKER, [encode_record(marker)], exclusive=True)


def claim_attempt(storage: Storage, taken: Collection[int], *, is_patient: bool = True) -> AttemptClaim:
    """Become the run's newest attempt.

    Args:
        storage: The run's root.
        taken: Attempt numbers that a listing showed.
        is_patient: Try the next number if this one is taken. False: whoever has just come must not be fenced.

    Raises:
        FileExistsError: Not patient, and somebody was faster.
    """
    number = max(taken, default=0) + 1
    while True:
        claim = AttemptClaim(
            version=FORMAT_VERSION,
            attempt=number,
            nonce=secrets.token_hex(8),
            claimed_at=utc_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        try:
            storage.write(attempt_key(number, "claim"), [encode_record(claim)], exclusive=True)
        except FileExistsError:
            if not is_patient:
                raise
            # Numbers stay without gaps: the fence asks for the next number only.
            number += 1
        else:
            return claim


def refuse_if_fenced(storage: Storage, attempt: int) -> None:
    """Raise if a newer attempt has claimed the run.

    Raises:
        Fenced: It has. Names its host and process where the claim can be read.
    """
    key = attempt_key(attempt + 1, "claim")
    try:
        data = storage.read(key)
    except FileNotFoundError:
        return
    try:
        claim = decode_record(data, AttemptClaim, where=key)
        who = f"process {claim.pid} on {claim.host}, which started at {claim.claimed_at}"
    except CorruptCheckpointError:
        who = "a process whose claim is unreadable"
    raise Fenced(
        f"attempt {attempt} of {storage.url} no longer owns the run",
        why=f"attempt {attempt + 1} took it over: {who}",
        next="let the newer process go on, or stop it and start this one again",
    )


def record_line(storage: Storage, attempt: int, continues: Manifest | None) -> Continuation | None:
    """Record once what this attempt continues, and return it."""
    continuation = None
    if continues is not None:
        continuation = Continuation(checkpoint=continues.checkpoint, attempt=continues.attempt, step=continues.step)
    line = AttemptLine(version=FORMAT_VERSION, attempt=attempt, continues=continuation, recorded_at=utc_now())
    storage.write(attempt_key(attempt, "line"), [encode_record(line)], exclusive=True)
    return continuation


def record_end(storage: Storage, attempt: int, outcome: Outcome, *, step: int | None, error: str | None = None) -> None:
    """Record once how this attempt ended."""
    end = AttemptEnd(
        version=FORMAT_VERSION, attempt=attempt, outcome=outcome, step=step, ended_at=utc_now(), error=error
    )
    storage.write(attempt_key(attempt, "end"), [encode_record(end)], exclusive=True)


def read_attempt_record(storage: Storage, attempt: int, name: str, kind: type[T]) -> T:
    """Read one of an attempt's records.

    Raises:
        FileNotFoundError: The attempt has none of that name.
        CorruptCheckpointError, FormatVersionError: It cannot be read.
    """
    key = attempt_key(attempt, name)
    return decode_record(storage.read(key), kind, where=key)


def read_line(storage: Storage, attempt: int) -> AttemptLine:
    """Read what an attempt continues."""
    return read_attempt_record(storage, attempt, "line", AttemptLine)


@dataclass(frozen=True, slots=True)
class Line:
    """The attempts of one line, from its head back to its start, and how far each one counts.

    Attributes:
        head: The newest attempt on it; None for a run without any.
        limits: Attempt → the last checkpoint of it that counts; None where all of them do.
        links: Attempt → what it continues.
    """

    head: int | None
    limits: dict[int, CheckpointId | None]
    links: dict[int, Continuation | None]

    def holds(self, checkpoint: CheckpointId) -> bool:
        """Return whether a checkpoint of that id is on the line."""
        if checkpoint.attempt not in self.limits:
            return False
        limit = self.limits[checkpoint.attempt]
        return limit is None or (checkpoint.step, checkpoint.save) <= (limit.step, limit.save)


def trace_line(head: int | None, read: Callable[[int], Continuation | None]) -> Line:
    """Follow the records from an attempt back to the start of its line.

    Args:
        head: The newest attempt that recorded its line; None if none did.
        read: Returns what an attempt continues.

    Raises:
        CorruptCheckpointError: The records contradict each other, or one of them is missing.
    """
    limits: dict[int, CheckpointId | None] = {}
    links: dict[int, Continuation | None] = {}
    attempt, limit = head, None
    while attempt is not None:
        limits[attempt] = limit
        try:
            link = read(attempt)
        except FileNotFoundError as error:
            raise _broken(attempt, "its record is missing") from error
        links[attempt] = link
        if link is None:
            break
        try:
            limit = CheckpointId.parse(link.checkpoint)
        except ValueError as error:
            raise _broken(attempt, str(error)) from error
        # Each step goes to an older attempt, so a forged cycle ends here.
        if link.attempt >= attempt or limit.attempt != link.attempt:
            raise _broken(attempt, f"it claims to continue {link.checkpoint}, which is not older")
        attempt = link.attempt
    return Line(head, limits, links)


def _broken(attempt: int, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the line of attempts is broken at attempt {attempt}",
        why=why,
        next="name the checkpoint to resume from by its id; `ckptmgr ls` lists them",
    )
