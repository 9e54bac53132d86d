"""The story of a run, attempt by attempt: started, killed, resumed with another learning rate, gone back, finished."""

from __future__ import annotations

from dataclasses import dataclass

from ckptmgr.cli.listing import AttemptSummary
from ckptmgr.format.layout import CheckpointId
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.life import Life

__all__ = ["Chapter", "tell_story"]

_MAX_CHANGES = 4


@dataclass(frozen=True, slots=True)
class Chapter:
    """What one attempt did.

    Attributes:
        number: The attempt.
        began: How it came in, in words.
        changes: What was changed for it, in words.
        ended: How it went out, in words.
        nsaved: How many of its checkpoints are still there.
        last_step: Of the newest of them.
    """

    number: int
    began: str
    changes: tuple[str, ...]
    ended: str
    nsaved: int
    last_step: int | None


def tell_story(catalog: Catalog, attempts: list[AttemptSummary], *, life: Life) -> list[Chapter]:
    """Tell what each attempt of a run did, oldest first.

    Args:
        catalog: The run.
        attempts: Its attempts, oldest first.
        life: How the run is doing.
    """
    newest = attempts[-1].number if attempts else None
    return [
        _chapter(
            catalog,
            attempt,
            is_first=not any(earlier.line for earlier in attempts[:index]),
            life=life if attempt.number == newest else None,
        )
        for index, attempt in enumerate(attempts)
    ]


def _chapter(catalog: Catalog, attempt: AttemptSummary, *, is_first: bool, life: Life | None) -> Chapter:
    own = [checkpoint for checkpoint in catalog.committed if checkpoint.attempt == attempt.number]
    last_step = own[-1].step if own else None
    experiment = attempt.start.experiment if attempt.start else None
    is_fork = attempt.start is not None and attempt.start.fork_of is not None
    # The record of a fork is its parent's: what was changed there is no part of this run's story.
    changes = experiment.changes if experiment and not is_fork else ()
    if len(changes) > _MAX_CHANGES:
        changes = (*changes[:_MAX_CHANGES], f"and {len(changes) - _MAX_CHANGES} more")
    return Chapter(
        number=attempt.number,
        began="forked" if is_fork else _began(catalog, attempt, is_first=is_first),
        changes=changes,
        ended=_ended(attempt, last_step, life),
        nsaved=len(own),
        last_step=last_step,
    )


def _began(catalog: Catalog, attempt: AttemptSummary, *, is_first: bool) -> str:
    if attempt.line is None:
        # Whoever only deletes claims the run, and starts nothing.
        return "pruned" if attempt.start is None and attempt.end is not None else "did not train"
    continues = attempt.line.continues
    if continues is None:
        return "started" if is_first else "started anew"
    try:
        origin = CheckpointId.parse(continues.checkpoint)
    except ValueError:
        return f"resumed at step {continues.step}"
    left_behind = [
        id
        for id in catalog.committed
        if (origin.attempt, origin.step, origin.save) < (id.attempt, id.step, id.save) and id.attempt < attempt.number
    ]
    return f"{'went back to' if left_behind else 'resumed at'} step {continues.step}"


def _ended(attempt: AttemptSummary, last_step: int | None, life: Life | None) -> str:
    if attempt.end is None:
        if life is not None and life.state == "running":
            return "running"
        killed = "killed" if life is None or life.state == "crashed" else "killed, or running elsewhere"
        return killed if last_step is None else f"{killed} after step {last_step} was saved"
    step = "" if attempt.end.step is None else f" at step {attempt.end.step}"
    # The first line says what happened; --json has all of them. An exception without a message leaves its colon.
    error = (attempt.end.error or "").partition("\n")[0].rstrip(": ")
    return f"{attempt.end.outcome}{step}" + (f": {error}" if error else "")
