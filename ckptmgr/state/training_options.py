"""Options that differ from the checkpoint's: named where the checkpoint's are kept, applied where that is wanted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.state.apply_options import apply_options
from ckptmgr.state.changed_options import LEARNING_RATE, OptionChange, changed_options, describe_options
from ckptmgr.state.optimizer import unwrap_optimizer
from ckptmgr.state.optimizer_kinds import slots_switched_by
from ckptmgr.state.regrouped_options import by_live_groups

__all__ = ["OnChangedOptions", "TrainingOptions", "checked_mode"]

_log = logging.getLogger("ckptmgr")

OnChangedOptions: TypeAlias = Literal["keep", "apply"]

# With these, an optimizer's step reads state that it has not kept without them.
_NEED_STATE = ("amsgrad", "centered")


def checked_mode(mode: OnChangedOptions) -> OnChangedOptions:
    """Return the mode.

    Raises:
        UsageError: It is none.
    """
    if mode not in ("keep", "apply"):
        raise UsageError(
            f"on_changed_options={mode!r}",
            why="it is 'keep', for the options of the checkpoint, or 'apply', for those of the program",
        )
    return mode


class TrainingOptions:
    """The options that training follows: learning rates, weight decay, arguments of schedulers.

    Args:
        objects: The live objects by entry, as the program has built them: nothing was restored yet.
        mode: What to do about options that differ from the checkpoint's.

    Attributes:
        in_force: The description of the options that training follows, to be stored with each checkpoint. Where the
            checkpoint's are kept, it stays the checkpoint's, so that every later resume names the difference again.
        applied: What was applied since.
    """

    def __init__(self, objects: Mapping[str, object], mode: OnChangedOptions) -> None:
        self._objects = dict(objects)
        self._mode = checked_mode(mode)
        self._built = describe_options(self._objects)
        self.in_force = self._built
        self.applied: list[OptionChange] = []
        self._checked: Mapping[str, Any] | None = None
        self._not_compared: list[str] = []

    def check(
        self,
        saved: Mapping[str, Any] | None,
        states: Mapping[str, Any],
        *,
        live_options: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """Refuse what could not be applied. Changes nothing.

        Args:
            saved: The description in the checkpoint; None where it has none.
            states: The checkpoint's trees of the objects, by entry.
            live_options: Options by optimizer that are not restored: this program's are in force in any case.

        Raises:
            StateMismatchError: The checkpoint's state is none to go on from with these options.
        """
        self._checked, self._not_compared = by_live_groups(saved or {}, self._built, states, self._objects)
        for entry, options in (live_options or {}).items():
            if "groups" in self._checked.get(entry, ()):
                self._checked[entry] = _with_live_options(self._checked[entry], self._built.get(entry, {}), options)
        if self._mode == "keep":
            return
        for change in changed_options(self._checked, self._built):
            why = _why_impossible(change, unwrap_optimizer(self._objects[change.entry]), states.get(change.entry))
            if why is not None:
                raise StateMismatchError(
                    f"{change} cannot be applied to the checkpoint",
                    why=why,
                    next=f"build it with {change.option.lstrip('_')}={change.was!r} as in the run that saved, or use "
                    "on_changed_options='keep'",
                )

    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """Name or apply what differs from the checkpoint. Call it after `check`, once the objects are restored.

        Args:
            saved: The description in the checkpoint; None where it has none.
        """
        saved = (saved or {}) if self._checked is None else self._checked
        known = {entry: tree for entry, tree in saved.items() if entry in self._objects}
        if self._not_compared:
            _log.warning(
                "options that were not compared with the checkpoint's, which has no such parameters: %s; "
                "this program's are in force there",
                ", ".join(self._not_compared),
            )
        changes = changed_options(known, self._built)
        if self._mode == "keep":
            self.in_force = {**self._built, **known}
            if changes:
                _log.warning("%s", self._kept(changes))
            return
        self.in_force = {**known, **self._built}
        before = [self._value(change) for change in changes]
        if changes:
            apply_options(self._objects, changes)
        for change, value in zip(changes, before, strict=True):
            here = f" ({value:.6g} -> {self._value(change):.6g} at this point)" if _is_driven(change, value) else ""
            _log.info("applied: %s%s", change, here)
            self._follow_slots(change)
        self.applied += changes

    def _follow_slots(self, change: OptionChange) -> None:
        """Take away state that an option that was switched off has no use for, or say what begins anew."""
        if change.group is None or bool(change.was) == bool(change.now):
            return
        optimizer = unwrap_optimizer(self._objects[change.entry])
        parameters = optimizer.param_groups[change.group]["params"]
        for slot in slots_switched_by(optimizer, change.option):
            if change.now:
                count, verb = len(parameters), "initialised"
            else:
                having = [p for p in parameters if optimizer.state.get(p, {}).pop(slot, None) is not None]
                count, verb = len(having), "dropped"
            if count:
                _log.warning("%s of %d parameters of %s is %s: %s", slot, count, change.entry, verb, change)

    def _kept(self, changes: Sequence[OptionChange]) -> str:
        named = []
        for change in changes:
            value = self._value(change)
            kept = f"kept at {value:.6g}" if _is_driven(change, value) else "kept"
            named.append(f"{change.label}: built with {change.now}, the checkpoint was built with {change.was}; {kept}")
        how = "on_changed_options='apply' goes on with this program's"
        return f"the checkpoint's options stay in force: {'. '.join(named)}. {how}"

    def _value(self, change: OptionChange) -> float | None:
        """Return the learning rate of the moment; None for other options, which have no value but the one in force."""
        if change.option != LEARNING_RATE or change.group is None:
            return None
        return float(unwrap_optimizer(self._objects[change.entry]).param_groups[change.group][LEARNING_RATE])


def _with_live_options(saved: Mapping[str, Any], built: Mapping[str, Any], options: Collection[str]) -> dict[str, Any]:
    """Return an optimizer's description with some of the options as this program has built them."""
    now = {group["of"]: group["options"] for group in built.get("groups", ())}
    groups = []
    for group in saved["groups"]:
        kept = {key: value for key, value in group["options"].items() if key not in options}
        live = {key: value for key, value in now.get(group["of"], {}).items() if key in options}
        groups.append({**group, "options": kept | live})
    return {**saved, "groups": groups}


def _is_driven(change: OptionChange, value: float | None) -> bool:
    return value is not None and value != change.was


def _why_impossible(change: OptionChange, live: Any, state: Any) -> str | None:
    if change.group is not None and _needs_state(change, live):
        return "the optimizer would read state that it has not kept so far"
    if change.option == "total_steps" and isinstance(state, Mapping):
        for index in change.inner:
            state = {"state": state["state"]["_schedulers"][index]}
        point = state.get("state", {}).get("last_epoch", 0)
        if point > change.now:
            return f"the schedule stands at step {point} already, and would have ended at {change.now}"
    return None


def _needs_state(change: OptionChange, live: Any) -> bool:
    is_switched_on = not change.was and bool(change.now)
    # SGD makes its momentum when it is missing; RMSprop looks it up.
    return is_switched_on and (
        change.option in _NEED_STATE or (change.option == "momentum" and type(live).__name__ == "RMSprop")
    )
