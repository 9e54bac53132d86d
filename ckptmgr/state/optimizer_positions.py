"""Imported optimizer state of which only the positions are known, taken over by a live optimizer that has names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.differences import Differences
from ckptmgr.state.optimizer_carry import GroupNames

__all__ = ["in_live_names_by_position"]


def in_live_names_by_position(
    tree: Mapping[str, Any], optimizer: Optimizer, listed: GroupNames, positional: bool
) -> Mapping[str, Any]:
    """Give imported state the names of the live parameters, if groups and shapes are the same.

    State that was saved here has names, or its program has none either: it is returned as it is.

    Args:
        tree: State by position.
        optimizer: The live one.
        listed: Names of its parameters, by group.
        positional: The names are positions themselves.

    Raises:
        StateMismatchError: The groups or the shapes are others.
    """
    if not tree.get("imported") or not tree["positional"] or positional:
        return tree
    sizes = [len(group["params"]) for group in tree["groups"]]
    live = [len(names) for names in listed]
    if sizes != live:
        raise StateMismatchError(
            "the imported optimizer state cannot be matched with the live optimizer",
            why=f"its parameters have no names, only positions: groups of {sizes}, and the live ones are of {live}",
            next="build the same groups, or import again with --model package.module:factory, which names them",
        )
    differences = Differences(
        "the imported optimizer state", next="import again with --model package.module:factory, which names parameters"
    )
    names: dict[str, str] = {}
    for saved, group, group_listed in zip(tree["groups"], optimizer.param_groups, listed, strict=True):
        for position, parameter, name in zip(saved["params"], group["params"], group_listed, strict=True):
            names[position] = name
            for slot, item in tree["state"].get(position, {}).items():
                if isinstance(item, torch.Tensor) and item.dim() and item.shape != parameter.shape:
                    shapes = f"{tuple(item.shape)}, and the parameter {tuple(parameter.shape)}"
                    differences.add(f"{slot!r} of position {position}, which is {name!r} now, is of shape {shapes}")
    differences.raise_if_any()
    return {
        **{key: value for key, value in tree.items() if key != "parameters"},
        "groups": [{**group, "params": [names[p] for p in group["params"]]} for group in tree["groups"]],
        "state": {names[position]: slots for position, slots in tree["state"].items()},
        "positional": False,
    }
