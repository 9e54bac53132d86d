"""The digest of what a preprocessor means: the same in every process, on every platform, for the same state."""

from __future__ import annotations

import collections
import hashlib
import json
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.format.tree import MAX_DEPTH
from ckptmgr.preprocess.skops_file import readable_skops
from ckptmgr.state.codec import encode_value
from ckptmgr.state.sharding import is_sharded
from ckptmgr.state.stored_file import StoredFile

__all__ = ["fingerprint"]

_LENGTH = 32
# Trees within a tree (a skops file within a part) may be a bit deeper than the state of a checkpoint.
_MAX_DEPTH = 8 * MAX_DEPTH
_MAX_KNOWN = 64
_known: dict[tuple[str, bytes], bytes] = {}


def fingerprint(tree: Any) -> str:
    """Return 32 hex digits of the SHA-256 of a canonical encoding.

    What counts: types, values, the order of lists, tuples and `OrderedDict`; of tensors and arrays dtype, shape and
    bits; of files the name and the content. What does not: the order of other dicts and of sets, devices, strides, byte
    order, white space and the order of keys in JSON files, and what skops files say about addresses and versions.
    Integers, floats and truth values differ, as do 0.0 and -0.0; NaNs of Python are one value.

    Raises:
        UnsupportedStateError: A value without canonical encoding, such as a sharded tensor or an object.
    """
    return _digest(tree, 0).hex()[:_LENGTH]


def _digest(value: Any, depth: int) -> bytes:
    if depth > _MAX_DEPTH:
        raise UnsupportedStateError(f"a preprocessor's state is nested deeper than {_MAX_DEPTH} levels")
    kind = type(value)
    if value is None or kind is bool or kind is int:
        return _hash(kind.__name__, str(value).encode() if kind is not int else b"%x" % value)
    if kind is float:
        return _hash("float", b"nan" if value != value else struct.pack(">d", value))
    if kind is str:
        return _hash("str", value.encode("utf-8", "surrogatepass"))
    if kind in (list, tuple, collections.deque, torch.Size):
        return _hash(kind.__name__, *(_digest(item, depth + 1) for item in value))
    if isinstance(value, dict):
        pairs = [_digest(key, depth + 1) + _digest(item, depth + 1) for key, item in value.items()]
        return _hash(kind.__name__, *(pairs if kind is collections.OrderedDict else sorted(pairs)))
    if kind in (set, frozenset):
        return _hash(kind.__name__, *sorted(_digest(item, depth + 1) for item in value))
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return _array("array", value)
    if isinstance(value, np.generic):
        return _array("scalar", np.asarray(value))
    if isinstance(value, StoredFile):
        return _hash("file", value.name.encode("utf-8", "surrogatepass"), _content(value, depth))
    return _hash("value", json.dumps(encode_value(value, ("preprocessor",)), sort_keys=True).encode())


def _hash(tag: str, *parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(f"{tag}:{len(parts)}:".encode())
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


def _content(file: StoredFile, depth: int) -> bytes:
    # A vocabulary of 100,000 tokens takes half a second, at each save, and is mostly the one of the save before.
    key = (file.name.rpartition(".")[2], hashlib.sha256(file.content).digest())
    if key not in _known:
        digest = _meaning(file, depth)
        while len(_known) >= _MAX_KNOWN:
            _known.pop(next(iter(_known)), None)
        _known[key] = digest
    return _known[key]


def _meaning(file: StoredFile, depth: int) -> bytes:
    if file.name.endswith(".json") and (canonical := _canonical_json(file.content)) is not None:
        return _hash("json", canonical)
    if file.name.endswith(".skops"):
        try:
            return _hash("skops", _digest(readable_skops(file.content), depth + 1))
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
            # A damaged file has a fingerprint too; its build refuses it.
            return _hash("bytes", file.content)
    return _hash("bytes", file.content)


def _canonical_json(content: bytes) -> bytes | None:
    """Return the document without insignificant white space, keys sorted; None if it is none, or says a key twice."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        listed = list(pairs)
        document = dict(listed)
        if len(document) < len(listed):
            raise ValueError("a key twice")
        return document

    try:
        document = json.loads(content, object_pairs_hook=unique)
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return None


def _tensor(tensor: torch.Tensor) -> bytes:
    if is_sharded(tensor):
        raise UnsupportedStateError(
            "a preprocessor's tensor is sharded over ranks",
            why="a fingerprint is of the whole",
            next="replicate the preprocessor",
        )
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return _hash("sparse", _shape(tensor.shape), _tensor(tensor.indices()), _tensor(tensor.values()))
    if tensor.layout != torch.strided:
        return _hash("compressed", str(tensor.layout).encode(), _tensor(tensor.to_sparse()))
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return _hash("tensor", name.encode(), _shape(tensor.shape), data.data)


def _array(tag: str, array: np.ndarray[Any, Any]) -> bytes:
    if array.dtype.names is not None:
        # Field by field: what lies between them is nobody's.
        return _hash(tag, *(_hash(name, _array(tag, array[name])) for name in array.dtype.names))
    if array.dtype.hasobject or array.dtype.kind not in "biufcSUMm":
        raise UnsupportedStateError(
            f"a preprocessor's NumPy array is of the type {array.dtype}",
            why="its elements have no fixed bytes",
            next="convert it to numbers or texts",
        )
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return _hash(tag, array.dtype.newbyteorder("=").name.encode(), _shape(array.shape), little.tobytes())


def _shape(shape: Iterable[int]) -> bytes:
    return ",".join(map(str, shape)).encode()
