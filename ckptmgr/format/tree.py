"""Nested state as JSON, without losing a bit: the tagged grammar.

Plain JSON encoders lose nan, infinities, tuples, sets, bytes and keys that are no strings, silently. Here a value that
JSON cannot hold as it is becomes an object with a single key that starts with ``$``. FORMAT.md lists every tag.
Tensors and other types that this floor does not know are left to a *leaf* function of the caller.

Decoding never imports and never calls anything that a document names: an enum member is looked up among the modules
that the program itself has imported.
"""

from __future__ import annotations

import argparse
import base64
import collections
import datetime
import enum
import math
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError

__all__ = ["MAX_DEPTH", "DecodeLeaf", "EncodeLeaf", "Path", "decode_tree", "encode_tree", "format_path"]

MAX_DEPTH = 32

Path: TypeAlias = tuple[object, ...]
EncodeLeaf: TypeAlias = Callable[[object, Path], "dict[str, Any] | None"]
DecodeLeaf: TypeAlias = Callable[[str, Any], object]

_SAFE_INT = 2**53
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (list, dict, set, int, float, str, tuple)}


def format_path(path: Path) -> str:
    """Return a path for a message, such as ``optimizer/groups/0/lr``."""
    return "/".join(str(part) for part in path) or "(the top)"


def encode_tree(value: object, leaf: EncodeLeaf | None = None, *, path: Path = ()) -> Any:
    """Turn a nested value into what `json.dumps` can hold exactly.

    Args:
        value: Nested dicts, lists, tuples and leaves.
        leaf: Asked first about every value that is no plain JSON value; returns an object whose only key is a tag, or
            None to decline.
        path: Where the value stands in the whole state, for messages.

    Raises:
        UnsupportedStateError: A value of a type that nobody handles, or nesting beyond 32 levels. Names its path.
    """
    if len(path) > MAX_DEPTH + 2:
        raise UnsupportedStateError(
            f"the state is nested deeper than {MAX_DEPTH} levels at {format_path(path[:6])}/…",
            why="no honest state is; a container that holds itself would never end",
            next="store references by name instead of the objects themselves",
        )
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SAFE_INT <= value <= _SAFE_INT else {"$int": str(value)}  # type: ignore[operator]
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}  # type: ignore[arg-type]
    if kind is list:
        return _encode_items(value, leaf, path)  # type: ignore[arg-type]
    if kind is dict:
        return _encode_dict(value, leaf, path)  # type: ignore[arg-type]
    if leaf is not None and (tagged := leaf(value, path)) is not None:
        return tagged
    tagged = _encode_tagged(value, leaf, path)
    if tagged is None:
        raise UnsupportedStateError(
            f"{format_path(path)} is a {kind.__module__}.{kind.__qualname__}, which no handler can store",
            why="checkpoints hold tensors and plain values only, never pickled objects, so that they load anywhere",
            next="give the object state_dict() and load_state_dict(), convert it to plain values, "
            "or register a handler: ckptmgr.register_handler(...)",
        )
    return tagged


def decode_tree(value: Any, leaf: DecodeLeaf | None = None) -> Any:
    """Turn an encoded value back into the value that it was.

    Args:
        value: Parsed JSON.
        leaf: Called with tag and content for every tag that is not part of this module's grammar.

    Raises:
        CorruptCheckpointError: An unknown tag, or content that does not fit its tag.
    """
    if isinstance(value, list):
        return [decode_tree(item, leaf) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (tag := next(iter(value))).startswith("$"):
        try:
            return _decode_tagged(tag, value[tag], leaf)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"the state holds {tag!r} with content that does not fit it",
                why=str(error),
                next="the document was not written by this format version, or was altered",
            ) from error
    return {key: decode_tree(item, leaf) for key, item in value.items()}


def _encode_dict(value: dict[Any, Any], leaf: EncodeLeaf | None, path: Path) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode_tree(item, leaf, path=(*path, key)) for key, item in value.items()}
    return {"$dict": _encode_pairs(value, leaf, path)}


def _encode_pairs(value: Mapping[Any, Any], leaf: EncodeLeaf | None, path: Path) -> list[list[Any]]:
    return [
        [encode_tree(key, leaf, path=(*path, key)), encode_tree(item, leaf, path=(*path, key))]
        for key, item in value.items()
    ]


def _encode_items(value: Iterable[Any], leaf: EncodeLeaf | None, path: Path) -> list[Any]:
    return [encode_tree(item, leaf, path=(*path, i)) for i, item in enumerate(value)]


def _encode_tagged(value: Any, leaf: EncodeLeaf | None, path: Path) -> dict[str, Any] | None:
    kind = type(value)
    if isinstance(value, enum.Enum):
        return {"$enum": [kind.__module__, kind.__qualname__, value.name]}
    if isinstance(value, np.generic) and kind.__module__ == "numpy":
        return _encode_numpy("$numpy_scalar", np.asarray(value))
    if kind is np.ndarray and value.dtype.kind in "biufcSUMm":
        return _encode_numpy("$numpy_array", value)
    if kind is tuple:
        return {"$tuple": _encode_items(value, leaf, path)}
    if kind in (set, frozenset):
        # Sorted by their text, or equal sets would give different documents.
        members = sorted(_encode_items(value, leaf, path), key=repr)
        return {f"${kind.__name__}": members}
    if kind is bytes:
        return {"$bytes": _base64(value)}
    if kind is bytearray:
        return {"$bytearray": _base64(bytes(value))}
    if kind is complex:
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if kind is range or kind is slice:
        return {f"${kind.__name__}": [value.start, value.stop, value.step]}
    if kind is collections.OrderedDict:
        return {"$ordered_dict": _encode_pairs(value, leaf, path)}
    if kind is collections.Counter:
        return {"$counter": _encode_pairs(value, leaf, path)}
    if kind is collections.defaultdict:
        name = None if value.default_factory is None else getattr(value.default_factory, "__name__", "")
        if name is None or _FACTORIES.get(name) is value.default_factory:
            return {"$default_dict": [name, _encode_pairs(value, leaf, path)]}
        return None
    if kind is collections.deque:
        return {"$deque": [value.maxlen, _encode_items(value, leaf, path)]}
    if kind is argparse.Namespace or kind is types.SimpleNamespace:
        tag = "$namespace" if kind is argparse.Namespace else "$simple_namespace"
        return {tag: _encode_pairs(vars(value), leaf, path)}
    if isinstance(value, pathlib.PurePath):
        return {"$path": str(value)}
    if kind in (datetime.datetime, datetime.date, datetime.time) and not isinstance(
        getattr(value, "tzinfo", None), _ForeignZone
    ):
        return {f"${kind.__name__}": value.isoformat()}
    if kind is datetime.timedelta:
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    return None


class _ForeignZoneType(type):
    """Matches time zones that are no fixed offset: an ISO text would lose their rules."""

    def __instancecheck__(cls, zone: object) -> bool:
        return zone is not None and not isinstance(zone, datetime.timezone)


class _ForeignZone(metaclass=_ForeignZoneType):
    pass


def _encode_numpy(tag: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {tag: [array.dtype.str, list(array.shape), _base64(array.tobytes())]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode_numpy(content: Any) -> np.ndarray[Any, Any]:
    dtype, shape, data = content
    kind = np.dtype(str(dtype))
    if kind.hasobject:
        raise ValueError("an array of Python objects")
    return np.frombuffer(base64.b64decode(data, validate=True), dtype=kind).reshape(shape).copy()


def _decode_tagged(tag: str, content: Any, leaf: DecodeLeaf | None) -> Any:
    def items(listed: list[Any]) -> list[Any]:
        return [decode_tree(item, leaf) for item in listed]

    def pairs(listed: list[Any]) -> dict[Any, Any]:
        return {decode_tree(key, leaf): decode_tree(item, leaf) for key, item in listed}

    match tag:
        case "$int":
            return int(content)
        case "$float":
            return float(content)
        case "$dict":
            return pairs(content)
        case "$tuple":
            return tuple(items(content))
        case "$set":
            return set(items(content))
        case "$frozenset":
            return frozenset(items(content))
        case "$bytes":
            return base64.b64decode(content, validate=True)
        case "$bytearray":
            return bytearray(base64.b64decode(content, validate=True))
        case "$complex":
            return complex(float(content[0]), float(content[1]))
        case "$range":
            return range(*content)
        case "$slice":
            return slice(*content)
        case "$ordered_dict":
            return collections.OrderedDict(pairs(content))
        case "$counter":
            return collections.Counter(pairs(content))
        case "$default_dict":
            name, listed = content
            return collections.defaultdict(None if name is None else _FACTORIES[name], pairs(listed))
        case "$deque":
            return collections.deque(items(content[1]), maxlen=content[0])
        case "$namespace":
            return argparse.Namespace(**pairs(content))
        case "$simple_namespace":
            return types.SimpleNamespace(**pairs(content))
        case "$numpy_scalar":
            return _decode_numpy(content)[()]
        case "$numpy_array":
            return _decode_numpy(content)
        case "$path":
            return pathlib.Path(content)
        case "$datetime":
            return datetime.datetime.fromisoformat(content)
        case "$date":
            return datetime.date.fromisoformat(content)
        case "$time":
            return datetime.time.fromisoformat(content)
        case "$timedelta":
            return datetime.timedelta(*content)
        case "$enum":
            return _find_enum_member(*content)
    if leaf is None:
        raise ValueError("an unknown tag")
    return leaf(tag, content)


def _find_enum_member(module: str, qualname: str, name: str) -> enum.Enum:
    # Looked up, never imported: what a run directory names must not be able to run code.
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        raise LookupError(f"the enum {module}.{qualname} is not imported by this program; import it before restoring")
    return found[name]
