"""Optimizers: state by parameter name, restored with the bits that were saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.state.differences import Differences, describe, dtype_and_shape
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer_names import GroupNames, check_names, is_numbered, to_indices, to_names
from ckptmgr.state.trees import copied_tree, same_structure_copy

__all__ = ["OptimizerHandler", "group_names", "unwrap_optimizer"]

_LIGHTNING_MODULES = ("lightning.pytorch.core.optimizer", "pytorch_lightning.core.optimizer")


class OptimizerHandler:
    """Captures an optimizer by parameter name.

    The tree is that of `optimizer_names.to_names`, with ``"type": class name`` and
    ``"parameters": {name: [dtype, shape]}``. An optimizer with a state dict of its own making is kept whole as
    ``"opaque"`` and restored only for the same list of parameters.

    Hyper-parameters come from the checkpoint; options that say how the live optimizer computes (fused, foreach,
    capturable) and the place of ``step`` and of tensor learning rates follow the live optimizer.
    """

    name = "optimizer"
    version = 1

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
        if tree.get("type", live_type) != live_type:
            # torch takes any state: the moments of one kind would lie unused, or be taken for those of another.
            raise StateMismatchError(
                f"the optimizer of the checkpoint is of another kind: {tree['type']}, the live one {live_type}",
                why="the state of one kind means nothing to another",
                next="build the same optimizer; to train on with another, start a new run from these weights",
            )
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
        check_names(tree, listed)
        differences = Differences(
            "the optimizer", next="build the module and the optimizer as in the run that saved them"
        )
        described = tree.get("parameters", {})
        for group, group_listed in zip(optimizer.param_groups, listed, strict=True):
            for parameter, name in zip(group["params"], group_listed, strict=True):
                saved, live = described.get(name), dtype_and_shape(parameter)
                if saved is not None and list(saved) != live:
                    differences.add(f"{name!r} was {saved[0]} {tuple(saved[1])}, and is {live[0]} {tuple(live[1])} now")
        differences.raise_if_any()

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Load the state in the live order of the parameters."""
        optimizer = unwrap_optimizer(value)
        if "opaque" in tree:
            optimizer.load_state_dict(same_structure_copy(tree["opaque"]))
            return
        listed, _ = _live_names(optimizer, tree, names)
        live_groups = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(to_indices(same_structure_copy(tree), listed, live_groups))
        for group, live in zip(optimizer.param_groups, live_groups, strict=True):
            _keep_live_tensors(group, live)
        for group, group_listed in zip(optimizer.param_groups, listed, strict=True):
            for parameter, name in zip(group["params"], group_listed, strict=True):
                if name in tree["state"]:
                    optimizer.state[parameter] = _uncast(tree["state"][name], optimizer.state[parameter])

    def backup(self, value: Any, names: ParameterNames) -> Callable[[], None]:
        """Remember the live state itself: torch's loading replaces it and writes into nothing but tensor options."""
        optimizer = unwrap_optimizer(value)
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            tree = copied_tree(self.capture(value, names))
            return lambda: self.restore(value, tree, names)
        state, groups = optimizer.state, list(optimizer.param_groups)
        options = [dict(group) for group in groups]
        tensors = [
            (item, item.clone()) for group in groups for item in group.values() if isinstance(item, torch.Tensor)
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


def _keep_live_tensors(group: dict[str, Any], live: dict[str, Any]) -> None:
    """Write restored options into tensors that the program or a CUDA graph may hold, such as a tensor learning rate."""
    for key, before in live.items():
        after = group.get(key)
        if isinstance(before, torch.Tensor) and isinstance(after, (torch.Tensor, int, float)):
            with torch.no_grad():
                before.copy_(torch.as_tensor(after))
            group[key] = before
        elif isinstance(before, float) and isinstance(after, torch.Tensor) and after.numel() == 1:
            group[key] = after.item()


def _uncast(saved: Any, loaded: Any) -> Any:
    """Undo torch's casts: it brings all floating state to the parameter's dtype, which rounds the float32 moments of a
    bfloat16 parameter; and it rebuilds anything iterable, which breaks strings.
    """
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(device=loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        # The place and dtype of `step` follow the live optimizer's kind of kernel.
        return {key: loaded[key] if key == "step" else _uncast(item, loaded.get(key)) for key, item in saved.items()}
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)) and len(saved) == len(loaded):
        return type(saved)(_uncast(item, other) for item, other in zip(saved, loaded, strict=True))
    return saved
