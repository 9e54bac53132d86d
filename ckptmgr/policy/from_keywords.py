"""The keywords that both managers share, turned into triggers and retention."""

from __future__ import annotations

from datetime import timedelta

from ckptmgr.policy.arguments import Mode
from ckptmgr.policy.retention import KeepBest, KeepEverySteps, KeepLast, KeepTagged, RetentionPolicy, Union
from ckptmgr.policy.triggers import AnyOf, EveryEpochs, EverySeconds, EverySteps, OnException, OnSignal, Trigger

__all__ = ["DEFAULT_SECONDS", "retention_from", "trigger_from"]

DEFAULT_SECONDS = 600.0
"""A manager that was told no interval saves at least this often, besides at every epoch's end. In seconds."""


def trigger_from(
    *,
    every_n_steps: int | None,
    every_n_epochs: int | None,
    time_interval: timedelta | float | None,
    on_signal: bool,
    on_exception: bool,
    instead: Trigger | None = None,
) -> Trigger:
    """Return the trigger that the keywords describe.

    Without any interval: every epoch's end, and at least every ten minutes.

    Args:
        every_n_steps: Save whenever this many steps have passed.
        every_n_epochs: Save at the end of every n-th epoch.
        time_interval: Save when the last save is this old.
        on_signal: Save when told to stop.
        on_exception: Save after an exception.
        instead: Takes the place of the intervals; what is told to stop, or fails, is saved all the same.

    Raises:
        UsageError: An interval is not positive, or ``instead`` is no trigger.
    """
    chosen: list[Trigger] = []
    if on_signal:
        chosen.append(OnSignal())
    if on_exception:
        chosen.append(OnException())
    # Made in any case: an interval that cannot be meant is refused also where it would not be used.
    intervals: list[Trigger] = []
    if every_n_steps is not None:
        intervals.append(EverySteps(every_n_steps))
    if every_n_epochs is not None:
        intervals.append(EveryEpochs(every_n_epochs))
    if time_interval is not None:
        intervals.append(EverySeconds(time_interval))
    if instead is not None:
        return AnyOf(*chosen, instead)
    return AnyOf(*chosen, *(intervals or [EveryEpochs(1), EverySeconds(DEFAULT_SECONDS)]))


def retention_from(
    *,
    keep_last: int,
    keep_best: int,
    keep_every_n_steps: int | None,
    monitor: str | None,
    mode: Mode,
    instead: RetentionPolicy | None = None,
) -> RetentionPolicy:
    """Return the retention that the keywords describe: a union, so that each kept checkpoint has its reasons.

    Args:
        keep_last: How many of the newest.
        keep_best: How many of the best, with ``monitor``.
        keep_every_n_steps: The first at or after each multiple of this.
        monitor: The metric that says what is best.
        mode: Whether a smaller or a larger value is better.
        instead: Takes the place of the numbers.

    Raises:
        UsageError: A number is not positive, or ``instead`` is no policy.
    """
    if instead is not None:
        return Union(instead)
    chosen: list[RetentionPolicy] = [KeepLast(keep_last), KeepTagged()]
    if monitor is not None:
        chosen.append(KeepBest(keep_best, monitor, mode))
    if keep_every_n_steps is not None:
        chosen.append(KeepEverySteps(keep_every_n_steps))
    return Union(*chosen)
