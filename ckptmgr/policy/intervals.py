"""Intervals as people write them, and triggers joined: ``"500ba"``, ``"1ep"``, ``"10min"``.

The grammar is a number and a unit, in any case, with or without a space between:

==================================  ==========================================================
``ba``, ``batches``, ``steps``      `EverySteps`: optimizer updates, whatever the unit is called elsewhere
``ep``, ``epochs``                  `EveryEpochs`
``s``, ``min``, ``h``, ``d``, ``w``  `EverySeconds`
==================================  ==========================================================

Units may be written out, as in ``10 minutes`` or ``1 epoch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ckptmgr.errors import UsageError
from ckptmgr.policy.quantities import SECONDS_OF_UNIT, split_quantity
from ckptmgr.policy.triggers import EveryEpochs, EverySeconds, EverySteps, Moment, Trigger

__all__ = ["AnyOf", "Triggers", "parse_interval"]

_STEPS = ("ba", "batch", "batches", "step", "steps")
_EPOCHS = ("ep", "epoch", "epochs")


def parse_interval(text: str) -> Trigger:
    """Return the trigger that an interval means.

    Raises:
        UsageError: It cannot be read, is not positive, or counts parts of a step or an epoch.

    Example:
        >>> parse_interval("500ba"), parse_interval("1ep"), parse_interval("1.5 h")
        (EverySteps(n=500), EveryEpochs(n=1), EverySeconds(seconds=5400.0))
    """
    number, unit = (split_quantity(text) if isinstance(text, str) else None) or (0.0, "")
    if number > 0 and unit in SECONDS_OF_UNIT:
        return EverySeconds(number * SECONDS_OF_UNIT[unit])
    if number > 0 and number.is_integer():
        if unit in _STEPS:
            return EverySteps(int(number))
        if unit in _EPOCHS:
            return EveryEpochs(int(number))
    raise UsageError(
        f"{text!r} is no interval",
        why="an interval is a number and a unit: ba or steps, ep or epochs (whole numbers), s, min, h, d or w",
        next="give for example '500ba', '1ep', '10min' or '2h'",
    )


@dataclass(frozen=True, slots=True, init=False)
class AnyOf:
    """Save when any of several triggers says so; the first that does gives the reason. Text is an interval."""

    triggers: tuple[Trigger, ...]

    def __init__(self, *triggers: Trigger | str) -> None:
        read = tuple(parse_interval(trigger) if isinstance(trigger, str) else trigger for trigger in triggers)
        for trigger in read:
            # A class has the method too, but not bound: EverySteps instead of EverySteps(100) is an easy slip.
            if isinstance(trigger, type) or not isinstance(trigger, Trigger):
                raise UsageError(
                    f"AnyOf was given {trigger!r}",
                    why="it is not a trigger: a trigger is an object with a method reason_to_save(moment)",
                    next="give triggers one by one, such as AnyOf(EverySteps(100), '10min', OnSignal())",
                )
        object.__setattr__(self, "triggers", read)

    def reason_to_save(self, moment: Moment) -> str | None:
        for trigger in self.triggers:
            reason = trigger.reason_to_save(moment)
            if reason is not None:
                return reason
        return None


Triggers: TypeAlias = Trigger | str | Sequence[Trigger | str]
"""What a manager's ``triggers=`` takes: one, or several of which any may ask for a save."""
