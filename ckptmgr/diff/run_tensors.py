"""The tensors of a committed checkpoint; every byte of them is checked against its digest when it is read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from ckptmgr.diff.elements import Array, dtype_word, item_nbytes
from ckptmgr.diff.tensors import Piece, WholeTensor
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.digest import BLOCK_NBYTES
from ckptmgr.format.manifest import TensorRecord
from ckptmgr.run.reader import CheckpointReader

__all__ = ["tensors_of_checkpoint"]


def tensors_of_checkpoint(reader: CheckpointReader) -> list[WholeTensor]:
    """Return the tensors of a checkpoint: of sharded ones the whole, of those that each rank has for itself each.

    Raises:
        CorruptCheckpointError: The records of a tensor contradict each other.
    """
    records: dict[tuple[str, str, int | None], list[TensorRecord]] = {}
    for record in reader.manifest.tensors:
        rank = record.rank if record.scope == "per-rank" else None
        records.setdefault((record.entry, record.name, rank), []).append(record)
    return [_tensor(reader, found, rank) for (_, _, rank), found in records.items()]


def _tensor(reader: CheckpointReader, records: list[TensorRecord], rank: int | None) -> WholeTensor:
    first = records[0]
    is_sharded = first.scope == "sharded"
    if any((record.scope == "sharded") != is_sharded for record in records) or (len(records) > 1 and not is_sharded):
        raise _contradiction(reader, first, "it is listed as a whole and in parts")
    word, shape = _logical(reader, first)
    if is_sharded:
        if any(record.encoding != first.encoding or record.logical_dtype != first.logical_dtype for record in records):
            raise _contradiction(reader, first, "its shards are of different dtypes")
        if first.encoding == "complex":
            raise _contradiction(reader, first, "its shards are pairs of numbers, which the format does not have")
        shape = first.global_shape or ()
    return WholeTensor(
        entry=first.entry,
        name=first.name,
        rank=rank,
        dtype=word,
        shape=shape,
        nbytes=sum(record.nbytes for record in records),
        pieces=tuple(_pieces(reader, records, shape)),
        aliases=tuple(dict.fromkeys(name for record in records for name in record.aliases)),
    )


def _pieces(reader: CheckpointReader, records: list[TensorRecord], shape: tuple[int, ...]) -> Iterable[Piece]:
    for record in records:
        is_shard = record.scope == "sharded"
        if record.nbytes or not is_shard:
            yield Piece(
                offset=record.global_offset or (0,) * len(shape),
                shape=record.shape if is_shard else shape,
                open=partial(_CheckedBytes, reader, record),
                digests=record.blocks,
            )


def _logical(reader: CheckpointReader, record: TensorRecord) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape as they were before the encoding."""
    stored = dtype_word(record.dtype)
    # The components of a sparse tensor are tensors of their own; what is said of the whole stands in the document.
    if record.encoding == "plain" or record.encoding.startswith("sparse_"):
        return stored, record.shape
    word, shape = record.logical_dtype or "", record.logical_shape
    if record.encoding == "complex":
        parts = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}.get(word)
        if parts != stored or record.shape[-1:] != (2,) or shape != record.shape[:-1]:
            raise _contradiction(reader, record, f"{stored} {record.shape} is not {word} {shape} in pairs")
    elif record.encoding == "bits":
        known = item_nbytes(word)
        if shape is None or (record.scope != "sharded" and shape != record.shape) or not word:
            raise _contradiction(reader, record, f"{record.shape} is not {word} {shape} by its bits")
        if known is not None and known != item_nbytes(stored):
            raise _contradiction(reader, record, f"an element of {word} does not have the bits of {stored}")
    else:
        raise _contradiction(reader, record, f"the encoding {record.encoding!r} is not one of this version")
    return word, shape


class _CheckedBytes:
    """The bytes of a stored tensor, one digested block at a time."""

    def __init__(self, reader: CheckpointReader, record: TensorRecord) -> None:
        self._reader = reader
        self._record = record
        self._index = -1
        self._block = memoryview(b"")

    def read_into(self, target: Array, start: int) -> None:
        done = 0
        while done < target.size:
            index, within = divmod(start + done, BLOCK_NBYTES)
            if index != self._index:
                begin = index * BLOCK_NBYTES
                # Let go of first: two blocks at once are not needed.
                self._block = memoryview(b"")
                self._block = self._reader.read_range(
                    self._record, begin, min(begin + BLOCK_NBYTES, self._record.nbytes)
                )
                self._index = index
            part = np.frombuffer(self._block, dtype=np.uint8)[within : within + target.size - done]
            target[done : done + part.size] = part
            done += part.size


def _contradiction(reader: CheckpointReader, record: TensorRecord, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"tensor {record.name!r} of {record.entry!r} contradicts itself, in step {reader.manifest.step} of "
        f"{reader.storage.url}",
        why=why,
        next="compare another checkpoint; `ckptmgr ls` lists them",
    )
