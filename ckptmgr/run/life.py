"""Whether somebody trains in a run: what its records say, and what the processes of this host say to that.

Only evidence is told apart here. Who may write is decided by claims alone, never by this.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeAlias

from ckptmgr.errors import CorruptCheckpointError, FormatVersionError, RunInUseError
from ckptmgr.format.manifest import AttemptClaim, AttemptEnd
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record

__all__ = ["Host", "Life", "State", "life_of", "refuse_if_in_use", "this_host"]

State: TypeAlias = Literal["running", "finished", "failed", "preempted", "crashed", "unknown"]

# A claim is written seconds after its process has started; clocks are corrected by less than that.
_TOLERANCE_S = 5.0
_NAMELESS = ("", "localhost", "localhost.localdomain")


@dataclass(frozen=True, slots=True)
class Life:
    """How a run is doing.

    Attributes:
        state: ``running``: its process lives on this host. ``crashed``: it was on this host, and ended without a word.
            ``unknown``: it ran on another host, or its records cannot be read.
        attempt: The attempt that tells; None where none does.
        detail: What there is to add, in words; may be empty.
        step: The step at which it ended, where that is recorded.
    """

    state: State
    attempt: int | None = None
    detail: str = ""
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """A host that can be asked about its processes.

    Attributes:
        name: As claims record it.
        started_at: Process number → when it started, in seconds since 1970; None if there is none. Infinitely long ago
            where the system does not tell.
    """

    name: str
    started_at: Callable[[int], float | None]

    def runs(self, claim: AttemptClaim) -> bool | None:
        """Say whether the process that made a claim still lives; None if this host cannot know."""
        if claim.host != self.name or claim.host in _NAMELESS:
            return None
        try:
            claimed_at = datetime.fromisoformat(claim.claimed_at).timestamp()
        except (ValueError, OverflowError):
            return None
        started_at = self.started_at(claim.pid)
        # Numbers are used again: a process that is younger than the claim is not the one that made it.
        return started_at is not None and started_at <= claimed_at + _TOLERANCE_S


def this_host() -> Host:
    """Return the host of this process."""
    return Host(socket.gethostname(), _started_at)


def life_of(catalog: Catalog, host: Host | None = None) -> Life:
    """Tell how a run is doing, from its newest attempt that trained, or may be about to.

    Attempts that only pruned tell nothing.
    """
    host = host or this_host()
    for attempt in sorted(catalog.attempts, reverse=True):
        records = catalog.attempts[attempt]
        trained = bool(records & {"line", "start"})
        try:
            if "end" in records:
                if not trained:
                    continue
                end = read_attempt_record(catalog.storage, attempt, "end", AttemptEnd)
                # The first line says what happened. An exception without a message leaves its colon.
                return Life(end.outcome, attempt, (end.error or "").partition("\n")[0].rstrip(": "), end.step)
            if "claim" not in records:
                return Life("unknown", attempt, "its claim is lost")
            claim = read_attempt_record(catalog.storage, attempt, "claim", AttemptClaim)
        except (CorruptCheckpointError, FormatVersionError, FileNotFoundError) as error:
            return Life("unknown", attempt, str(error).partition("\n")[0])
        who = f"process {claim.pid} on {claim.host}"
        lives = host.runs(claim)
        if lives is None:
            return Life("unknown", attempt, f"running or killed: {who}")
        if lives:
            return Life("running", attempt, who)
        if trained:
            return Life("crashed", attempt, f"{who} is gone")
    return Life("unknown", None, "no start is recorded")


def refuse_if_in_use(catalog: Catalog, host: Host | None = None, *, force: bool = False) -> None:
    """Raise if the process of the newest attempt trains, or may be training.

    Args:
        catalog: The run.
        host: Asked about its processes; this one by default.
        force: The caller knows that a process which cannot be seen from here is gone.

    Raises:
        RunInUseError: Somebody trains there, or may do so.
    """
    newest = max(catalog.attempts, default=None)
    if newest is None or "end" in catalog.attempts[newest]:
        return
    where = catalog.storage.url
    try:
        claim = read_attempt_record(catalog.storage, newest, "claim", AttemptClaim)
    except (CorruptCheckpointError, FileNotFoundError) as error:
        if force:
            return
        raise RunInUseError(
            f"{where} may be in use",
            why=f"who attempt {newest} is cannot be read",
            next="--force if nobody trains in it",
        ) from error
    who = f"process {claim.pid} on {claim.host}, which started at {claim.claimed_at}"
    lives = (host or this_host()).runs(claim)
    if lives:
        raise RunInUseError(
            f"{where} is in use",
            why=f"{who}, is training",
            next="its own retention= deletes while it trains; stop it, or wait until it has ended",
        )
    if lives is None and not force:
        raise RunInUseError(
            f"{where} may be in use",
            why=f"{who}, has recorded no end and cannot be seen from here",
            next="if it does not train any more: --force. It would lose the run to this command otherwise",
        )


def _started_at(pid: int) -> float | None:
    if pid <= 0:
        return None
    try:
        # The name of the program stands in brackets, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        state, ticks = fields[0], int(fields[19])
        # Dead, and only not yet collected by its parent.
        return None if state in "ZX" else int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, IndexError, ValueError):
        return _started_ever(pid)


def _started_ever(pid: int) -> float | None:
    """Where there is no /proc, or nothing of that process in it: only whether it lives."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return float("-inf")
