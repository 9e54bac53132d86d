"""Optimizers: state by parameter name, restored with the bits that were saved."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.state.carried_groups import note_sources
from ckptmgr.state.differences import Differences, describe, dtype_and_shape
from ckptmgr.state.entry import EntryScope
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer_carry import Carry, GroupNames, plan_carry, same_value
from ckptmgr.state.optimizer_kinds import (
    can_step_with,
    can_take_over,
    followed_options,
    options_in_force,
    slot_changes,
)
from ckptmgr.state.optimizer_names import is_numbered, to_indices, to_names
from ckptmgr.state.optimizer_positions import in_live_names_by_position
from ckptmgr.state.optimizer_slots import keep_live_tensors, like_live, uncast
from ckptmgr.state.sharding import as_live, is_sharded
from ckptmgr.state.trees import copied_tree, same_structure_copy

__all__ = ["OptimizerHandler", "carry_into", "group_names", "unwrap_optimizer"]

_log = logging.getLogger("ckptmgr")

_LIGHTNING_MODULES = ("lightning.pytorch.core.optimizer", "pytorch_lightning.core.optimizer")


class OptimizerHandler:
    """Captures an optimizer by parameter name.

    The tree is that of `optimizer_names.to_names`, with ``"type": class name`` and
    ``"parameters": {name: [dtype, shape]}``. An optimizer with a state dict of its own making is kept whole as
    ``"opaque"`` and restored only for the same list of parameters.

    A restore carries state by name into whatever order and groups the live optimizer has. Parameters that the
    checkpoint has not keep the state that they have, which is mostly none; what the live optimizer has not is dropped.

    Hyper-parameters come from the checkpoint; options that say how the live optimizer computes (fused, foreach,
    capturable) and the place of ``step`` and of tensor learning rates follow the live optimizer.
    """

    name = "optimizer"
    version = 1
    scope: EntryScope = "replicated"

    def handles(self, value: object) -> bool:
        """Say whether the value is an optimizer, or Lightning's wrapper of one."""
        return isinstance(unwrap_optimizer(value), Optimizer)

    def capture(self, value: Any, names: ParameterNames) -> dict[str, Any]:
        """Return the state by parameter name; tensors are the live ones."""
        optimizer = unwrap_optimizer(value)
        listed, positional = group_names(optimizer, names)
        state_dict = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        flat_names = [name for group in listed for name in group]
        described = {name: dtype_and_shape(p) for name, p in zip(flat_names, parameters, strict=True)}
        if not is_numbered(state_dict):
            groups = [{"params": list(group)} for group in listed]
            tree = {"groups": groups, "state": {}, "positional": positional, "flat": True, "opaque": state_dict}
        else:
            tree = to_names(state_dict, listed, positional=positional)
            tree["flat"] = tree["flat"] or isinstance(optimizer, LBFGS)
        tree["type"] = type(optimizer).__qualname__
        tree["parameters"] = described
        return tree

    def check(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Compare parameters, groups and shapes."""
        optimizer = unwrap_optimizer(value)
        live_type = type(optimizer).__qualname__
        if tree.get("type", live_type) != live_type and not can_take_over(tree, optimizer):
            # torch takes any state: the moments of one kind would lie unused, or be taken for those of another.
            raise StateMismatchError(
                f"the optimizer of the checkpoint is of another kind: {tree['type']}, the live one {live_type}",
                why="the state of one kind means nothing to another",
                next="build the same optimizer; to train on with another, start a new run from these weights",
            )
        tree = in_live_names_by_position(tree, optimizer, *group_names(optimizer, names))
        listed, positional = _live_names(optimizer, tree, names)
        if positional != tree["positional"]:
            named, unnamed = (
                ("live optimizer", "checkpoint") if tree["positional"] else ("checkpoint", "live optimizer")
            )
            raise StateMismatchError(
                "the optimizer's parameters cannot be matched by name",
                why=f"those of the {named} have names, those of the {unnamed} have only positions",
                next="capture the optimizer together with its module, as in the run that saved",
            )
        if ("opaque" in tree) == is_numbered(optimizer.state_dict()):
            raise StateMismatchError(
                "the optimizer of the checkpoint is of another kind than the live one",
                why="one of them has a state dict of its own form, the other has torch's",
                next="build the optimizer as in the run that saved",
            )
        carry = plan_carry(tree, listed, follows_live=followed_options(tree, optimizer))
        differences = Differences(
            "the optimizer", next="build the module and the optimizer as in the run that saved them"
        )
        described = tree.get("parameters", {})
        for _, parameter, name in _each(optimizer, listed):
            saved, live = described.get(name), dtype_and_shape(parameter)
            if saved is not None and list(saved) != live:
                differences.add(f"{name!r} was {saved[0]} {tuple(saved[1])}, and is {live[0]} {tuple(live[1])} now")
        for name, slot in slot_changes(tree, carry, optimizer.param_groups, listed, optimizer).missing:
            differences.add(f"{name!r} came into a group whose options need {slot!r}, which it has not kept so far")
        differences.raise_if_any()
        note_sources(optimizer, len(tree["groups"]), carry.sources)

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Load the state by name, and say what is not simply carried over."""
        optimizer = unwrap_optimizer(value)
        if "opaque" in tree:
            optimizer.load_state_dict(same_structure_copy(tree["opaque"]))
            return
        tree = in_live_names_by_position(tree, optimizer, *group_names(optimizer, names))
        listed, _ = _live_names(optimizer, tree, names)
        followed = followed_options(tree, optimizer)
        carry = plan_carry(tree, listed, follows_live=followed)
        told = _told(optimizer, tree, carry, followed)
        live_groups = [dict(group) for group in optimizer.param_groups]
        kept = {name: optimizer.state[p] for _, p, name in _each(optimizer, listed) if p in optimizer.state}
        tree = same_structure_copy(tree)
        changes = slot_changes(tree, carry, live_groups, listed, optimizer)
        for name, slot in changes.unused:
            del tree["state"][name][slot]
        for _, parameter, name in _each(optimizer, listed):
            if is_sharded(parameter) and name in tree["state"]:
                slots = tree["state"][name]
                tree["state"][name] = {slot: as_live(item, parameter) for slot, item in slots.items()}
        optimizer.load_state_dict(to_indices(tree, listed, live_groups, follows_live=followed))
        for group, live in zip(optimizer.param_groups, live_groups, strict=True):
            keep_live_tensors(group, live)
        is_new = set(carry.initialised)
        for group, parameter, name in _each(optimizer, listed):
            if name in tree["state"]:
                slots = uncast(tree["state"][name], optimizer.state[parameter])
                optimizer.state[parameter] = like_live(optimizer, parameter, group, slots)
            elif name in is_new and name in kept and can_step_with(optimizer, group, kept[name]):
                optimizer.state[parameter] = kept[name]
        for level, line in (*told, *((logging.WARNING, line) for line in changes.told())):
            _log.log(level, "optimizer %s: %s", type(optimizer).__qualname__, line)

    def backup(self, value: Any, names: ParameterNames) -> Callable[[], None]:
        """Remember the live state itself: torch's loading replaces it and writes into nothing but tensor options."""
        optimizer = unwrap_optimizer(value)
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            tree = copied_tree(self.capture(value, names))
            return lambda: self.restore(value, tree, names)
        state, groups = optimizer.state, list(optimizer.param_groups)
        options = [dict(group) for group in groups]
        tensors = [
            (item, item.clone())
            for group in groups
            for key, option in group.items()
            if key != "params"
            for item in (option if isinstance(option, tuple) else (option,))
            if isinstance(item, torch.Tensor)
        ]

        def undo() -> None:
            for group, before in zip(groups, options, strict=True):
                group.clear()
                group.update(before)
            with torch.no_grad():
                for tensor, value_before in tensors:
                    tensor.copy_(value_before)
            optimizer.state, optimizer.param_groups = state, groups

        return undo


def unwrap_optimizer(value: Any) -> Any:
    """Return the optimizer inside of Lightning's wrapper, or the value itself."""
    for place in _LIGHTNING_MODULES:
        wrapper = getattr(sys.modules.get(place), "LightningOptimizer", None)
        if wrapper is not None and isinstance(value, wrapper):
            return value.optimizer
    return value


def group_names(optimizer: Optimizer, names: ParameterNames) -> tuple[list[list[str]], bool]:
    """Name the parameters of each group: by the captured modules, by ``param_names``, else by position.

    Returns:
        The names, and whether they are positions.

    Raises:
        UnsupportedStateError: There are captured modules and a parameter is in none of them; or a name stands twice.
    """
    listed: list[list[str | None]] = []
    for group in optimizer.param_groups:
        own = group.get("param_names") or [None] * len(group["params"])
        listed.append([names.of(p) or name for p, name in zip(group["params"], own, strict=True)])
    unnamed = [(g, i) for g, group in enumerate(listed) for i, name in enumerate(group) if name is None]
    if unnamed and not names.is_empty:
        position, index = unnamed[0]
        parameter = optimizer.param_groups[position]["params"][index]
        raise UnsupportedStateError(
            f"parameter {index} of group {position} of the optimizer, {describe(parameter)}, is in no captured module",
            why=f"state is saved by parameter name, and {len(unnamed)} of its parameters have none"
            + (": was the module rebuilt after the optimizer was made?" if (position, index) == (0, 0) else ""),
            next="put the module that owns it into the state too, or give the optimizer named parameters: "
            "optimizer(module.named_parameters())",
        )
    if unnamed:
        return [[f"{g}/{i}" for i in range(len(group))] for g, group in enumerate(listed)], True
    named = [[name for name in group if name is not None] for group in listed]
    every = [name for group in named for name in group]
    if len(set(every)) != len(every):
        twice = next(name for name in every if every.count(name) > 1)
        raise UnsupportedStateError(
            f"two parameters of the optimizer are called {twice!r}",
            why="param_names names them alike, and no captured module tells them apart",
            next="put the modules into the state too, or give the optimizer unique names",
        )
    return named, False


def _live_names(optimizer: Optimizer, tree: Any, names: ParameterNames) -> tuple[GroupNames, bool]:
    """Name the live parameters as the checkpoint does: a tied parameter has several names and goes by any of them."""
    listed, positional = group_names(optimizer, names)
    saved = {name for group in tree["groups"] for name in group["params"]}
    for group, group_listed in zip(optimizer.param_groups, listed, strict=True):
        for index, parameter in enumerate(group["params"]):
            if group_listed[index] not in saved:
                known = (name for name in names.all_of(parameter) if name in saved)
                group_listed[index] = next(known, group_listed[index])
    return listed, positional


def carry_into(optimizer: Optimizer, tree: Any, names: ParameterNames) -> Carry:
    """Return what becomes of a checkpoint's state in a live optimizer.

    Raises:
        StateMismatchError, UnsupportedStateError: It fits in no way; `OptimizerHandler.check` tells everything.
    """
    listed, _ = _live_names(optimizer, tree, names)
    return plan_carry(tree, listed, follows_live=followed_options(tree, optimizer))


def _each(optimizer: Optimizer, listed: GroupNames) -> Iterator[tuple[dict[str, Any], Any, str]]:
    """Yield every parameter with its group and its name."""
    for group, group_listed in zip(optimizer.param_groups, listed, strict=True):
        for parameter, name in zip(group["params"], group_listed, strict=True):
            yield group, parameter, name


def _told(optimizer: Optimizer, tree: Any, carry: Carry, followed: Iterable[str]) -> list[tuple[int, str]]:
    """Return what there is to say about a restore, with its level; call it before the options change."""
    lines: list[tuple[int, str]] = []
    if not carry.is_in_place:
        lines.append((logging.INFO if carry.is_complete else logging.WARNING, f"state {carry}"))
    lines.extend((logging.WARNING, line) for line in carry.mixed)
    saved_type = tree.get("type", type(optimizer).__qualname__)
    if saved_type == type(optimizer).__qualname__:
        return lines
    changed: dict[str, tuple[Any, Any]] = {}
    for position, live in enumerate(optimizer.param_groups):
        saved = options_in_force(tree, carry, optimizer.param_groups, position)
        for key in sorted(followed):
            if not same_value(saved.get(key), live.get(key)):
                changed.setdefault(key, (live.get(key), saved.get(key)))
    text = f"it goes on with the moments and steps of {saved_type}"
    if changed:
        values = ", ".join(f"{key}={now} ({was} in the checkpoint)" for key, (now, was) in changed.items())
        text += (
            f"; this program's are {values}, for decay means another thing there; other options are the checkpoint's"
        )
    return [(logging.WARNING, text), *lines]
