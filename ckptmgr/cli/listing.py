"""What a run holds, gathered for printing: damaged parts are described, not raised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from ckptmgr.errors import CkptmgrError
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import AttemptClaim, AttemptEnd, AttemptLine, Manifest, MetricValue, metric_to_value
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record

__all__ = ["AttemptSummary", "CheckpointSummary", "Listing", "explain", "list_run", "read_attempts"]

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """One committed checkpoint, or the reason why its manifest cannot be read."""

    id: str
    step: int
    attempt: int
    is_on_line: bool | None
    problem: str | None
    is_latest: bool = False
    best_of: str | None = None
    epoch: int | None = None
    created_at: str | None = None
    nbytes: int | None = None
    reason: str | None = None
    world_size: int | None = None
    metrics: dict[str, MetricValue] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """All checkpoints of a run, oldest first.

    Attributes:
        run_id: None where the run's own record cannot be read.
        torn: Ids of saves that were cut off, or are under way.
        problem: Why the line, and so the latest checkpoint, is not known; None where it is.
    """

    run_id: str | None
    checkpoints: list[CheckpointSummary]
    torn: list[str]
    problem: str | None


@dataclass(frozen=True, slots=True)
class AttemptSummary:
    """One process start: whichever of its records are there and readable."""

    number: int
    claim: AttemptClaim | None
    line: AttemptLine | None
    start: StartRecord | None
    end: AttemptEnd | None
    problems: tuple[CkptmgrError, ...]


def explain(error: CkptmgrError) -> str:
    """Return an error in one line, without what to do."""
    return f"{error.what}: {error.why}" if error.why else error.what


def list_run(catalog: Catalog) -> Listing:
    """Describe every checkpoint of a run."""
    problem = None
    try:
        on_line = set(catalog.on_line)
    except CkptmgrError as error:
        # Without the line nothing is latest, but what is there can still be listed and named by id.
        on_line, problem = None, explain(error)
    latest = best = None
    if on_line is not None:
        latest = next(catalog.newest_first(), None)
        best = _best(catalog)
    summaries = []
    for id in catalog.committed:
        is_on_line = None if on_line is None else id in on_line
        summary = _summary(catalog, id, is_on_line, latest, best)
        summaries.append(summary)
    try:
        run_id = catalog.run_id
    except CkptmgrError:
        run_id = None
    return Listing(run_id, summaries, [str(id) for id in catalog.torn], problem)


def read_attempts(catalog: Catalog) -> list[AttemptSummary]:
    """Read what is recorded of each attempt, oldest first."""
    return [_attempt(catalog, number) for number in sorted(catalog.attempts)]


def _best(catalog: Catalog) -> Manifest | None:
    try:
        return catalog.best()
    except CkptmgrError:
        return None


def _summary(
    catalog: Catalog, id: CheckpointId, is_on_line: bool | None, latest: Manifest | None, best: Manifest | None
) -> CheckpointSummary:
    problem = catalog.why_not_intact(id)
    try:
        manifest = catalog.manifest(id)
        facts = catalog.facts(id)
    except CkptmgrError:
        return CheckpointSummary(str(id), id.step, id.attempt, is_on_line, problem or "its manifest cannot be read")
    return CheckpointSummary(
        id=str(id),
        step=id.step,
        attempt=id.attempt,
        is_on_line=is_on_line,
        problem=problem,
        is_latest=latest is not None and manifest.checkpoint == latest.checkpoint,
        best_of=(best.monitor or "?") if best is not None and manifest.checkpoint == best.checkpoint else None,
        epoch=manifest.epoch,
        created_at=manifest.created_at,
        nbytes=manifest.nbytes,
        reason=manifest.reason,
        world_size=manifest.topology.world_size,
        metrics={name: metric_to_value(value) for name, value in facts.metrics.items()},
        tags=tuple(sorted(facts.tags)),
    )


def _attempt(catalog: Catalog, number: int) -> AttemptSummary:
    problems: list[CkptmgrError] = []

    def read(name: str, kind: type[T]) -> T | None:
        if name not in catalog.attempts[number]:
            return None
        try:
            return read_attempt_record(catalog.storage, number, name, kind)
        except FileNotFoundError:
            return None
        except CkptmgrError as error:
            problems.append(error)
            return None

    return AttemptSummary(
        number=number,
        claim=read("claim", AttemptClaim),
        line=read("line", AttemptLine),
        start=read("start", StartRecord),
        end=read("end", AttemptEnd),
        problems=tuple(problems),
    )
