"""The weights of a stored module, one at a time: names, shapes, and bytes that are read when they are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError, UsageError
from ckptmgr.format.encoding import payload_nbytes
from ckptmgr.format.manifest import TensorRecord
from ckptmgr.interop.stored import StoredCheckpoint
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.state.read_entries import read_box, records_by_name
from ckptmgr.state.sharding import Box

__all__ = ["StoredWeight", "Weights", "find_weights", "without_prefix"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One tensor of a module, as safetensors will hold it.

    Attributes:
        name: In the module.
        dtype: As safetensors calls it.
        shape: Of the whole, also where ranks hold shards of it.
        records: Its pieces on storage.
        tied: Further names of the same tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    records: tuple[TensorRecord, ...]
    tied: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return payload_nbytes(self.dtype, self.shape)

    def read(self, reader: CheckpointReader) -> memoryview:
        """Return its bytes, row-major, put together and checked."""
        first = self.records[0]
        if first.scope != "sharded":
            return reader.read_tensor(first)
        whole = read_box(reader, self.records, Box((0,) * len(self.shape), self.shape))
        # NumPy has no bfloat16, so the bytes are taken as such.
        return memoryview(whole.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True, slots=True)
class Weights:
    """What of a module an export writes.

    Attributes:
        weights: In the order of the module; tied ones once, under their first name.
        left_out: Names of what is not written.
    """

    weights: tuple[StoredWeight, ...]
    left_out: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all of them, in bytes."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def tied(self) -> dict[str, str]:
        """Further name → the name under which the tensor is written."""
        return {name: weight.name for weight in self.weights for name in weight.tied}


def find_weights(checkpoint: StoredCheckpoint, entry: str) -> Weights:
    """List the weights of an entry. Extra state that is no tensor is left out: safetensors holds nothing else.

    Raises:
        UnsupportedStateError: A tensor that safetensors cannot hold. Names all of them.
        CorruptCheckpointError: The state document is damaged.
    """
    tree = checkpoint.reader.read_state().get("entries", {}).get(entry)
    if not isinstance(tree, dict) or "tensors" not in tree:
        raise CorruptCheckpointError(
            f"{checkpoint.reference} holds no module under {entry!r}",
            why="the manifest says so, and the state document does not",
            next="export another checkpoint; `ckptmgr verify` tells which are whole",
        )
    entries = {record.name: record for record in checkpoint.manifest.entries if record.name == entry}
    pieces = records_by_name(checkpoint.manifest.tensors, entries, 0, is_same=True)[entry]
    found: dict[str, StoredWeight] = {}
    refused: list[str] = []
    for name, described in _pairs(tree["tensors"]):
        records = pieces.get(described.get("$tensor", "")) if isinstance(described, dict) else None
        if not records:
            refused.append(f"{name!r} is sparse")
            continue
        first = records[0]
        if first.encoding != "plain":
            refused.append(f"{name!r} is {first.logical_dtype}")
        elif first.name in found:
            tied = found[first.name]
            found[first.name] = _with_name(tied, name)
        else:
            shape = tuple(first.global_shape or first.shape)
            found[first.name] = StoredWeight(name, first.dtype, shape, tuple(records))
    if refused:
        raise UnsupportedStateError(
            f"safetensors cannot hold {len(refused)} of the tensors of {entry!r}",
            why=_listed(refused),
            next="--format state-dict writes them with torch.save",
        )
    return Weights(tuple(found.values()), tuple(name for name, _ in _pairs(tree.get("values", {}))))


def without_prefix(weights: Weights, prefix: str) -> Weights:
    """Take a prefix off the names; what does not begin with it belongs to something else and is left out.

    Raises:
        UsageError: No name begins with it.
    """
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    kept: list[StoredWeight] = []
    left_out = list(weights.left_out)
    for weight in weights.weights:
        names = [name.removeprefix(prefix) for name in (weight.name, *weight.tied) if name.startswith(prefix)]
        left_out += [name for name in (weight.name, *weight.tied) if not name.startswith(prefix)]
        if names:
            kept.append(StoredWeight(names[0], weight.dtype, weight.shape, weight.records, tuple(names[1:])))
    if not kept:
        shown = [weight.name for weight in weights.weights]
        raise UsageError(
            f"no weight's name begins with {prefix!r}",
            why=f"the names are {_listed(shown)}",
            next="give another prefix, or none",
        )
    return Weights(tuple(kept), tuple(left_out))


def _with_name(weight: StoredWeight, name: str) -> StoredWeight:
    return StoredWeight(weight.name, weight.dtype, weight.shape, weight.records, (*weight.tied, name))


def _pairs(encoded: Any) -> Sequence[tuple[str, Any]]:
    """Return the items of an encoded dict, also of one that stands there as pairs."""
    if isinstance(encoded, Mapping):
        for tag in ("$dict", "$ordered_dict"):
            if encoded.keys() == {tag}:
                return [(str(key), item) for key, item in encoded[tag]]
        return list(encoded.items())
    return []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
