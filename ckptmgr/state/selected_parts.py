"""Parts of a module and of an optimizer: what can be selected of them, and the tree that is restored for a selection.

Handlers restore whole objects. So what is left out of a module or an optimizer is put into the tree from the live
object itself, where restoring it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ckptmgr.errors import UsageError
from ckptmgr.state.dtype_policy import (
    Caster,
    are_floats,
    cast_slots,
    floats_named,
    name_of,
    own_tensors,
    refuse_to_retype,
)
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import unwrap_optimizer
from ckptmgr.state.optimizer_carry import LIVE_OPTIONS
from ckptmgr.state.optimizer_kinds import can_step_with
from ckptmgr.state.resizing import Resizer, resize_slots
from ckptmgr.state.selection import Choice, DtypePolicy, ResizePolicy, covers
from ckptmgr.state.tensors import dtype_name, memory_identity

__all__ = ["Build", "ModuleParts", "OptimizerParts", "is_module_tree", "is_optimizer_tree"]

_NO_OPTIONS = ("params", "param_names")


@dataclass(slots=True)
class Build:
    """What comes about while trees are built for one policy.

    Attributes:
        dtype: The policy.
        cast: Paths of tensors that get another dtype, with the dtypes before and after.
        casts: What was cast, by path: the values before and after.
        retyped: Live tensors, by id, that take the dtype of the checkpoint.
        caster: Casts saved tensors.
        resize: Patterns of tensors, and how they are resized.
        resized: Paths of those that were, by all names, with the shapes before and after.
        resizer: Resizes saved tensors.
        notes: Sentences for the user.
    """

    dtype: DtypePolicy
    cast: dict[str, tuple[str, str]] = field(default_factory=dict)
    casts: list[tuple[str, Any, Any]] = field(default_factory=list)
    retyped: dict[int, tuple[torch.Tensor, torch.dtype]] = field(default_factory=dict)
    caster: Caster = field(default_factory=Caster)
    resize: Mapping[str, ResizePolicy] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    resizer: Resizer = field(default_factory=Resizer)
    notes: list[str] = field(default_factory=list)


def is_module_tree(tree: Any) -> bool:
    """Say whether a tree has the form that the handler of modules gives it."""
    return isinstance(tree, Mapping) and all(
        isinstance(tree.get(part, {}), Mapping) for part in ("tensors", "values", "versions")
    )


def is_optimizer_tree(tree: Any) -> bool:
    """Say whether a tree has the form of the handler of optimizers, with parts that can be told apart."""
    return (
        isinstance(tree, Mapping)
        and "opaque" not in tree
        and isinstance(tree.get("state"), Mapping)
        and isinstance(tree.get("groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in tree["groups"])
    )


class ModuleParts:
    """The tensors and extra state of one module.

    Args:
        entry: Its entry.
        saved: Its tree in the checkpoint, by the live names; None where the checkpoint has none.
        live: What its handler captures of it now; None where the program has none.
        module: The live module.
    """

    def __init__(self, entry: str, saved: Any, live: Any, module: Any) -> None:
        self._entry = entry
        self._tree = saved or {"tensors": {}}
        self._live_tree = live or {}
        self._module = module
        self._saved, self._live = _items(self._tree), _items(self._live_tree)
        self._is_in_both = saved is not None and live is not None
        self.leaves: dict[str, tuple[str, ...]] = {f"{entry}/{name}": () for name in (*self._saved, *self._live)}
        self.told = list(self.leaves)

    def left_out(self, choice: Choice) -> list[str]:
        """Return the paths that are left out of a module of which something else is restored."""
        gone = [path for path in self.leaves if not choice.takes(path)]
        return gone if len(gone) < len(self.leaves) else []

    def tree(self, choice: Choice, build: Build) -> dict[str, Any]:
        """Return the tree to restore.

        Raises:
            UsageError: A tensor is left out and another name of it is not, or it cannot take the checkpoint's dtype.
        """
        taken = [name for name in self._saved if choice.takes(f"{self._entry}/{name}")]
        kept = [name for name in self._live if not choice.takes(f"{self._entry}/{name}")]
        self._refuse_halves(taken, kept)
        result = {**self._tree, "tensors": {}}
        values: dict[str, Any] = {}
        own = own_tensors(self._module) if self._is_in_both else {}
        retyped = []
        policies = self._policies(build.resize)
        for name in taken:
            item = self._saved[name]
            if name in own and name in self._live and are_floats(item, self._live[name]):
                words = name_of(item), name_of(self._live[name])
                if build.dtype == "live":
                    path, before = f"{self._entry}/{name}", item
                    item = build.caster.cast(item, self._live[name].dtype)
                    build.cast[path] = words
                    build.casts.append((path, before, item))
                elif build.dtype == "saved":
                    build.cast[f"{self._entry}/{name}"] = (words[1], words[0])
                    build.retyped[id(own[name])] = (own[name], item.dtype)
                    retyped.append(name)
            if name in policies and name in self._live:
                path, shape = f"{self._entry}/{name}", tuple(item.shape)
                item = build.resizer.resize(path, item, self._live[name], policies[name])
                if tuple(item.shape) != shape:
                    build.resized[path] = shape, tuple(item.shape)
            (result["tensors"] if name in self._tree["tensors"] else values)[name] = item
        if retyped:
            refuse_to_retype(self._entry, self._module, retyped)
        for name in kept:
            (result["tensors"] if name in self._live_tree["tensors"] else values)[name] = self._live[name]
        result.pop("values", None)
        if values:
            result["values"] = values
        self._put_versions(result, taken, kept)
        return result

    def _policies(self, resize: Mapping[str, ResizePolicy]) -> dict[str, ResizePolicy]:
        """Return how tensors are resized, by name; what holds for one name of a tensor holds for all of them."""
        found: dict[str, ResizePolicy] = {}
        for pattern, policy in resize.items():
            found |= {
                name: policy
                for name, item in self._live.items()
                if isinstance(item, torch.Tensor) and covers(pattern, f"{self._entry}/{name}")
            }
        if found:
            memory = {memory_identity(self._live[name]): policy for name, policy in found.items()}
            memory.pop(None, None)
            for name, item in self._live.items():
                if isinstance(item, torch.Tensor) and memory_identity(item) in memory:
                    found.setdefault(name, memory[memory_identity(item)])
        return found

    def _refuse_halves(self, taken: Sequence[str], kept: Sequence[str]) -> None:
        memory: dict[Any, str] = {}
        for name in taken:
            if isinstance(item := self._live.get(name), torch.Tensor):
                memory.setdefault(memory_identity(item), name)
        memory.pop(None, None)
        for name in kept:
            item = self._live[name]
            other = memory.get(memory_identity(item)) if isinstance(item, torch.Tensor) else None
            if other is not None:
                raise UsageError(
                    f"'{self._entry}/{name}' is left out and '{self._entry}/{other}' is not",
                    why="they are one tensor in the live module, so restoring the one would change the other",
                    next="leave out both, or none",
                )

    def _put_versions(self, result: dict[str, Any], taken: Sequence[str], kept: Sequence[str]) -> None:
        # Of the state that stays, the version is the live one: else the module would convert it.
        stays = {name.rpartition(".")[0] for name in kept} - {name.rpartition(".")[0] for name in taken}
        versions = {path: v for path, v in self._tree.get("versions", {}).items() if path not in stays}
        versions |= {path: v for path, v in self._live_tree.get("versions", {}).items() if path in stays}
        result.pop("versions", None)
        if versions:
            result["versions"] = versions


class OptimizerParts:
    """The options of an optimizer, and what it keeps for each parameter.

    Args:
        entry: Its entry.
        saved: Its tree in the checkpoint, by the live names; None where the checkpoint has none.
        live: What its handler captures of it now; None where the program has none.
        optimizer: The live optimizer.
        names: Those of the live parameters.
    """

    def __init__(self, entry: str, saved: Any, live: Any, optimizer: Any, names: ParameterNames) -> None:
        self._entry = entry
        self._tree = saved or {"groups": [], "state": {}}
        self._live_tree = live or {"groups": [], "state": {}}
        self._optimizer = unwrap_optimizer(optimizer)
        # Each live parameter by all of its names, with the one that its state goes by.
        self._parameters: dict[str, tuple[str, torch.Tensor, Mapping[str, Any]]] = {}
        aliases: dict[str, tuple[str, ...]] = {}
        if live is not None:
            for tree_group, group in zip(live["groups"], self._optimizer.param_groups, strict=True):
                for name, parameter in zip(tree_group["params"], group["params"], strict=True):
                    every = tuple(dict.fromkeys((name, *names.all_of(parameter))))
                    self._parameters.update(dict.fromkeys(every, (name, parameter, group)))
                    aliases.update(dict.fromkeys(every, every))
        self._aliases = aliases
        self._saved_names = [name for group in self._tree["groups"] for name in group["params"]]
        self._known = set(self._saved_names)
        live_names = [name for group in self._live_tree["groups"] for name in group["params"]]
        new = [name for name in live_names if self._known.isdisjoint(aliases[name])]
        options = dict.fromkeys(
            key for tree in (self._tree, self._live_tree) for group in tree["groups"] for key in group
        )
        self._options = [key for key in options if key not in _NO_OPTIONS]
        self.leaves: dict[str, tuple[str, ...]] = {f"{entry}/options/{key}": () for key in self._options}
        for name in (*self._saved_names, *new):
            others = tuple(f"{entry}/state/{other}" for other in aliases.get(name, ()) if other != name)
            self.leaves[f"{entry}/state/{name}"] = others
        self.told = [f"{entry}/options/{key}" for key in self._options if key not in LIVE_OPTIONS]
        self.told += [f"{entry}/state/{name}" for name in self._saved_names if name in self._tree["state"]]

    @property
    def learning_rate(self) -> str:
        """The path of the learning rate."""
        return f"{self._entry}/options/lr"

    def follow(self, choice: Choice, gone: Mapping[str, str | None]) -> None:
        """Leave out what goes with something that is left out.

        Args:
            choice: Changed.
            gone: Parameters that are left out of their modules, with the patterns that did it.
        """
        first = f"{self._entry}/options/initial_lr"
        if first in self.leaves and self.learning_rate in self.leaves and not choice.takes(self.learning_rate):
            # A schedule begins from it.
            choice.leave_out(first, choice.reason(self.learning_rate))
        if self._tree.get("flat"):
            return
        for path, others in self.leaves.items():
            for place in (path, *others):
                name = place.removeprefix(f"{self._entry}/state/")
                if name in gone:
                    choice.leave_out(path, f"{self._entry}/state/{gone[name] or name.rpartition('.')[0] + '.*'}")

    def kept_options(self, choice: Choice) -> frozenset[str]:
        """Return the options that stay as the live optimizer has them."""
        return frozenset(key for key in self._options if not choice.takes(f"{self._entry}/options/{key}"))

    def tree(self, choice: Choice, build: Build) -> dict[str, Any]:
        """Return the tree to restore.

        Raises:
            UsageError: Only a part of a state is selected that belongs to all parameters together.
        """
        kept = self.kept_options(choice)
        result = dict(self._tree)
        result["groups"] = [{k: v for k, v in group.items() if k not in kept} for group in self._tree["groups"]]
        taken = {name for name in self._saved_names if choice.takes(f"{self._entry}/state/{name}")}
        if self._tree.get("flat") and taken and len(taken) < len(self._saved_names):
            raise UsageError(
                f"{self._entry!r}: its state for {len(taken)} of {len(self._saved_names)} parameters is selected",
                why="what it keeps belongs to all parameters together",
                next=f"select all of it, or leave out '{self._entry}/state'",
            )
        result["state"] = {}
        result["parameters"] = dict(self._tree.get("parameters", {}))
        for group in result["groups"]:
            for name in group["params"]:
                slots = self._slots(name, group, build) if name in taken else self._live_slots(name, group)
                if slots is not None:
                    result["state"][name] = slots
                self._describe(name, result["parameters"], build, is_taken=name in taken)
        if "parameters" not in self._tree:
            del result["parameters"]
        if not taken:
            for key in ("other", "extra"):
                result.pop(key, None)
                if key in self._live_tree:
                    result[key] = self._live_tree[key]
        return result

    def _slots(self, name: str, group: Mapping[str, Any], build: Build) -> Any:
        slots = self._resized_slots(name, self._tree["state"].get(name), build)
        was, now = self._saved_dtype(name), self._dtype_now(name, build)
        if slots is None or was is None or now is None or build.dtype != "live" or not floats_named(was, now):
            return slots
        path, cast = f"{self._entry}/state/{name}", cast_slots(slots, was, now, build.caster)
        build.cast[path] = (was, now)
        if isinstance(slots, Mapping):
            build.casts += [(path, item, cast[key]) for key, item in slots.items() if cast[key] is not item]
        return cast

    def _resized_slots(self, name: str, slots: Any, build: Build) -> Any:
        shapes = self._resized(name, build)
        if shapes is None or not isinstance(slots, Mapping):
            return slots
        resized, why = resize_slots(slots, *shapes)
        if resized is None:
            build.notes.append(f"{self._entry}: its state for {name} begins anew, for it cannot be resized: {why}")
        return resized

    def _resized(self, name: str, build: Build) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the shapes of a parameter before and after, where it was resized."""
        described = self._tree.get("parameters", {}).get(name)
        names = (name, *self._aliases.get(name, ()))
        shapes = next((build.resized[it] for it in names if it in build.resized), None)
        return shapes if described is not None and shapes is not None and tuple(described[1]) == shapes[0] else None

    def _live_slots(self, name: str, group: Mapping[str, Any]) -> Any:
        """Return what the live optimizer has, where it can go on with it: mostly it has nothing yet."""
        if name not in self._parameters:
            return None
        live_name, _, options = self._parameters[name]
        slots = self._live_tree["state"].get(live_name)
        if isinstance(self._optimizer, Optimizer) and isinstance(slots, Mapping):
            return slots if can_step_with(self._optimizer, {**options, **group}, slots) else None
        return slots

    def _describe(self, name: str, described: dict[str, Any], build: Build, *, is_taken: bool) -> None:
        """Say of a parameter what the live one will be, where that is no reason to refuse its state."""
        now = self._dtype_now(name, build)
        if now is None or name not in described:
            return
        was, shape = described[name]
        if (resized := self._resized(name, build)) is not None:
            described[name] = [was, list(resized[1])]
            shape = described[name][1]
        if not is_taken:
            described[name] = [now, self._live_tree["parameters"][self._parameters[name][0]][1]]
        elif build.dtype != "strict" and floats_named(was, now):
            described[name] = [now, shape]

    def _saved_dtype(self, name: str) -> str | None:
        described = self._tree.get("parameters", {}).get(name)
        return described[0] if described else None

    def _dtype_now(self, name: str, build: Build) -> str | None:
        if name not in self._parameters:
            return None
        parameter = self._parameters[name][1]
        _, dtype = build.retyped.get(id(parameter), (None, parameter.dtype))
        return dtype_name(dtype)


def _items(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {**tree.get("tensors", {}), **tree.get("values", {})}
