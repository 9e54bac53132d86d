"""Optimizer state by parameter name: from torch's numbering to names, and back in another order.

torch numbers an optimizer's parameters in the order of its groups. A number says nothing when a layer was added or two
were swapped: the moments of one parameter would silently become those of another. So state is kept by name.

These functions work on state dicts alone, so that whoever has no optimizer at hand can use them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ckptmgr.state.optimizer_carry import LIVE_OPTIONS, GroupNames, plan_carry

__all__ = ["is_numbered", "to_indices", "to_names"]


def is_numbered(state_dict: Mapping[str, Any]) -> bool:
    """Say whether a state dict has the form of `torch.optim.Optimizer.state_dict`."""
    groups = state_dict.get("param_groups")
    return (
        isinstance(state_dict.get("state"), Mapping)
        and isinstance(groups, list)
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def to_names(
    state_dict: Mapping[str, Any], group_param_names: GroupNames, *, positional: bool = False
) -> dict[str, Any]:
    """Key a state dict by parameter name.

    Args:
        state_dict: As `torch.optim.Optimizer.state_dict` returns it.
        group_param_names: The names of each group's parameters, in its order.
        positional: The names are ``group/index`` and mean nothing beyond that.

    Returns:
        ``{"groups": [{"params": [name, ...], option: value, ...}], "state": {name: {slot: value}}, "positional": bool,
        "flat": bool}``. ``flat`` state belongs to all parameters together. ``other`` holds state of no parameter, and
        ``extra`` what else the state dict had, where there is any.

    Raises:
        ValueError: The names are not as many as the parameters, or one stands twice.
    """
    numbered: dict[Any, str] = {}
    groups: list[dict[str, Any]] = []
    for group, names in zip(state_dict["param_groups"], group_param_names, strict=True):
        numbered.update(zip(group["params"], names, strict=True))
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"params": list(names), **options})
    listed = [name for names in group_param_names for name in names]
    if len(set(listed)) != len(listed):
        raise ValueError(f"names stand twice: {sorted({name for name in listed if listed.count(name) > 1})}")
    state = {numbered[key]: slots for key, slots in state_dict["state"].items() if key in numbered}
    # In the order of the groups, whatever the order in which the parameters first had gradients.
    tree: dict[str, Any] = {
        "groups": groups,
        "state": {name: state[name] for name in listed if name in state},
        "positional": positional,
        "flat": _is_flat(state, len(listed)),
    }
    if other := {key: value for key, value in state_dict["state"].items() if key not in numbered}:
        tree["other"] = other
    if extra := {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}:
        tree["extra"] = extra
    return tree


def to_indices(
    tree: Mapping[str, Any],
    live_group_param_names: GroupNames,
    live_groups: Sequence[Mapping[str, Any]] | None = None,
    *,
    follows_live: Iterable[str] = (),
) -> dict[str, Any]:
    """Number a tree of `to_names` in the order of a live optimizer.

    Args:
        tree: State by name.
        live_group_param_names: The names of each live group's parameters, in its order.
        live_groups: The live groups, for options that the tree lacks and for those that stay as they are.
        follows_live: Further options that stay as they are.

    Returns:
        What `torch.optim.Optimizer.load_state_dict` takes.

    Raises:
        StateMismatchError: See `plan_carry`.
        ValueError: A live group has new parameters only, and no live groups are given to take its options from.
    """
    carry = plan_carry(tree, live_group_param_names, follows_live=follows_live)
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = dict(tree.get("other", {}))
    number = 0
    for position, (names, source) in enumerate(zip(live_group_param_names, carry.sources, strict=True)):
        options = {} if source is None else {k: v for k, v in tree["groups"][source].items() if k != "params"}
        if live_groups is not None:
            live = {key: value for key, value in live_groups[position].items() if key not in ("params", "param_names")}
            options = live | options
            options.update({key: live[key] for key in (*LIVE_OPTIONS, *follows_live) if key in live})
        elif source is None:
            raise ValueError(f"no group of the checkpoint has parameters of group {position}")
        groups.append({**options, "params": list(range(number, number + len(names)))})
        state.update({number + i: tree["state"][name] for i, name in enumerate(names) if name in tree["state"]})
        number += len(names)
    return {"state": state, "param_groups": groups, **tree.get("extra", {})}


def _is_flat(state: Mapping[str, Any], nparameters: int) -> bool:
    """Say whether the state of all parameters hangs on one of them, as LBFGS keeps it: history in lists of vectors."""
    if nparameters == 0 or len(state) != 1:
        return False
    (slots,) = state.values()
    return isinstance(slots, Mapping) and any(
        isinstance(value, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in value)
        for value in slots.values()
    )
