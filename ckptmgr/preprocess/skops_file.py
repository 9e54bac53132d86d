"""skops files without loading them: bounded, rewritten so that the same state gives the same bytes, and readable.

A skops file is a zip of a ``schema.json``, which describes the object as nested nodes, and of arrays in NumPy's own
format. Numbers of objects and names of arrays in it are addresses in memory, so they differ from save to save.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["canonical_skops", "check_skops", "loaders_of", "readable_skops"]

_SCHEMA = "schema.json"
_MAX_DEPTH = 200
# Values that cannot change: whether two places hold one of them or two equal ones means nothing.
_IMMUTABLE = frozenset({"JsonNode", "TypeNode", "FunctionNode", "TupleNode", "OperatorFuncNode", "UfuncNode"})
# Lists of (name, estimator, ...): their order means something, and their names are what people know.
_NAMED_STEPS = frozenset({"steps", "transformer_list", "transformers", "transformers_", "estimators"})
# scikit-learn notes the address of a list here, and the version that is told apart in the environment.
_NO_STATE = frozenset({"_stop_words_id"})
_VERSION = "_sklearn_version"


def check_skops(data: bytes) -> dict[str, bytes]:
    """Return the members of a skops file that is no larger inside than outside.

    Raises:
        ValueError: It is no zip, is compressed, or has members or arrays that pretend to be larger than they are.
    """
    members = _members(data)
    if _SCHEMA not in members:
        raise ValueError(f"it has no {_SCHEMA}")
    for name, content in members.items():
        if name.endswith(".npy"):
            _check_array(content)
        elif name.endswith(".npz"):
            for array in _members(content).values():
                _check_array(array)
    return members


def canonical_skops(data: bytes) -> bytes:
    """Return a skops file with the same content, and the same bytes in every process.

    Args:
        data: What `skops.io.dumps` gave.
    """
    members = _members(data)
    schema = json.loads(members[_SCHEMA])
    numbers: dict[Any, int] = {}
    names: dict[str, str] = {}
    _rewrite(schema, numbers, names)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for old, new in names.items():
            content = members[old]
            _add(archive, new, _stored(content) if old.endswith(".npz") else content)
        _add(archive, _SCHEMA, json.dumps(schema, separators=(",", ":")).encode())
    return stream.getvalue()


def loaders_of(data: bytes) -> dict[str, set[str]]:
    """Return what the file names, each with the loaders that would load it."""
    found: dict[str, set[str]] = {}

    def look(node: Any) -> None:
        if _is_node(node):
            found.setdefault(f"{node['__module__']}.{node['__class__']}", set()).add(node["__loader__"])
        if isinstance(node, (dict, list)):
            for item in node.values() if isinstance(node, dict) else node:
                look(item)

    look(json.loads(_members(data)[_SCHEMA]))
    return found


def readable_skops(data: bytes) -> Any:
    """Return what a skops file describes, as nested plain values; nothing is imported or built.

    An object is a dict of its attributes, with its ``class``. Versions are left out: they say nothing about meaning.

    Raises:
        ValueError: It is no skops file.
    """
    members = check_skops(data)
    schema = json.loads(members[_SCHEMA])
    for key in ("protocol", "_skops_version"):
        schema.pop(key, None)
    return _Reader(members).read(schema)


def _members(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            listed = archive.infolist()
            if sum(member.file_size for member in listed) > len(data):
                # Checked before anything is inflated: a small file must not become a large one.
                if any(member.compress_type != zipfile.ZIP_STORED for member in listed):
                    raise ValueError("it is compressed; checkpoints hold such files stored as they are")
                raise ValueError("its members overlap")
            if len({member.filename for member in listed}) < len(listed):
                raise ValueError("it has two members of one name")
            return {member.filename: archive.read(member) for member in listed}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"it is no intact zip: {error}") from error


def _check_array(content: bytes) -> None:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"an array is of version {version} of NumPy's format")
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    # NumPy allocates what a header asks for before it reads.
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > len(content):
        raise ValueError(f"an array of shape {shape} and type {dtype} is in {len(content)} bytes")


def _stored(data: bytes) -> bytes:
    # Releases of zlib compress the same bytes to different ones.
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for member in source.infolist():
            _add(archive, member.filename, source.read(member))
    return stream.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    # The default says on which system the file was made.
    member.create_system, member.external_attr = 3, 0o644 << 16
    archive.writestr(member, content)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("__loader__"), str)


def _rewrite(node: Any, numbers: dict[Any, int], names: dict[str, str]) -> None:
    """Number objects and arrays in the order in which they are met, and order what has no order."""
    if isinstance(node, list):
        for item in node:
            _rewrite(item, numbers, names)
        return
    if not isinstance(node, dict):
        return
    if _is_node(node):
        if node["__loader__"] == "ObjectNode":
            _order_attributes(node.get("content"))
        elif (members := _unordered_members(node)) is not None:
            members.sort(key=_text_without_numbers)
        identity = node.pop("__id__", None)
        if identity is not None and node["__loader__"] not in _IMMUTABLE:
            node["__id__"] = numbers.setdefault(identity, len(numbers) + 1)
        file = node.get("file")
        if isinstance(file, str):
            ending = file[file.rfind(".") :]
            node["file"] = names.setdefault(file, f"{len(names) + 1}{ending}")
    for item in node.values():
        _rewrite(item, numbers, names)


def _order_attributes(content: Any) -> None:
    """Sort the attributes of an object, and drop those that are no state."""
    if not (_is_node(content) and content["__loader__"] == "DictNode"):
        return
    types = content["key_types"].get("content")
    if not isinstance(types, list) or len(types) != len(content["content"]):
        return
    kept = [
        pair for pair in sorted(zip(content["content"], types, strict=True), key=_first) if pair[0] not in _NO_STATE
    ]
    values = content["content"]
    content["content"] = {name: values[name] for name, _ in kept}
    content["key_types"]["content"] = [kind for _, kind in kept]


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]


def _unordered_members(node: dict[str, Any]) -> list[Any] | None:
    """Return the list of members of a node that stands for a set, whose order differs from process to process."""
    content = node.get("content")
    if node["__loader__"] == "SetNode":
        return content if isinstance(content, list) else None
    if node.get("__class__") == "frozenset" and isinstance(content, dict):
        # It is described as a call with one argument, the list of its members.
        arguments = content.get("content")
        if isinstance(arguments, list) and len(arguments) == 1 and _is_node(arguments[0]):
            listed = arguments[0].get("content")
            return listed if isinstance(listed, list) else None
    return None


def _text_without_numbers(node: Any) -> str:
    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [bare(item) for item in value]
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items() if not (key == "__id__" and _is_node(value))}
        return value

    return json.dumps(bare(node), sort_keys=True)


class _Reader:
    """Turns nodes into plain values."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self._members = members
        self._readers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "ObjectNode": self._object,
            "DictNode": self._dict,
            "ListNode": lambda node: [self.read(item) for item in node["content"]],
            "TupleNode": lambda node: tuple(self.read(item) for item in node["content"]),
            "SetNode": self._set,
            "JsonNode": lambda node: json.loads(node["content"]),
            "NdArrayNode": self._array,
            "SparseMatrixNode": self._sparse,
            "BytesNode": lambda node: members[node["file"]],
            "TypeNode": lambda node: f"type {node['__module__']}.{node['__class__']}",
            "FunctionNode": lambda node: f"function {node['__module__']}.{node['__class__']}",
        }
        self._depth = 0

    def read(self, node: Any) -> Any:
        if not _is_node(node):
            return node
        self._depth += 1
        try:
            if self._depth > _MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
            return self._readers.get(node["__loader__"], self._other)(node)
        finally:
            self._depth -= 1

    def _object(self, node: dict[str, Any]) -> Any:
        attributes = self.read(node.get("content"))
        described: dict[str, Any] = {"class": f"{node['__module__']}.{node['__class__']}"}
        if not isinstance(attributes, dict):
            return {**described, "state": attributes}
        for name, value in attributes.items():
            if name not in _NO_STATE and name != _VERSION:
                described[name] = _by_name(value) if name in _NAMED_STEPS else value
        return described

    def _dict(self, node: dict[str, Any]) -> dict[Any, Any]:
        items = {key: self.read(value) for key, value in node["content"].items()}
        types = [f"{kind['__module__']}.{kind['__class__']}" for kind in node["key_types"]["content"]]
        if all(kind == "builtins.str" for kind in types):
            return items
        return {(kind, key): value for kind, (key, value) in zip(types, items.items(), strict=True)}

    def _set(self, node: dict[str, Any]) -> Any:
        return {"set": sorted((self.read(item) for item in node["content"]), key=repr)}

    def _array(self, node: dict[str, Any]) -> Any:
        if node["type"] == "numpy":
            array = np.load(io.BytesIO(self._members[node["file"]]), allow_pickle=False)
            return array[()] if array.ndim == 0 else array
        return {"shape": self.read(node["shape"]), "items": [self.read(item) for item in node["content"]]}

    def _sparse(self, node: dict[str, Any]) -> Any:
        arrays = _members(self._members[node["file"]])
        loaded = {name: np.load(io.BytesIO(content), allow_pickle=False) for name, content in arrays.items()}
        return {"class": f"{node['__module__']}.{node['__class__']}", **loaded}

    def _other(self, node: dict[str, Any]) -> Any:
        """Describe an object of a kind of its own: all of its nodes and arrays, without numbers."""
        described: dict[str, Any] = {"class": f"{node['__module__']}.{node['__class__']}"}
        for key, value in node.items():
            if key == "file":
                described["bytes"] = self._members[value]
            elif not key.startswith("__"):
                described[key] = self._any(value)
        return described

    def _any(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._any(item) for item in value]
        if isinstance(value, dict) and not _is_node(value):
            return {key: self._any(item) for key, item in value.items()}
        return self.read(value)


def _by_name(value: Any) -> Any:
    """Turn a list of (name, estimator, ...) into an ordered dict by name, if it is one."""
    if not isinstance(value, list) or not all(isinstance(item, tuple) and len(item) >= 2 for item in value):
        return value
    names = [item[0] for item in value]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return value
    return OrderedDict(
        (item[0], item[1] if len(item) == 2 else {"estimator": item[1], "rest": item[2:]}) for item in value
    )
