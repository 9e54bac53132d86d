"""The keywords that both managers share, turned into triggers and retention."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from datetime import timedelta

from ckptmgr.errors import UsageError
from ckptmgr.policy.arguments import Mode, check_mode, check_switch
from ckptmgr.policy.intervals import AnyOf, Triggers, parse_interval
from ckptmgr.policy.retention import (
    KeepAll,
    KeepBest,
    KeepEverySteps,
    KeepLast,
    KeepTagged,
    RetentionPolicy,
    Union,
)
from ckptmgr.policy.triggers import EveryEpochs, EverySeconds, EverySteps, OnException, OnSignal, Trigger

__all__ = ["DEFAULT_SECONDS", "retention_from", "trigger_from"]

DEFAULT_SECONDS = 600.0
"""A manager that was told no interval saves at least this often, besides at every epoch's end. In seconds."""


def trigger_from(
    *,
    every: str | Sequence[str] | None = None,
    every_n_steps: int | None,
    every_n_epochs: int | None,
    time_interval: timedelta | float | None,
    on_signal: bool,
    on_exception: bool,
    instead: Triggers | None = None,
) -> Trigger:
    """Return the trigger that the keywords describe.

    Without any interval: every epoch's end, and at least every ten minutes.

    Args:
        every: Intervals as text, such as ``"500ba"``; joined with the others.
        every_n_steps: Save whenever this many steps have passed.
        every_n_epochs: Save at the end of every n-th epoch.
        time_interval: Save when the last save is this old.
        on_signal: Save when told to stop.
        on_exception: Save after an exception.
        instead: Takes the place of the intervals; what is told to stop, or fails, is saved all the same.

    Raises:
        UsageError: An interval cannot be meant as it was given, or ``instead`` is no trigger.
    """
    chosen: list[Trigger] = []
    if check_switch(on_signal, of="save_on_signal"):
        chosen.append(OnSignal())
    if check_switch(on_exception, of="save_on_exception"):
        chosen.append(OnException())
    # Made in any case: an interval that cannot be meant is refused also where it would not be used.
    intervals: list[Trigger] = []
    if every_n_steps is not None:
        intervals.append(EverySteps(every_n_steps))
    if every_n_epochs is not None:
        intervals.append(EveryEpochs(every_n_epochs))
    if time_interval is not None:
        intervals.append(EverySeconds(time_interval))
    intervals += [parse_interval(text) for text in _texts(every)]
    if instead is not None:
        return AnyOf(*chosen, *(instead if isinstance(instead, list | tuple) else (instead,)))
    return AnyOf(*chosen, *(intervals or [EveryEpochs(1), EverySeconds(DEFAULT_SECONDS)]))


def retention_from(
    *,
    keep_last: int,
    save_top_k: int,
    keep_every_n_steps: int | None,
    monitor: str | None,
    mode: Mode,
    instead: RetentionPolicy | Sequence[RetentionPolicy] | None = None,
) -> RetentionPolicy:
    """Return the retention that the keywords describe: a union, so that each kept checkpoint has its reasons.

    Args:
        keep_last: How many of the newest.
        save_top_k: How many of the best, with ``monitor``. 0: none; -1: keep every checkpoint.
        keep_every_n_steps: The first at or after each multiple of this.
        monitor: The metric that says what is best.
        mode: Whether a smaller or a larger value is better.
        instead: One or several policies in place of the numbers. What is tagged stays all the same.

    Raises:
        UsageError: A number has no meaning, nothing says what is best, or ``instead`` is no policy.
    """
    _check_best(save_top_k, monitor, check_mode(mode, of="manager(mode)"))
    chosen: list[RetentionPolicy] = [KeepLast(keep_last), KeepTagged()]
    if monitor is not None and save_top_k > 0:
        chosen.append(KeepBest(save_top_k, monitor, mode))
    if keep_every_n_steps is not None:
        chosen.append(KeepEverySteps(keep_every_n_steps))
    if instead is not None:
        return Union(*(instead if isinstance(instead, list | tuple) else (instead,)), KeepTagged())
    return KeepAll() if save_top_k == -1 else Union(*chosen)


def _check_best(save_top_k: object, monitor: str | None, mode: Mode) -> None:
    number = operator.index(save_top_k) if hasattr(save_top_k, "__index__") else -2
    if number < -1 or isinstance(save_top_k, bool):
        raise UsageError(
            f"save_top_k={save_top_k!r}",
            why="it counts checkpoints, in whole numbers; -1 keeps all, 0 keeps none for being best",
        )
    if monitor is None and number > 1:
        raise UsageError(
            f"save_top_k={save_top_k} without monitor",
            why="nothing says which checkpoints are the best",
            next=f"give monitor= the name of a metric, or keep_last={save_top_k}",
        )
    if monitor is None and mode == "max":
        raise UsageError(
            "mode='max' without monitor",
            why="it says which way a metric is better, and no metric is named",
            next="give monitor= the name of a metric, or leave mode out",
        )


def _texts(every: str | Sequence[str] | None) -> tuple[str, ...]:
    if every is None:
        return ()
    if isinstance(every, str):
        return (every,)
    if not isinstance(every, Sequence):
        raise UsageError(f"every={every!r}", why="it is an interval as text, or a list of them", next="every='500ba'")
    return tuple(every)
