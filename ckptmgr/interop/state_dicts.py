"""Finding the state dict in what a file holds, and making an entry of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckptmgr.errors import UsageError
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.module import ModuleHandler
from ckptmgr.state.optimizer_names import is_numbered

__all__ = ["Found", "find_state_dict", "is_state_dict", "module_entry", "names_of_parameters"]

_MAX_DEPTH = 4
_BUFFER_ENDINGS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Found:
    """A state dict within a file.

    Attributes:
        state: Name → tensor, or plain extra state.
        key: Where it stood, with dots between the levels; None for the whole file.
    """

    state: Mapping[str, Any]
    key: str | None


def find_state_dict(value: Any, *, key: str | None, where: str) -> Found:
    """Find the model's state dict in a loaded value.

    Args:
        value: What the file holds.
        key: Where the user says that it is; None to look for the only one.
        where: The file, for messages.

    Raises:
        UsageError: There is none, or there are several; says which.
    """
    if key is not None:
        found = _at(value, key)
        if found is None or not is_state_dict(found):
            known = [name for name, _ in _candidates(value)]
            raise UsageError(
                f"{where} holds no state dict at {key!r}",
                why=f"it has one at {', '.join(map(repr, known))}" if known else f"it holds {_described(value)}",
                next=f"--key {known[0]}" if known else "give the file that holds the weights",
            )
        return Found(found, key)
    if is_state_dict(value):
        return Found(value, None)
    candidates = _candidates(value)
    if len(candidates) == 1:
        return Found(candidates[0][1], candidates[0][0])
    if not candidates:
        raise UsageError(
            f"{where} holds no state dict",
            why=f"it holds {_described(value)}",
            next="give the file that holds the weights",
        )
    names = [name for name, _ in candidates]
    raise UsageError(
        f"{where} holds {len(names)} state dicts",
        why=f"they stand at {', '.join(map(repr, names))}",
        next=f"choose one of them: --key {names[0]}",
    )


def is_state_dict(value: Any) -> bool:
    """Say whether a value looks like the state of a module: names of tensors, and perhaps extra state."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return False
    others = [name for name, item in value.items() if not isinstance(item, torch.Tensor)]
    return len(others) < len(value) and all(name.rpartition(".")[2] == "_extra_state" for name in others)


def module_entry(state: Mapping[str, Any], *, name: str = "model") -> CapturedEntry:
    """Return the entry that a module of this state would give."""
    tensors = {key: item for key, item in state.items() if isinstance(item, torch.Tensor)}
    tree: dict[str, Any] = {"tensors": tensors, "imported": True}
    if len(tree["tensors"]) < len(state):
        tree["values"] = {key: item for key, item in state.items() if key not in tree["tensors"]}
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):
        versions = {
            str(key): item["version"]
            for key, item in metadata.items()
            if isinstance(item, Mapping) and isinstance(item.get("version"), int) and item["version"] != 1
        }
        if versions:
            tree["versions"] = versions
    else:
        # Without versions torch would take the state for one of before versions, and convert it.
        tree["versions"] = _likely_versions(tree["tensors"])
    if not tree.get("versions"):
        tree.pop("versions", None)
    return CapturedEntry(name, ModuleHandler.name, ModuleHandler.version, tree)


def names_of_parameters(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what in a state dict is probably a parameter, tied ones once. A state dict does not say what is one."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, item in state.items():
        if not isinstance(item, torch.Tensor) or name.rpartition(".")[2] in _BUFFER_ENDINGS:
            continue
        if not (item.is_floating_point() or item.is_complex()):
            continue
        identity = (item.data_ptr(), tuple(item.shape)) if item.numel() and item.layout == torch.strided else None
        if identity is None or identity not in seen:
            found[name] = item
        if identity is not None:
            seen.add(identity)
    return found


def _likely_versions(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return version 2 for what has the counter that BatchNorm got with it."""
    ending = ".num_batches_tracked"
    return {name.removesuffix(ending): 2 for name in tensors if name.endswith(ending)}


def _at(value: Any, key: str) -> Any:
    if isinstance(value, Mapping) and key in value:
        return value[key]
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _candidates(value: Any, path: str = "", depth: int = 0) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, Mapping) or depth == _MAX_DEPTH or is_numbered(value):
        return []
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, item in value.items():
        inner = f"{path}.{name}" if path else str(name)
        if isinstance(name, str) and is_state_dict(item):
            found.append((inner, item))
        elif isinstance(name, str):
            found += _candidates(item, inner, depth + 1)
    return found


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
    return f"a {type(value).__name__}"
