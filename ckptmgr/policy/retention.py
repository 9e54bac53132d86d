"""What to keep: pure functions from the checkpoints of a line to a reason for each one that stays.

After restic's snapshot policy: whatever nobody gives a reason for may go, and every decision can be explained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ckptmgr.errors import UsageError
from ckptmgr.policy.arguments import Mode, check_metric, check_mode, whole_number

__all__ = [
    "CheckpointFacts",
    "KeepAll",
    "KeepBest",
    "KeepEverySteps",
    "KeepLast",
    "KeepTagged",
    "RetentionPlan",
    "RetentionPolicy",
    "Union",
    "best",
    "plan",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """What retention may know about a committed checkpoint.

    Attributes:
        id: Its unique name. Of two checkpoints at one step, the later one has the name that sorts later.
        step: Optimizer updates completed.
        epoch: Index of its epoch, or None.
        metrics: Values by name, late ones included. A value may be NaN.
        tags: Its pins.
    """

    id: str
    step: int
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()


@runtime_checkable
class RetentionPolicy(Protocol):
    """Gives reasons to keep checkpoints."""

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> Mapping[str, Sequence[str]]:
        """Return the reasons, by id, for those to keep. What is absent, or has no reason, may go.

        Args:
            checkpoints: All intact checkpoints of one line, in any order.
        """
        ...


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """The decision about each checkpoint.

    Attributes:
        keep: Reasons by id, oldest first.
        drop: Ids that nothing speaks for, oldest first.
    """

    keep: dict[str, tuple[str, ...]]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest ``k``. Of several saves of one step (before and after its validation) the last one counts."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number(self.k, of="KeepLast(k)", unit="checkpoints"))

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        last_of_step = {facts.step: facts.id for facts in _oldest_first(checkpoints)}
        return dict.fromkeys(list(last_of_step.values())[-self.k :], (f"last {self.k}",))


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the ``k`` best by a metric; of equals the newer. One without a value, or with NaN, is never among them."""

    k: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number(self.k, of="KeepBest(k)", unit="checkpoints"))
        check_metric(self.metric, of="KeepBest(metric)")
        check_mode(self.mode, of="KeepBest(mode)")

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        ranked = _best_first(checkpoints, self.metric, self.mode)[: self.k]
        return {facts.id: (f"{_nth_best(rank)} {self.metric}",) for rank, facts in enumerate(ranked, start=1)}


@dataclass(frozen=True, slots=True)
class KeepEverySteps:
    """Keep, forever, the first checkpoint at or after each multiple of ``n`` steps.

    The first, so that what it keeps once it keeps for good. At or after, so that a save interval that is not in step
    with ``n`` still leaves one checkpoint per ``n`` steps.
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, of="KeepEverySteps(n)", unit="steps"))

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        first: dict[int, CheckpointFacts] = {}
        for facts in _oldest_first(checkpoints):
            multiple = facts.step // self.n
            if multiple:
                first.setdefault(multiple, facts)
        return {facts.id: (f"every {self.n} steps",) for facts in first.values()}


@dataclass(frozen=True, slots=True)
class KeepTagged:
    """Keep what is pinned: every checkpoint with a tag."""

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        return {
            facts.id: tuple(f"tagged {tag}" for tag in sorted(facts.tags))
            for facts in _oldest_first(checkpoints)
            if facts.tags
        }


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep everything."""

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        return {facts.id: ("all are kept",) for facts in _oldest_first(checkpoints)}


@dataclass(frozen=True, slots=True, init=False)
class Union:
    """Keep what any of several policies keeps, with the reasons of all of them."""

    policies: tuple[RetentionPolicy, ...]

    def __init__(self, *policies: RetentionPolicy) -> None:
        for policy in policies:
            # A class has the method too, but not bound: KeepAll instead of KeepAll() is an easy slip.
            if isinstance(policy, type) or not isinstance(policy, RetentionPolicy):
                raise UsageError(
                    f"Union was given {policy!r}",
                    why="it is not a retention policy: that is an object with a method reasons_to_keep(checkpoints)",
                    next="give policies one by one, such as Union(KeepLast(3), KeepTagged())",
                )
        object.__setattr__(self, "policies", policies)

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        reasons: dict[str, tuple[str, ...]] = {}
        for policy in self.policies:
            for name, more in _reasons(policy, checkpoints).items():
                reasons[name] = tuple(dict.fromkeys((*reasons.get(name, ()), *more)))
        return reasons


def plan(policy: RetentionPolicy, checkpoints: Sequence[CheckpointFacts]) -> RetentionPlan:
    """Decide about every checkpoint. The newest is always kept: without it there is nothing to resume from.

    Args:
        policy: What gives the reasons.
        checkpoints: All intact checkpoints of **one line**, in any order. On another line a higher step is not newer.

    Example:
        >>> saved = [CheckpointFacts(id=f"{step:04d}", step=step) for step in (100, 200, 300, 400)]
        >>> plan(Union(KeepLast(2), KeepEverySteps(200)), saved)
        RetentionPlan(keep={'0200': ('every 200 steps',), '0300': ('last 2',), \
'0400': ('newest', 'last 2', 'every 200 steps')}, drop=('0100',))
    """
    ordered = _oldest_first(checkpoints)
    reasons = _reasons(policy, ordered)
    if ordered:
        newest = ordered[-1].id
        reasons[newest] = ("newest", *reasons.get(newest, ()))
    return RetentionPlan(
        keep={facts.id: reasons[facts.id] for facts in ordered if reasons.get(facts.id)},
        drop=tuple(facts.id for facts in ordered if not reasons.get(facts.id)),
    )


def best(checkpoints: Sequence[CheckpointFacts], metric: str, mode: Mode) -> CheckpointFacts | None:
    """Return the best checkpoint by a metric, the newer of equals; None if no checkpoint has a value for it."""
    check_metric(metric, of="best(metric)")
    check_mode(mode, of="best(mode)")
    return next(iter(_best_first(checkpoints, metric, mode)), None)


def _oldest_first(checkpoints: Sequence[CheckpointFacts]) -> list[CheckpointFacts]:
    return sorted(checkpoints, key=lambda facts: (facts.step, facts.id))


def _best_first(checkpoints: Sequence[CheckpointFacts], metric: str, mode: Mode) -> list[CheckpointFacts]:
    sign = 1 if mode == "min" else -1
    measured = [facts for facts in checkpoints if not math.isnan(facts.metrics.get(metric, math.nan))]
    newest_first = reversed(_oldest_first(measured))
    return sorted(newest_first, key=lambda facts: sign * facts.metrics[metric])


def _reasons(policy: RetentionPolicy, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
    given = policy.reasons_to_keep(checkpoints)
    # A lone string is a sequence too: a policy that returns one must not end up with a reason per letter.
    return {name: (reasons,) if isinstance(reasons, str) else tuple(reasons) for name, reasons in given.items()}


def _nth_best(rank: int) -> str:
    if rank == 1:
        return "best"
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending} best"
