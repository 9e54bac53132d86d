"""What is known of torch's own optimizers: whose state another class can go on with, and which option needs which slot.

========================  ========================================================================================
from one class to another  what happens
========================  ========================================================================================
Adam and AdamW            both keep ``step``, ``exp_avg``, ``exp_avg_sq`` and, with ``amsgrad``, ``max_exp_avg_sq``:
                          carried. ``weight_decay`` means another thing where the one decouples it and the other does
                          not; it follows the live optimizer then
all others                refused: slots of the same name hold other things
========================  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ckptmgr.state.optimizer_carry import Carry, listed_names

__all__ = [
    "SlotChanges",
    "can_step_with",
    "can_take_over",
    "followed_options",
    "options_in_force",
    "slot_changes",
    "slots_switched_by",
]

_ADAM_TYPES: Mapping[str, type[Optimizer]] = {"Adam": Adam, "AdamW": AdamW}
_ADAM_SLOTS = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
_DECAY, _DECOUPLED = "weight_decay", "decoupled_weight_decay"

# Option, and the slot that a step reads or writes only where it is on.
_SWITCHES: tuple[tuple[type[Optimizer], tuple[tuple[str, str], ...]], ...] = (
    (Adam, (("amsgrad", "max_exp_avg_sq"),)),
    (RMSprop, (("centered", "grad_avg"), ("momentum", "momentum_buffer"))),
    (SGD, (("momentum", "momentum_buffer"),)),
)


def can_take_over(tree: Mapping[str, Any], optimizer: Optimizer) -> bool:
    """Say whether an optimizer can go on with the state of another class."""
    live = _ADAM_TYPES.get(type(optimizer).__qualname__)
    return (
        type(optimizer) is live
        and tree["type"] in _ADAM_TYPES
        and all(_ADAM_SLOTS.issuperset(slots) for slots in tree["state"].values())
    )


def followed_options(tree: Mapping[str, Any], optimizer: Optimizer) -> frozenset[str]:
    """Return the options that mean another thing in the live optimizer's class than in the checkpoint's."""
    saved_type = tree.get("type", type(optimizer).__qualname__)
    if saved_type == type(optimizer).__qualname__ or saved_type not in _ADAM_TYPES:
        return frozenset()
    was = {bool(group.get(_DECOUPLED, saved_type == "AdamW")) for group in tree["groups"]}
    now = {bool(group.get(_DECOUPLED, isinstance(optimizer, AdamW))) for group in optimizer.param_groups}
    return frozenset() if was == now and len(was) == 1 else frozenset({_DECAY, _DECOUPLED})


def slots_switched_by(optimizer: Optimizer, option: str) -> tuple[str, ...]:
    """Return the slots that a step of this optimizer needs only where the option is on."""
    return tuple(slot for switch, slot in _switches(optimizer) if switch == option)


def can_step_with(optimizer: Optimizer, options: Mapping[str, Any], slots: Mapping[str, Any]) -> bool:
    """Say whether a parameter's state has all that a step with these options looks for."""
    return isinstance(optimizer, SGD) or all(
        slot in slots for switch, slot in _switches(optimizer) if options.get(switch, False)
    )


def options_in_force(
    tree: Mapping[str, Any], carry: Carry, live_groups: list[dict[str, Any]], position: int
) -> dict[str, Any]:
    """Return the options that a live group has once the state is restored; those that follow it aside."""
    source = carry.sources[position]
    return live_groups[position] | ({} if source is None else dict(tree["groups"][source]))


class SlotChanges:
    """Slots of carried parameters that come into another group, where options want more slots or fewer.

    Attributes:
        unused: Slot by parameter: the group does not use it, so it goes.
        initialised: The same: the optimizer makes it in its next step.
        missing: The same: a step would look for it in vain.
    """

    def __init__(self) -> None:
        self.unused: list[tuple[str, str]] = []
        self.initialised: list[tuple[str, str]] = []
        self.missing: list[tuple[str, str]] = []

    def told(self) -> list[str]:
        """Say what happens to slots, one sentence for each kind of change."""
        return [
            f"{slot} {label} {listed_names([name for name, which in pairs if which == slot])}"
            for label, pairs in (
                ("dropped, for their group has no use for it:", self.unused),
                ("initialised, for the checkpoint has none:", self.initialised),
            )
            for slot in sorted({slot for _, slot in pairs})
        ]


def slot_changes(
    tree: Mapping[str, Any], carry: Carry, live_groups: list[dict[str, Any]], names: Any, optimizer: Optimizer
) -> SlotChanges:
    """Find the slots that change because a parameter comes into a group with other options.

    Args:
        tree: State by name.
        carry: What `plan_carry` gave.
        live_groups: The live groups' options.
        names: The names of each live group's parameters.
        optimizer: The live optimizer.
    """
    changes = SlotChanges()
    own_group = {name: group for group in tree["groups"] for name in group["params"]}
    for position, listed in enumerate(names):
        in_force = options_in_force(tree, carry, live_groups, position)
        for switch, slot in _switches(optimizer):
            is_on = bool(in_force.get(switch, False))
            for name in listed:
                # What a loop has switched by hand stays as it was saved.
                if name not in own_group or bool(own_group[name].get(switch, False)) == is_on:
                    continue
                slots = tree["state"].get(name, {})
                if not is_on and slot in slots:
                    changes.unused.append((name, slot))
                elif is_on and slot not in slots and isinstance(optimizer, SGD):
                    changes.initialised.append((name, slot))
                elif is_on and slot not in slots and slots:
                    changes.missing.append((name, slot))
    return changes


def _switches(optimizer: Optimizer) -> tuple[tuple[str, str], ...]:
    return next((pairs for kind, pairs in _SWITCHES if isinstance(optimizer, kind)), ())
