"""What a checkpoint is to PyTorch's DCP: tensors and values by *fqn*, a flat name, in entries of our format.

The value at ``state["model"]["layers.0.weight"]`` has the fqn ``model.layers.0.weight`` and the path ``("model",
"layers.0.weight")``. It becomes the tensor ``layers.0.weight`` of the entry ``model``; so do those of a module that a
`Checkpointer` saved as ``model``. What lies at the top of the state dict itself goes into one entry, ``state``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.manifest import EntryRecord
from ckptmgr.format.tree import encode_tree
from ckptmgr.state.codec import encode_value

__all__ = ["HANDLER", "VERSION", "StatePath", "StoredNames", "encode_entry", "loose_entry", "place_of", "read_names"]

HANDLER = "dcp"
VERSION = 1

StatePath: TypeAlias = tuple[str | int, ...]
"""The keys on the way from the top of a state dict to a value."""

_MAPPINGS = {"$dict", "$ordered_dict"}
_REFERENCES = ("$tensor", "$array", "$sparse")


def place_of(fqn: str, path: StatePath, loose: str) -> tuple[str, str]:
    """Return entry and name of a value.

    Args:
        fqn: Its flat name.
        path: Its way through the state dict.
        loose: The entry of what lies at the top.
    """
    if len(path) < 2:
        return loose, fqn
    entry = str(path[0])
    return entry, fqn.removeprefix(f"{entry}.")


def loose_entry(paths: Iterable[StatePath]) -> str:
    """Return the name of the entry for what lies at the top of the state dict: none that a nested dict has."""
    nested = {str(path[0]) for path in paths if len(path) > 1}
    name, number = "state", 2
    while name in nested:
        name, number = f"state~{number}", number + 1
    return name


def encode_entry(tensors: Iterable[str], values: Mapping[str, Any], paths: Mapping[str, StatePath], entry: str) -> Any:
    """Return the encoded tree of an entry.

    Args:
        tensors: Names of its tensors.
        values: Its values by name, as they were.
        paths: The way to each of both.
        entry: Its name, for messages.
    """

    def leaf(item: object, path: object) -> dict[str, Any] | None:
        return {"$tensor": item.name} if isinstance(item, _Reference) else None

    return {
        "tensors": encode_tree({name: _Reference(name) for name in tensors}, leaf, path=(entry,)),
        "values": encode_value(dict(values), (entry,)),
        "paths": encode_tree({name: list(path) for name, path in paths.items()}, path=(entry,)),
    }


@dataclass(frozen=True, slots=True)
class StoredNames:
    """What of a checkpoint DCP can read.

    Attributes:
        tensors: Fqn → entry, and name of the tensor in the manifest.
        values: Fqn → the encoded value.
        paths: Fqn → the way to it.
        unreadable: What it cannot read: a name, or the beginning of names → why.
    """

    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, StatePath] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def read_names(entries: Iterable[EntryRecord], document: Any, where: str) -> StoredNames:
    """Find out what a checkpoint is to DCP.

    Args:
        entries: Those of its manifest.
        document: The state document of rank 0, as parsed JSON.
        where: The checkpoint, for messages.

    Raises:
        CorruptCheckpointError: The document is not as the format says.
    """
    names = StoredNames()
    try:
        trees = document["entries"]
        for entry in entries:
            if entry.handler == HANDLER and entry.handler_version == VERSION:
                _add_entry(names, entry.name, trees[entry.name])
            elif entry.handler == "module":
                _add_module(names, entry.name, trees[entry.name])
            else:
                names.unreadable[entry.name] = (
                    f"the handler {entry.handler!r} saved it, and only a Checkpointer or Lightning restores that"
                )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CorruptCheckpointError(
            f"the state document of {where} is not as the format says",
            why=f"{type(error).__name__}: {error}",
            next="load another checkpoint; `ckptmgr ls` lists them",
        ) from error
    return names


def _add_entry(names: StoredNames, entry: str, tree: Any) -> None:
    paths = {name: tuple(path) for name, path in _items(tree["paths"])}
    for name, item in _items(tree["tensors"]):
        _add(names, paths[name], tensor=(entry, item["$tensor"]))
    for name, item in _items(tree["values"]):
        _add(names, paths[name], value=item)


def _add_module(names: StoredNames, entry: str, tree: Any) -> None:
    for name, item in _items(tree["tensors"]):
        _add_flattened(names, entry, (entry, name), item)
    for name, item in _items(tree.get("values", {})):
        _add_flattened(names, entry, (entry, name), item)


def _add_flattened(names: StoredNames, entry: str, path: StatePath, item: Any) -> None:
    """Add what DCP would see of a value: dicts one by one, anything else as one."""
    if isinstance(item, dict) and item.keys() == {"$tensor"}:
        _add(names, path, tensor=(entry, item["$tensor"]))
    elif isinstance(item, dict) and (item.keys() & _MAPPINGS or not any(key.startswith("$") for key in item)):
        for key, inner in _items(item):
            _add_flattened(names, entry, (*path, str(key)), inner)
    elif _refers(item):
        names.unreadable[".".join(map(str, path))] = "there are tensors or arrays in a value of another kind"
    else:
        _add(names, path, value=item)


def _add(names: StoredNames, path: StatePath, *, tensor: tuple[str, str] | None = None, value: Any = None) -> None:
    fqn = ".".join(map(str, path))
    if fqn in names.paths:
        raise ValueError(f"{fqn} stands for two things: {names.paths[fqn]} and {path}")
    names.paths[fqn] = path
    if tensor is not None:
        names.tensors[fqn] = tensor
    else:
        names.values[fqn] = value


def _items(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the items of an encoded dict, still encoded."""
    tag = next(iter(tree), None)
    yield from tree[tag] if tag in _MAPPINGS else tree.items()


def _refers(tree: Any) -> bool:
    """Say whether an encoded value refers to tensors of its entry."""
    if isinstance(tree, list):
        return any(map(_refers, tree))
    if not isinstance(tree, dict):
        return False
    return any(key in _REFERENCES for key in tree) or any(map(_refers, tree.values()))


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str
