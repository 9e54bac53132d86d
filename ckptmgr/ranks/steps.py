"""What the ranks agree on at step boundaries: whether to save now, and whether to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ckptmgr.ranks.group import Channel

__all__ = ["StepAgreement"]

_INTERVAL_S = 0.05
_MOST_STEPS = 1000


class StepAgreement:
    """Lets rank 0 decide for all, without asking at every step.

    What follows from the step and the epoch alone, every rank knows by itself. For everything else (a signal that one
    rank has got, the time, metrics) the ranks talk, at steps that are about 50 ms apart: rank 0 says each time after
    how many steps the next talk is, so all of them keep to the same steps.

    Args:
        channel: The ranks.
        talks_always: Something that every rank must learn of at the very step, such as a metric that has improved, can
            be due at any step.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, channel: Channel, *, talks_always: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._channel = channel
        self._talks_always = talks_always
        self._clock = clock
        self._left = 1
        self._steps = 1
        self._talked_at: float | None = None

    def at_step(
        self, what: str, *, is_told_to_stop: bool, decide: Callable[[bool], str | None], known: Callable[[], str | None]
    ) -> tuple[str | None, bool]:
        """Return why to save now, and whether to stop: the same on every rank.

        Args:
            what: The step, in the same words on every rank.
            is_told_to_stop: This rank was told to stop.
            decide: Given whether any rank was told to stop, returns why to save; asked on rank 0.
            known: Returns why to save as far as every rank can tell by itself.

        Raises:
            RankFailure: A rank is gone, late, or at another step.
        """
        if self._channel.world_size == 1:
            return decide(is_told_to_stop), is_told_to_stop
        self._left -= 1
        if self._left > 0 and not self._talks_always:
            return known(), False

        def answer(told: Sequence[bool]) -> tuple[str | None, bool, int]:
            must_stop = any(told)
            return decide(must_stop), must_stop, self._next()

        reason, must_stop, self._left = self._channel.exchange(what, lambda: bool(is_told_to_stop), answer)
        return reason, must_stop

    def _next(self) -> int:
        now = self._clock()
        if self._talked_at is not None:
            step_s = max((now - self._talked_at) / self._steps, 1e-6)
            self._steps = min(max(1, int(_INTERVAL_S / step_s)), _MOST_STEPS)
        self._talked_at = now
        return self._steps
