"""State trees with tensors in them, to JSON and back.

The tagged grammar of `format.tree` asks this module about what only torch, NumPy and OmegaConf know. In the document a
tensor is a reference, ``{"$tensor": name}``, to a tensor of the same entry; its bytes go to the entry's safetensors
file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.format.tree import EncodeLeaf, Path, decode_tree, encode_tree, format_path
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.sharding import Shard, is_sharded, shard_of
from ckptmgr.state.stored_file import StoredFile, check_stored_key, check_stored_name
from ckptmgr.state.tensors import (
    DTYPES,
    STORED_DTYPES,
    StoredTensor,
    dtype_name,
    memory_identity,
    refuse_unstorable,
    store_tensor,
)

__all__ = [
    "INLINE_NBYTES",
    "ContentOfName",
    "EntryEncoder",
    "TensorOfName",
    "decode_entry",
    "decode_value",
    "encode_value",
]

TensorOfName: TypeAlias = Callable[[str], torch.Tensor]
ContentOfName: TypeAlias = Callable[[str], bytes]

INLINE_NBYTES = 1024
"""NumPy arrays up to this size stay in the document; larger ones are stored as tensors."""

# Containers that handlers put at the top of their trees, and that say nothing in a tensor's name.
_UNNAMED_LEVELS = ("tensors", "state")
_NUMPY_DTYPES = {
    np.dtype(dtype_name(dtype)) for dtype in STORED_DTYPES if not dtype_name(dtype).startswith(("bf", "float8"))
}
_COMPRESSED = {torch.sparse_csr: "csr", torch.sparse_csc: "csc", torch.sparse_bsr: "bsr", torch.sparse_bsc: "bsc"}
_LAYOUTS = {name: layout for layout, name in _COMPRESSED.items()}


class EntryEncoder:
    """Encodes one entry: its tree becomes JSON, and its tensors a list of what to copy.

    Args:
        entry: The captured entry. Its tensors are looked at, not copied.

    Attributes:
        tree: The encoded tree.
        tensors: What the tree refers to, each tensor once; of sharded ones this rank's part.
        sharded: The live DTensors among them.
        files: Tools' own files that the tree refers to, by the name that it uses.

    Raises:
        UnsupportedStateError: A value that cannot be stored. Names its path and type.
    """

    def __init__(self, entry: CapturedEntry) -> None:
        self._entry = entry.name
        self.tensors: list[StoredTensor] = []
        self.sharded: list[Any] = []
        self.files: dict[str, StoredFile] = {}
        # Safetensors keeps this name for itself.
        self._taken = {"__metadata__"}
        self._by_identity: dict[object, StoredTensor] = {}
        self._live: dict[str, torch.Tensor] = {}
        self.tree = encode_tree(entry.tree, self._leaf, path=(entry.name,))

    def live_tensor(self, name: str) -> torch.Tensor:
        """Return the live tensor of a name in the tree; an empty one for a NumPy array."""
        return self._live.get(name, torch.empty(0))

    def content(self, key: str) -> bytes:
        """Return the content of a tool's own file, by the name that the tree uses."""
        return self.files[key].content

    def _leaf(self, value: object, path: Path) -> dict[str, Any] | None:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            if type(value) is np.ndarray and value.dtype in _NUMPY_DTYPES and value.nbytes > INLINE_NBYTES:
                return {"$array": self._array(value, path)}
            return None
        if isinstance(value, StoredFile):
            return {"$file": [self._file(value, path), value.name]}
        tagged = _encode_torch_value(value) or _encode_config(value, path, self._leaf)
        if tagged is None:
            _refuse_object(value, path)
        return tagged

    def _tensor(self, tensor: torch.Tensor, path: Path) -> dict[str, Any]:
        where = format_path(path)
        shard = shard_of(tensor, where) if is_sharded(tensor) else None
        if shard is not None:
            self.sharded.append(tensor)
            identity, tensor = memory_identity(tensor), shard.local
        refuse_unstorable(tensor, where)
        if tensor.layout != torch.strided:
            return {"$sparse": self._sparse(tensor, path)}
        # The same memory seen in the same way is the same tensor, whether tied by identity or by a view.
        identity = memory_identity(tensor) if shard is None else identity
        known = None if identity is None else self._by_identity.get(identity)
        name = self._name(path)
        if known is not None:
            known.aliases.append(name)
        else:
            stored = store_tensor(tensor, name, where)
            if shard is not None:
                stored = _as_shard(stored, shard, where)
            self.tensors.append(stored)
            if identity is not None:
                self._by_identity[identity] = stored
        self._live[name] = tensor
        return {"$tensor": name}

    def _sparse(self, tensor: torch.Tensor, path: Path) -> dict[str, Any]:
        tensor = tensor.detach()
        described: dict[str, Any] = {"shape": list(tensor.shape)}
        if tensor.layout == torch.sparse_coo:
            kind = "coo"
            parts = {"indices": tensor._indices(), "values": tensor._values()}
            described["coalesced"] = tensor.is_coalesced()
        elif (kind := _COMPRESSED.get(tensor.layout, "")) in ("csr", "bsr"):
            parts = {"crow": tensor.crow_indices(), "col": tensor.col_indices(), "values": tensor.values()}
        elif kind:
            parts = {"ccol": tensor.ccol_indices(), "row": tensor.row_indices(), "values": tensor.values()}
        else:
            raise UnsupportedStateError(
                f"{format_path(path)} is a tensor that cannot be stored",
                why=f"its layout is {tensor.layout}",
                next="call .to_dense() first",
            )
        described["layout"] = kind
        for part, component in parts.items():
            stored = store_tensor(component, self._name((*path, part)), format_path((*path, part)))
            if stored.encoding == "plain":
                stored.encoding = f"sparse_{kind}.{part}"
                stored.logical_dtype, stored.logical_shape = dtype_name(tensor.dtype), tuple(tensor.shape)
            self.tensors.append(stored)
            self._live[stored.name] = component
            described[part] = stored.name
        return described

    def _array(self, array: np.ndarray[Any, Any], path: Path) -> str:
        name = self._name(path)
        self.tensors.append(StoredTensor(name, array, STORED_DTYPES[DTYPES[str(array.dtype)]]))
        return name

    def _file(self, file: StoredFile, path: Path) -> str:
        where = format_path(path)
        check_stored_name(file.name, where)
        if type(file.content) is not bytes:
            raise UnsupportedStateError(
                f"{where} is a file whose content is a {type(file.content).__name__}", why="a file is bytes"
            )
        key, number = file.name, 2
        while key in self.files:
            key, number = f"{number}-{file.name}", number + 1
        check_stored_key(self._entry, key, where)
        self.files[key] = file
        return key

    def _name(self, path: Path) -> str:
        inner = path[2:] if path[1:2] and path[1] in _UNNAMED_LEVELS else path[1:]
        # A lone surrogate is a legal Python string and an illegal JSON one.
        wanted = "/".join(str(part) for part in inner).encode("utf-8", "backslashreplace").decode() or "value"
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}~{number}", number + 1
        self._taken.add(name)
        return name


def _no_file(name: str) -> bytes:
    raise ValueError(f"it refers to the file {name!r}")


def decode_entry(tree: Any, tensor: TensorOfName, content: ContentOfName = _no_file) -> Any:
    """Turn an entry's encoded tree back into values.

    Args:
        tree: What `EntryEncoder.tree` was.
        tensor: Returns an entry's tensor by its name.
        content: Returns the bytes of a tool's own file by the name that the tree uses.

    Raises:
        CorruptCheckpointError: The tree does not follow the grammar.
    """

    def leaf(tag: str, value: Any) -> object:
        match tag:
            case "$tensor":
                return tensor(value)
            case "$array":
                return tensor(value).numpy()
            case "$file":
                key, name = value
                return StoredFile(check_stored_name(name, "the state"), content(key))
            case "$sparse":
                return _decode_sparse(value, tensor)
            case "$dtype":
                return DTYPES[value]
            case "$size":
                return torch.Size(value)
            case "$device":
                return torch.device(value)
            case "$config":
                from omegaconf import OmegaConf

                return OmegaConf.create(decode_tree(value, leaf))
        raise ValueError("an unknown tag")

    return decode_tree(tree, leaf)


def encode_value(value: Any, path: Path) -> Any:
    """Turn a value without tensors into JSON; NumPy arrays stay in it, whatever their size.

    Args:
        value: Nested containers and plain values.
        path: Where it stands in the state, for messages.

    Raises:
        UnsupportedStateError: A value that cannot be stored, or a tensor in it. Names its path and type.
    """
    return encode_tree(value, _value_leaf, path=path)


def decode_value(tree: Any) -> Any:
    """Turn what `encode_value` gave back into the value.

    Raises:
        CorruptCheckpointError: It does not follow the grammar.
    """

    def no_tensor(name: str) -> torch.Tensor:
        raise ValueError(f"it refers to the tensor {name!r}")

    return decode_entry(tree, no_tensor)


def _value_leaf(value: object, path: Path) -> dict[str, Any] | None:
    if isinstance(value, torch.Tensor):
        raise UnsupportedStateError(
            f"{format_path(path)} is a tensor inside of a plain value",
            why="tensors are looked for in dicts and lists, and not in tuples, sets or keys",
            next="put it into a dict or a list",
        )
    if isinstance(value, np.ndarray):
        return None
    tagged = _encode_torch_value(value) or _encode_config(value, path, _value_leaf)
    if tagged is None:
        _refuse_object(value, path)
    return tagged


def _encode_config(value: object, path: Path, leaf: EncodeLeaf) -> dict[str, Any] | None:
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is None or not isinstance(value, (omegaconf.DictConfig, omegaconf.ListConfig)):
        return None
    plain = omegaconf.OmegaConf.to_container(value, resolve=False)
    return {"$config": encode_tree(plain, leaf, path=path)}


def _as_shard(stored: StoredTensor, shard: Shard, where: str) -> StoredTensor:
    """Note a shard's place in the whole. What is the whole on every rank of its mesh is no shard.

    What happens to be the whole on this rank is one: on the others the shard is empty then.
    """
    # A shard comes back in place, so the order of its dimensions in memory is the live one's.
    stored.order = None
    if shard.is_replicated:
        return stored
    if stored.encoding == "complex":
        raise UnsupportedStateError(
            f"{where} is a sharded tensor that cannot be stored",
            why=f"its elements are of {stored.logical_dtype}, which are stored as pairs of real numbers",
            next="keep it as complex64, or replicate it",
        )
    stored.global_shape, stored.global_offset = shard.whole, shard.box.offset
    return stored


def _encode_torch_value(value: object) -> dict[str, Any] | None:
    if isinstance(value, torch.dtype):
        return {"$dtype": dtype_name(value)}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    return None


def _decode_sparse(content: Any, tensor: TensorOfName) -> torch.Tensor:
    shape, kind = content["shape"], content["layout"]
    try:
        # The invariants are checked: indices from a file must not point outside of the tensor.
        if kind == "coo":
            return torch.sparse_coo_tensor(
                tensor(content["indices"]),
                tensor(content["values"]),
                shape,
                is_coalesced=content["coalesced"],
                check_invariants=True,
            )
        outer, inner = ("crow", "col") if kind in ("csr", "bsr") else ("ccol", "row")
        return torch.sparse_compressed_tensor(
            tensor(content[outer]),
            tensor(content[inner]),
            tensor(content["values"]),
            shape,
            layout=_LAYOUTS[kind],
            check_invariants=True,
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _refuse_object(value: object, path: Path) -> None:
    """Say more than "unknown type" about objects that belong elsewhere in the state."""
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        raise UnsupportedStateError(
            f"{format_path(path)} is a {type(value).__module__}.{type(value).__qualname__} inside of plain values",
            why="objects with a state of their own are captured by handlers, which look at whole entries only",
            next="give it an entry of its own: state={..., 'its_name': the_object}",
        )
