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
) -> Trigger:
    """Return the trigger that the keywords describe.

    Without any interval: every epoch's end, and at least every ten minutes.

    Raises:
        UsageError: An interval is not positive.
    """
    chosen: list[Trigger] = []
    if on_signal:
        chosen.append(OnSignal())
    if on_exception:
        chosen.append(OnException())
    if every_n_steps is not None:
        chosen.append(EverySteps(every_n_steps))
    if every_n_epochs is not None:
        chosen.append(EveryEpochs(every_n_epochs))
    if time_interval is not None:
        chosen.append(EverySeconds(time_interval))
    if every_n_steps is None and every_n_epochs is None and time_interval is None:
        chosen += [EveryEpochs(1), EverySeconds(DEFAULT_SECONDS)]
    return AnyOf(*chosen)


def retention_from(
    *, keep_last: int, keep_best: int, keep_every_n_steps: int | None, monitor: str | None, mode: Mode
) -> RetentionPolicy:
    """Return the retention that the keywords describe: a union, so that each kept checkpoint has its reasons.

    Raises:
        UsageError: A number is not positive.
    """
    chosen: list[RetentionPolicy] = [KeepLast(keep_last), KeepTagged()]
    if monitor is not None:
        chosen.append(KeepBest(keep_best, monitor, mode))
    if keep_every_n_steps is not None:
        chosen.append(KeepEverySteps(keep_every_n_steps))
    return Union(*chosen)
