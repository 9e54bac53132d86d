"""Options of a checkpoint's program, by the groups of the live one: groups may have been split or merged since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ckptmgr.errors import CkptmgrError
from ckptmgr.state.carried_groups import regrouped
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import carry_into, unwrap_optimizer
from ckptmgr.state.optimizer_carry import Carry
from ckptmgr.state.optimizer_kinds import followed_options

__all__ = ["by_live_groups"]


def by_live_groups(
    saved: Mapping[str, Any], built: Mapping[str, Any], states: Mapping[str, Any], objects: Mapping[str, object]
) -> tuple[dict[str, Any], list[str]]:
    """Give each live group the options that the group was built with whose state it takes over.

    A live group that holds new parameters only has no counterpart: its own options stand for it.

    Args:
        saved: The checkpoint's description, by `changed_options.describe_options`.
        built: The live program's.
        states: The checkpoint's trees of the objects, by entry.
        objects: The live objects by entry.

    Returns:
        The description in the live groups, and which groups could not be compared.
    """
    result, notes = dict(saved), []
    names = ParameterNames.of_state(objects)
    sources: dict[int, tuple[int, tuple[int | None, ...]]] = {}
    for entry, value in objects.items():
        optimizer, tree = unwrap_optimizer(value), states.get(entry)
        if not isinstance(optimizer, Optimizer) or not isinstance(tree, Mapping) or "opaque" in tree:
            continue
        try:
            carry = carry_into(optimizer, tree, names)
            followed = followed_options(tree, optimizer)
        except (CkptmgrError, KeyError, TypeError, AttributeError, ValueError):
            # The handler's own check refuses it and says why.
            continue
        if carry.is_in_place and not followed:
            continue
        sources[id(optimizer)] = (len(tree["groups"]), carry.sources)
        if "groups" in saved.get(entry, ()) and "groups" in built.get(entry, ()):
            groups, missing = _groups(saved[entry]["groups"], built[entry]["groups"], tree, carry, followed)
            result[entry] = {**saved[entry], "groups": groups}
            notes += [f"group {index} of {entry}" for index in missing]
    for entry, value in objects.items():
        if isinstance(value, LRScheduler) and entry in saved and id(value.optimizer) in sources:
            nsaved, found = sources[id(value.optimizer)]
            if None not in found:
                result[entry] = regrouped(saved[entry], nsaved, found)
    return result, notes


def _groups(
    saved: list[Any], live: list[Any], tree: Mapping[str, Any], carry: Carry, followed: frozenset[str]
) -> tuple[list[Any], list[int]]:
    by_parameter = {group["of"]: group for group in saved}
    groups, missing = [], []
    for index, (source, now) in enumerate(zip(carry.sources, live, strict=True)):
        members = [] if source is None else tree["groups"][source]["params"]
        was = by_parameter.get(min(members, default=""))
        if source is None or was is None:
            groups.append(now)
            missing.append(index)
            continue
        own = {key: option for key, option in now["options"].items() if key in followed}
        groups.append({**now, "options": {**was["options"], **own}})
    return groups, missing
