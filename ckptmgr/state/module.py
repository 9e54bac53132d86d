"""Modules: parameters, persistent buffers and extra state, under the module's own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.state.differences import Differences, tensor_difference
from ckptmgr.state.entry import EntryScope, TensorScope
from ckptmgr.state.names import ParameterNames, WrapperPrefixes, buffer_scopes, module_names
from ckptmgr.state.prefixes import nearest_rule, shapes_of
from ckptmgr.state.sharding import SavedPart, as_live
from ckptmgr.state.tensors import memory_identity, same_bits
from ckptmgr.state.trees import copied_tree, copy_into

__all__ = ["ModuleHandler"]

_NEXT = (
    "build the module as in the run that saved it, or restore another checkpoint; "
    "nothing was changed by this attempt to restore"
)


class ModuleHandler:
    """Captures what ``state_dict()`` gives, with the prefixes of wrappers removed.

    The tree is ``{"tensors": {name: tensor}}``, with ``"values": {name: value}`` for extra state that is no tensor, and
    ``"versions": {module: number}`` for modules whose state dict has a version other than 1; and ``"imported": True``
    where another tool wrote it.

    A module that loads its state in torch's own way is restored by copying into its tensors, which cannot fail once
    shapes and dtypes have been checked. One with hooks or code of its own is given its state through
    ``load_state_dict``.
    """

    name = "module"
    version = 1
    scope: EntryScope = "replicated"

    def handles(self, value: object) -> bool:
        """Say whether the value is a module."""
        return isinstance(value, nn.Module)

    def tensor_scopes(self, value: nn.Module) -> dict[str, TensorScope]:
        """Say which ranks' buffers count.

        DDP sends those of rank 0 to all ranks before each forward, so between two steps they differ by design. Where it
        does not (``broadcast_buffers=False``), or where nobody knows, each rank may have its own.
        """
        return dict(buffer_scopes(value))

    def capture(self, value: nn.Module, names: ParameterNames) -> dict[str, Any]:
        """Return the module's state; tensors are the live ones."""
        _refuse_unready(value)
        state, _ = _own_state(value)
        tensors = {name: item for name, item in state.items() if isinstance(item, torch.Tensor)}
        tree: dict[str, Any] = {"tensors": tensors}
        if len(tensors) < len(state):
            tree["values"] = {name: item for name, item in state.items() if name not in tensors}
        if versions := _versions(value):
            tree["versions"] = versions
        return tree

    def check(self, value: nn.Module, tree: Any, names: ParameterNames) -> None:
        """Compare names, shapes, dtypes and ties, and tell the complete difference."""
        _refuse_unready(value)
        live, _ = _own_state(value)
        memory = _live_memory(value)
        saved = _saved_state(tree, live)
        differences = Differences("the module", next=_NEXT)
        differences.add_names("missing in the checkpoint", (name for name in live if name not in saved))
        differences.add_names("not in the live module", (name for name in saved if name not in live))
        for name, item in live.items():
            if name not in saved:
                continue
            # Extra state, and what hooks compute, may change its shape: the module's own loading decides about it.
            if isinstance(item, torch.Tensor) and memory_identity(item) in memory:
                differences.add(tensor_difference(name, item, saved[name]))
        if live.keys() != saved.keys():
            differences.add(nearest_rule(shapes_of(saved), shapes_of(live)))
        differences.raise_if_any()
        for line in _tie_differences(live, saved):
            differences.add(line)
        differences.raise_if_any()

    def restore(self, value: nn.Module, tree: Any, names: ParameterNames) -> None:
        """Copy the saved state into the live tensors."""
        live, keys = _own_state(value)
        saved = _saved_state(tree, live)
        if _loads_plainly(value, live):
            with torch.no_grad():
                for name, tensor in live.items():
                    copy_into(tensor, saved[name])
            return
        state = _StateDict((key, as_live(saved[name], live[name])) for name, key in keys.items())
        # Without versions a module would take the state for one from before versions, and convert it again.
        versions = tree.get("versions", {})
        state._metadata = {
            key.removesuffix("."): {"version": versions.get(own.removesuffix("."), 1)}
            for _, key, own in module_names(value)
        }
        value.load_state_dict(state)

    def backup(self, value: nn.Module, names: ParameterNames) -> Callable[[], None] | None:
        """Copy the state of a module that runs code of its own while loading; others cannot fail."""
        live, _ = _own_state(value)
        if _loads_plainly(value, live):
            return None
        tree = copied_tree(self.capture(value, names))
        return lambda: self.restore(value, tree, names)


def _saved_state(tree: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved state by name. Other tools write a tied tensor once, and leave its other names to the module."""
    saved: dict[str, Any] = {**tree["tensors"], **tree.get("values", {})}
    if tree.get("imported"):
        by_memory = {memory_identity(item): saved[name] for name, item in live.items() if _is_one(item, name, saved)}
        by_memory.pop(None, None)
        for name, item in live.items():
            if name not in saved and isinstance(item, torch.Tensor) and memory_identity(item) in by_memory:
                saved[name] = by_memory[memory_identity(item)]
    return saved


def _is_one(item: Any, name: str, saved: Mapping[str, Any]) -> bool:
    return isinstance(item, torch.Tensor) and name in saved


class _StateDict(dict[str, Any]):
    """A state dict that can carry the attribute in which torch keeps the versions."""

    _metadata: dict[str, dict[str, Any]]


def _own_state(module: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the state dict by own names, and the key of each name."""
    prefixes = WrapperPrefixes(module)
    state: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, item in module.state_dict().items():
        name = prefixes.own_name(key)
        if name in state:
            raise UnsupportedStateError(
                f"two entries of a module's state dict are both called {name!r}",
                why=f"{keys[name]!r} and {key!r} differ only by the prefix of a wrapper",
                next="rename one of the attributes",
            )
        state[name], keys[name] = item, key
    return state, keys


def _refuse_unready(module: nn.Module) -> None:
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        if torch.nn.parameter.is_lazy(parameter):
            raise UnsupportedStateError(
                f"the module's {name!r} is not initialised",
                why="it is lazy: its shape is known only after the first batch",
                next="run one batch through the module before the first save or restore",
            )
        if parameter.device.type == "meta":
            raise UnsupportedStateError(
                f"the module's {name!r} is on the meta device and has no values",
                why="the module was built without memory",
                next="materialise it first: module.to_empty(device=...)",
            )


def _versions(module: nn.Module) -> dict[str, int]:
    versions: dict[str, int] = {}
    for part, _, own in module_names(module):
        version = part._version
        if version != 1:
            versions[own.removesuffix(".")] = version
    return versions


def _loads_plainly(module: nn.Module, live: Mapping[str, Any]) -> bool:
    """Say whether copying into the tensors of the state dict is all that loading would do."""
    memory = _live_memory(module)
    # A state dict that a hook computes holds copies: writing into them would change nothing.
    if not all(isinstance(item, torch.Tensor) and memory_identity(item) in memory for item in live.values()):
        return False
    return all(_is_plain(part) for part, _, _ in module_names(module))


def _live_memory(module: nn.Module) -> set[tuple[object, ...] | None]:
    """Identify the memory of all parameters and buffers; None stands for tensors without any."""
    return {None, *(memory_identity(tensor) for tensor in (*module.parameters(), *module.buffers()))}


def _is_plain(module: nn.Module) -> bool:
    if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return False
    for method in ("load_state_dict", "_load_from_state_dict"):
        own = getattr(type(module), method)
        # torch's layers override these only to read state dicts of old versions.
        if own is not getattr(nn.Module, method) and not own.__module__.startswith("torch.nn.modules."):
            return False
    return True


def _tie_differences(live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Compare which names share one tensor: training goes on differently when a tie is gone, or new."""
    lines: list[str] = []
    first_live: dict[object, str] = {}
    first_saved: dict[object, str] = {}
    for name, item in live.items():
        tied_to = _first_of(first_live, item, name)
        was_tied_to = _first_of(first_saved, saved[name], name)
        if tied_to == was_tied_to:
            continue
        if tied_to != name and not (was_tied_to == name and _same_saved(saved[tied_to], saved[name])):
            lines.append(f"{name!r} is tied to {tied_to!r} now, and has other values than it in the checkpoint")
        elif was_tied_to != name:
            lines.append(f"{name!r} is tied to {was_tied_to!r} in the checkpoint, and a tensor of its own now")
    return lines


def _same_saved(one: Any, other: Any) -> bool:
    if isinstance(one, SavedPart) and isinstance(other, SavedPart):
        return same_bits(one.local, other.local)
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and same_bits(one, other)


def _first_of(first: dict[object, str], item: Any, name: str) -> str:
    if isinstance(item, SavedPart):
        # The names of one saved tensor give one part.
        return first.setdefault(id(item), name)
    identity = memory_identity(item) if isinstance(item, torch.Tensor) else None
    return name if identity is None else first.setdefault(identity, name)
