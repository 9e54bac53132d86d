"""When a plain loop is due for a save: what was saved last and when, and what is put off to the next step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ckptmgr.policy.triggers import MetricSpan, Moment, Trigger, known_everywhere, may_need_any_step
from ckptmgr.ranks.group import Ranks
from ckptmgr.ranks.steps import StepAgreement

__all__ = ["Schedule"]


class Schedule:
    """Asks a trigger about a loop's moments.

    Args:
        trigger: Decides.
        clock: Monotonic, in seconds.

    Attributes:
        saved_step: Step of the newest save, or of the checkpoint that training continues.
    """

    def __init__(self, trigger: Trigger, clock: Callable[[], float] = time.monotonic) -> None:
        self.saved_step = 0
        self._trigger = trigger
        self._known = known_everywhere(trigger)
        self._steps = StepAgreement(Ranks.alone().loop)
        self._clock = clock
        self._saved_at = clock()
        self._postponed_epoch: int | None = None

    def saved(self, step: int) -> None:
        """Note a save, or the step that training continues from: the time counts from here."""
        self.saved_step, self._saved_at = step, self._clock()

    def postpone(self, epoch: int | None) -> None:
        """Put the end of an epoch off to the next step: gradients are pending, and they are in no checkpoint."""
        self._postponed_epoch = epoch

    def agree_with(self, ranks: Ranks) -> None:
        """Decide together with the other ranks of the job."""
        self._steps = StepAgreement(ranks.loop, talks_always=may_need_any_step(self._trigger))

    def reason_to_save(
        self,
        step: int,
        *,
        epoch: int | None,
        is_epoch_end: bool,
        metrics: Mapping[str, float],
        seen: Mapping[str, MetricSpan],
        signalled: bool,
    ) -> tuple[str | None, bool]:
        """Return why to save now, or None; and whether to stop. The same on every rank.

        The arguments are those of `Moment`; rank 0's metrics count, and a signal that any rank has got.
        """
        if self._postponed_epoch is not None:
            epoch, is_epoch_end, self._postponed_epoch = self._postponed_epoch, True, None
        moment = Moment(
            step=step,
            epoch=epoch,
            is_epoch_end=is_epoch_end,
            last_saved_step=self.saved_step,
            seconds_since_save=self._clock() - self._saved_at,
            metrics=metrics,
            seen=seen,
        )
        return self._steps.at_step(
            f"step {step}",
            is_told_to_stop=signalled,
            decide=lambda must_stop: self._trigger.reason_to_save(replace(moment, signalled=must_stop)),
            known=lambda: self._known.reason_to_save(moment),
        )
