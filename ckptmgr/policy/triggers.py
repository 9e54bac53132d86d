"""When to save: pure functions of a moment of training. The clock, the signals and the counters are the caller's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, runtime_checkable

from ckptmgr.policy.arguments import Mode, check_metric, check_mode, is_better, whole_number
from ckptmgr.policy.quantities import parse_duration

__all__ = [
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "MetricSpan",
    "Moment",
    "OnException",
    "OnImprovement",
    "OnSignal",
    "Trigger",
    "known_everywhere",
    "may_need_any_step",
    "widen_spans",
]


@dataclass(frozen=True, slots=True)
class MetricSpan:
    """The lowest and the highest value that a metric had at a save. Never NaN."""

    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a trigger may know.

    Attributes:
        step: Optimizer updates completed.
        epoch: Index of the epoch under way or just ended, from 0; None where the loop does not count epochs.
        is_epoch_end: The last batch of ``epoch`` has been trained.
        last_saved_step: Step of the newest save, or of the checkpoint that training continues; 0 on a fresh run.
        seconds_since_save: On a monotonic clock, since the newest save or since the start. In seconds.
        metrics: Values known now, by name. A name may be absent, a value may be NaN.
        seen: Span of every metric over the saves of this line so far; see `widen_spans`.
        signalled: The process was told to stop.
        failed: An exception is leaving the training loop.
    """

    step: int
    epoch: int | None = None
    is_epoch_end: bool = False
    last_saved_step: int = 0
    seconds_since_save: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, MetricSpan] = field(default_factory=dict)
    signalled: bool = False
    failed: bool = False


@runtime_checkable
class Trigger(Protocol):
    """Decides whether a moment is worth a save.

    A trigger keeps nothing between calls, so that it decides after a resume as it would have decided before the kill.
    It need not mind that a step was saved already: who asks does.
    """

    def reason_to_save(self, moment: Moment) -> str | None:
        """Return why to save now, in a few words for `ckptmgr ls`, or None."""
        ...


def known_everywhere(trigger: Trigger) -> Trigger:
    """Return the part of a trigger that depends on step and epoch alone, so that every rank of a job decides alike."""
    return trigger if _is_known(trigger) else _Parts(tuple(part for part in _parts(trigger) if _is_known(part)))


def may_need_any_step(trigger: Trigger) -> bool:
    """Say whether a trigger may have a reason at a step that another rank cannot foresee, and that cannot wait.

    A metric that improves is such a reason: one step later, other weights would be saved for it. Time and signals can
    wait for some steps. What a trigger of the user's does is not known.
    """
    late = (EverySeconds, OnSignal, OnException)
    return any(not _is_known(part) and not isinstance(part, late) for part in _parts(trigger))


@dataclass(frozen=True, slots=True)
class _Parts:
    triggers: tuple[Trigger, ...]

    def reason_to_save(self, moment: Moment) -> str | None:
        return next((reason for part in self.triggers if (reason := part.reason_to_save(moment))), None)


def _parts(trigger: Trigger) -> tuple[Trigger, ...]:
    inner: tuple[Trigger, ...] | None = getattr(trigger, "triggers", None)
    return (trigger,) if inner is None else tuple(part for each in inner for part in _parts(each))


def _is_known(trigger: Trigger) -> bool:
    return isinstance(trigger, (EverySteps, EveryEpochs))


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Save whenever training has passed a multiple of ``n`` steps since the newest save.

    Passed, not hit: a loop that reports every second step, or a resume in between, must not skip a save.
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, of="EverySteps(n)", unit="steps"))

    def reason_to_save(self, moment: Moment) -> str | None:
        is_due = moment.step // self.n > moment.last_saved_step // self.n
        return f"every {self.n} steps" if is_due else None


@dataclass(frozen=True, slots=True)
class EveryEpochs:
    """Save at the end of every ``n``-th epoch: with ``n=2`` after the second, the fourth, and so on."""

    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, of="EveryEpochs(n)", unit="epochs"))

    def reason_to_save(self, moment: Moment) -> str | None:
        if not moment.is_epoch_end or moment.epoch is None or (moment.epoch + 1) % self.n:
            return None
        return "epoch end" if self.n == 1 else f"every {self.n} epochs"


@dataclass(frozen=True, slots=True, init=False)
class EverySeconds:
    """Save when the newest save is at least this old, so that a kill costs a bounded time."""

    seconds: float

    def __init__(self, seconds: float | timedelta | str) -> None:
        object.__setattr__(self, "seconds", parse_duration(seconds, of="EverySeconds(seconds)"))

    def reason_to_save(self, moment: Moment) -> str | None:
        return f"every {self.seconds:g} s" if moment.seconds_since_save >= self.seconds else None


@dataclass(frozen=True, slots=True)
class OnImprovement:
    """Save when a metric is strictly better than at every save before it. A missing or NaN metric is no improvement."""

    metric: str
    mode: Mode

    def __post_init__(self) -> None:
        check_metric(self.metric, of="OnImprovement(metric)")
        check_mode(self.mode, of="OnImprovement(mode)")

    def reason_to_save(self, moment: Moment) -> str | None:
        value = moment.metrics.get(self.metric, math.nan)
        if math.isnan(value):
            return None
        span = moment.seen.get(self.metric)
        if span is None:
            return f"first {self.metric}: {value:g}"
        best = span.lowest if self.mode == "min" else span.highest
        return f"best {self.metric}: {value:g}" if is_better(value, best, self.mode) else None


@dataclass(frozen=True, slots=True)
class OnSignal:
    """Save when the process was told to stop (preemption, time limit, Ctrl-C where it is caught)."""

    def reason_to_save(self, moment: Moment) -> str | None:
        return "signal" if moment.signalled else None


@dataclass(frozen=True, slots=True)
class OnException:
    """Save the last completed step when an exception ends the training."""

    def reason_to_save(self, moment: Moment) -> str | None:
        return "exception" if moment.failed else None


def widen_spans(seen: Mapping[str, MetricSpan], metrics: Mapping[str, float]) -> dict[str, MetricSpan]:
    """Return the spans after one more save with these metrics. NaN widens nothing.

    Fold it over the metrics of the checkpoints of a line, in any order, to get the ``seen`` of a `Moment`.
    """
    wider = dict(seen)
    for name, value in metrics.items():
        if math.isnan(value):
            continue
        span = wider.get(name, MetricSpan(value, value))
        wider[name] = MetricSpan(min(span.lowest, value), max(span.highest, value))
    return wider
