"""Optimizer state by parameter name: from torch's numbering to names, and back in another order.

torch numbers an optimizer's parameters in the order of its groups. A number says nothing when a layer was added or two
were swapped: the moments of one parameter would silently become those of another. So state is kept by name.

These functions work on state dicts alone, so that whoever has no optimizer at hand can use them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ckptmgr.errors import StateMismatchError

__all__ = ["LIVE_FLAGS", "GroupNames", "check_names", "is_numbered", "to_indices", "to_names"]

GroupNames: TypeAlias = Sequence[Sequence[str]]
"""Names of the parameters of each group, in the order of the group."""

LIVE_FLAGS = ("fused", "foreach", "capturable", "differentiable")
"""Options that say how the live optimizer computes on its devices; they stay as they are."""


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
    tree: Mapping[str, Any], live_group_param_names: GroupNames, live_groups: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Number a tree of `to_names` in the order of a live optimizer; `check_names` must have passed.

    Args:
        tree: State by name.
        live_group_param_names: The names of each live group's parameters, in its order.
        live_groups: The live groups, for options that the tree lacks and for those that stay as they are.

    Returns:
        What `torch.optim.Optimizer.load_state_dict` takes.
    """
    saved_groups = _pair_groups(tree["groups"], live_group_param_names)
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = dict(tree.get("other", {}))
    number = 0
    for position, names in enumerate(live_group_param_names):
        saved = saved_groups[position]
        if saved is None:
            raise ValueError(
                f"no group of the checkpoint has the parameters of group {position}: check_names() tells why"
            )
        options = {key: value for key, value in saved.items() if key != "params"}
        if live_groups is not None:
            live = live_groups[position]
            options = {key: value for key, value in live.items() if key not in ("params", "param_names")} | options
            options.update({flag: live[flag] for flag in LIVE_FLAGS if flag in live})
        groups.append({**options, "params": list(range(number, number + len(names)))})
        state.update({number + i: tree["state"][name] for i, name in enumerate(names) if name in tree["state"]})
        number += len(names)
    return {"state": state, "param_groups": groups, **tree.get("extra", {})}


def check_names(tree: Mapping[str, Any], live_group_param_names: GroupNames) -> None:
    """Check that the live optimizer has the parameters of the checkpoint, in the same groups.

    Raises:
        StateMismatchError: It has not. Lists what would be carried over, initialised and dropped.
    """
    saved_names = [name for group in tree["groups"] for name in group["params"]]
    live_names = [name for names in live_group_param_names for name in names]
    saved_orders = [list(group["params"]) for group in tree["groups"]]
    if (tree["positional"] or tree["flat"]) and saved_orders != [list(names) for names in live_group_param_names]:
        raise StateMismatchError(
            "the optimizer of the checkpoint has another list of parameters than the live one",
            why="its state belongs to all parameters together, in their order"
            if tree["flat"]
            else f"its parameters have no names, only positions: {_sizes(saved_orders)} in the checkpoint, "
            f"{_sizes(live_group_param_names)} now",
            next="build the optimizer over the same parameters in the same order"
            if tree["flat"]
            else "build the same groups; for names, put the module into the state, or give the optimizer "
            "module.named_parameters()",
        )
    lines: list[str] = []
    new = [name for name in live_names if name not in set(saved_names)]
    gone = [name for name in saved_names if name not in set(live_names)]
    if new or gone:
        carried = len(live_names) - len(new)
        lines.append(f"carried over: {carried} of {len(live_names)} live parameters")
        lines.extend(_listed("initialised, for the checkpoint has none", new))
        lines.extend(_listed("dropped, for no live group has them", gone))
    elif any(group is None for group in _pair_groups(tree["groups"], live_group_param_names)):
        before = {name: i for i, names in enumerate(saved_orders) for name in names}
        lines.append(f"the groups divide the parameters differently: {_sizes(saved_orders)} before")
        for position, names in enumerate(live_group_param_names):
            origins = sorted({before[name] for name in names})
            lines.append(f"group {position} now has {len(names)} parameters, which were in groups {origins}")
    if lines:
        raise StateMismatchError(
            "the optimizer of the checkpoint has other parameters than the live one",
            why="\n        ".join(lines),
            next="build the optimizer over the same parameters in the same groups as in the run that saved; "
            "nothing was changed",
        )


def _pair_groups(
    saved: Sequence[Mapping[str, Any]], live_group_param_names: GroupNames
) -> list[Mapping[str, Any] | None]:
    """Find for each live group the saved one with the same parameters; groups may have changed places."""
    if len(saved) != len(live_group_param_names):
        return [None] * len(live_group_param_names)
    left = list(saved)
    pairs: list[Mapping[str, Any] | None] = []
    for names in live_group_param_names:
        match = next((group for group in left if set(group["params"]) == set(names)), None)
        if match is not None:
            left = [group for group in left if group is not match]
        pairs.append(match)
    return pairs


def _is_flat(state: Mapping[str, Any], nparameters: int) -> bool:
    """Say whether the state of all parameters hangs on one of them, as LBFGS keeps it: history in lists of vectors."""
    if nparameters == 0 or len(state) != 1:
        return False
    (slots,) = state.values()
    return isinstance(slots, Mapping) and any(
        isinstance(value, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in value)
        for value in slots.values()
    )


def _sizes(groups: Iterable[Sequence[str]]) -> str:
    return "groups of " + ", ".join(str(len(names)) for names in groups)


def _listed(label: str, names: Sequence[str]) -> list[str]:
    return [f"{label}: {', '.join(names)}"] if names else []
