"""What to keep: pure functions from the checkpoints of a line to a reason for each one that stays.

After restic's snapshot policy: whatever nobody gives a reason for may go, and every decision can be explained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, runtime_checkable

from ckptmgr.errors import UsageError
from ckptmgr.policy.arguments import Mode, check_metric, check_mode, whole_number
from ckptmgr.policy.quantities import parse_duration

__all__ = [
    "CheckpointFacts",
    "ExplainsDrops",
    "KeepAll",
    "KeepBest",
    "KeepEveryEpochs",
    "KeepEverySteps",
    "KeepLast",
    "KeepTagged",
    "KeepWithin",
    "RetentionPlan",
    "RetentionPolicy",
    "Union",
    "best",
    "check_policies",
    "oldest_first",
    "plan",
    "reasons_of",
]

_UNWANTED = "nothing keeps it"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """What retention may know about a committed checkpoint.

    Attributes:
        id: Its unique name. Of two checkpoints at one step, the later one has the name that sorts later.
        step: Optimizer updates completed.
        epoch: Index of its epoch, or None.
        metrics: Values by name, late ones included. A value may be NaN.
        tags: Its pins.
        created_at: When it was committed, in seconds since 1970 UTC, by the clock of its writer; None where unknown.
        nbytes: Size of all files that it refers to.
    """

    id: str
    step: int
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    created_at: float | None = None
    nbytes: int = 0


@runtime_checkable
class RetentionPolicy(Protocol):
    """Gives reasons to keep checkpoints."""

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> Mapping[str, Sequence[str]]:
        """Return the reasons, by id, for those to keep. What is absent, or has no reason, may go.

        What matters most comes first in the mapping: where not all of it fits into a `Budget`, its end is dropped.

        Args:
            checkpoints: All intact checkpoints of one line, in any order.
        """
        ...


@runtime_checkable
class ExplainsDrops(Protocol):
    """A policy that may also say why it does not keep something."""

    def reasons_to_drop(self, checkpoints: Sequence[CheckpointFacts]) -> Mapping[str, str]:
        """Return a reason, by id, for some of those that this policy alone would drop."""
        ...


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """The decision about each checkpoint.

    Attributes:
        keep: Reasons by id, oldest first.
        drop: Ids that nothing speaks for, oldest first, and why not.
    """

    keep: dict[str, tuple[str, ...]]
    drop: dict[str, str]


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest ``k``. Of several saves of one step (before and after its validation) the last one counts."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number(self.k, of="KeepLast(k)", unit="checkpoints"))

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        last_of_step = {facts.step: facts.id for facts in oldest_first(checkpoints)}
        newest_first = list(last_of_step.values())[::-1]
        return dict.fromkeys(newest_first[: self.k], (f"last {self.k}",))


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
        first: dict[int, str] = {}
        for facts in oldest_first(checkpoints):
            multiple = facts.step // self.n
            if multiple:
                first.setdefault(multiple, facts.id)
        return dict.fromkeys(reversed(first.values()), (f"every {self.n} steps",))


@dataclass(frozen=True, slots=True)
class KeepEveryEpochs:
    """Keep, forever, the last checkpoint of every ``n``-th epoch: with ``n=10`` of the tenth, the twentieth, and so on.

    Where there is none, of the first epoch after it that has one. Checkpoints of loops that count no epochs are not
    among them.
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, of="KeepEveryEpochs(n)", unit="epochs"))

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        last_of_epoch = {facts.epoch: facts.id for facts in oldest_first(checkpoints) if facts.epoch is not None}
        chosen: dict[int, str] = {}
        for epoch in sorted(last_of_epoch):
            multiple = (epoch + 1) // self.n
            if multiple:
                chosen.setdefault(multiple, last_of_epoch[epoch])
        reason = "every epoch" if self.n == 1 else f"every {self.n} epochs"
        return dict.fromkeys(reversed(chosen.values()), (reason,))


@dataclass(frozen=True, slots=True, init=False)
class KeepWithin:
    """Keep what is at most so much older than the newest checkpoint: ``KeepWithin("7d")``.

    Age counts back from the newest checkpoint, not from now: a run that nobody touches for a year loses nothing. What
    has no known time is kept.

    Args:
        age: Seconds, a `timedelta`, or text such as ``"36h"`` or ``"7d"``.
    """

    seconds: float
    _words: str = field(repr=False, compare=False)

    def __init__(self, age: float | timedelta | str) -> None:
        object.__setattr__(self, "seconds", parse_duration(age, of="KeepWithin(age)"))
        object.__setattr__(self, "_words", age.strip() if isinstance(age, str) else f"{self.seconds:g} s")

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        newest_first = oldest_first(checkpoints)[::-1]
        newest = next((facts.created_at for facts in newest_first if facts.created_at is not None), None)
        reasons: dict[str, tuple[str, ...]] = {}
        for facts in newest_first:
            if newest is None or facts.created_at is None:
                reasons[facts.id] = ("of unknown age",)
            elif newest - facts.created_at <= self.seconds:
                reasons[facts.id] = (f"within {self._words} of the newest",)
        return reasons


@dataclass(frozen=True, slots=True)
class KeepTagged:
    """Keep what is pinned: every checkpoint with a tag."""

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        return {
            facts.id: tuple(f"tagged {tag}" for tag in sorted(facts.tags))
            for facts in reversed(oldest_first(checkpoints))
            if facts.tags
        }


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep everything."""

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        return {facts.id: ("all are kept",) for facts in reversed(oldest_first(checkpoints))}


@dataclass(frozen=True, slots=True, init=False)
class Union:
    """Keep what any of several policies keeps, with the reasons of all of them."""

    policies: tuple[RetentionPolicy, ...]

    def __init__(self, *policies: RetentionPolicy) -> None:
        object.__setattr__(self, "policies", check_policies(policies, of="Union"))

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        reasons: dict[str, tuple[str, ...]] = {}
        for policy in self.policies:
            for name, more in reasons_of(policy, checkpoints).items():
                reasons[name] = tuple(dict.fromkeys((*reasons.get(name, ()), *more)))
        return reasons

    def reasons_to_drop(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for policy in self.policies:
            if isinstance(policy, ExplainsDrops):
                reasons = {**policy.reasons_to_drop(checkpoints), **reasons}
        return reasons


def check_policies(policies: Sequence[object], *, of: str) -> tuple[RetentionPolicy, ...]:
    """Return policies that are some.

    Raises:
        UsageError: One of them is none.
    """
    for policy in policies:
        # A class has the method too, but not bound: KeepAll instead of KeepAll() is an easy slip.
        if isinstance(policy, type) or not isinstance(policy, RetentionPolicy):
            raise UsageError(
                f"{of} was given {policy!r}",
                why="it is not a retention policy: that is an object with a method reasons_to_keep(checkpoints)",
                next="give policies one by one, such as Union(KeepLast(3), KeepTagged())",
            )
    return tuple(policies)  # type: ignore[arg-type]


def plan(policy: RetentionPolicy, checkpoints: Sequence[CheckpointFacts]) -> RetentionPlan:
    """Decide about every checkpoint. The newest is always kept: without it there is nothing to resume from.

    Args:
        policy: What gives the reasons.
        checkpoints: All intact checkpoints of **one line**, in any order. On another line a higher step is not newer.

    Example:
        >>> saved = [CheckpointFacts(id=f"{step:04d}", step=step) for step in (100, 200, 300, 400)]
        >>> plan(Union(KeepLast(2), KeepEverySteps(200)), saved)
        RetentionPlan(keep={'0200': ('every 200 steps',), '0300': ('last 2',), \
'0400': ('newest', 'last 2', 'every 200 steps')}, drop={'0100': 'nothing keeps it'})
    """
    ordered = oldest_first(checkpoints)
    reasons = reasons_of(policy, ordered)
    against = policy.reasons_to_drop(ordered) if isinstance(policy, ExplainsDrops) else {}
    if ordered:
        newest = ordered[-1].id
        reasons[newest] = tuple(dict.fromkeys(("newest", *reasons.get(newest, ()))))
    return RetentionPlan(
        keep={facts.id: reasons[facts.id] for facts in ordered if reasons.get(facts.id)},
        drop={facts.id: against.get(facts.id, _UNWANTED) for facts in ordered if not reasons.get(facts.id)},
    )


def best(checkpoints: Sequence[CheckpointFacts], metric: str, mode: Mode) -> CheckpointFacts | None:
    """Return the best checkpoint by a metric, the newer of equals; None if no checkpoint has a value for it."""
    check_metric(metric, of="best(metric)")
    check_mode(mode, of="best(mode)")
    return next(iter(_best_first(checkpoints, metric, mode)), None)


def oldest_first(checkpoints: Sequence[CheckpointFacts]) -> list[CheckpointFacts]:
    """Return the checkpoints of one line in the order in which they were saved."""
    return sorted(checkpoints, key=lambda facts: (facts.step, facts.id))


def _best_first(checkpoints: Sequence[CheckpointFacts], metric: str, mode: Mode) -> list[CheckpointFacts]:
    sign = 1 if mode == "min" else -1
    measured = [facts for facts in checkpoints if not math.isnan(facts.metrics.get(metric, math.nan))]
    newest_first = reversed(oldest_first(measured))
    return sorted(newest_first, key=lambda facts: sign * facts.metrics[metric])


def reasons_of(policy: RetentionPolicy, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
    """Ask a policy, and return its reasons in its own order of importance."""
    given = policy.reasons_to_keep(checkpoints)
    # A lone string is a sequence too: a policy that returns one must not end up with a reason per letter.
    return {name: (reasons,) if isinstance(reasons, str) else tuple(reasons) for name, reasons in given.items()}


def _nth_best(rank: int) -> str:
    if rank == 1:
        return "best"
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending} best"
