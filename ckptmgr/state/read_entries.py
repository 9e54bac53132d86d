"""From a checkpoint to entries in host memory: which documents and which bytes this rank needs, each checked.

A checkpoint of other ranks gives the same state: what is replicated is everybody's, shards are put together or cut
anew, and of what each rank had for itself, a rank takes what the rank of its number had, or rank 0 if there was none.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.manifest import EntryRecord, TensorRecord
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.state.codec import decode_entry
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.sharding import Box, LiveShards, SavedPart, shard_of
from ckptmgr.state.tensors import tensor_from_bytes

__all__ = ["load_entries", "read_box", "records_by_name"]


def load_entries(
    reader: CheckpointReader,
    names: Iterable[str] | None = None,
    *,
    rank: int = 0,
    world_size: int | None = None,
    live: LiveShards | None = None,
) -> dict[str, CapturedEntry]:
    """Read entries of a checkpoint into fresh CPU tensors; every byte is checked against its digest.

    Args:
        reader: The checkpoint.
        names: Which entries; all of them by default. Unknown names are left out.
        rank: Whose state it is to be.
        world_size: Number of ranks of this job; by default that of the checkpoint.
        live: Sharded live tensors: of what belongs to them only this rank's part is read, as `SavedPart`.

    Raises:
        CorruptCheckpointError: Something is damaged, missing, or contradicts itself.
    """
    saved_ranks = reader.manifest.topology.world_size
    # What each rank had for itself belongs to the rank of that number; a rank that is new takes rank 0's.
    source = rank if rank < saved_ranks else 0
    wanted = None if names is None else set(names)
    records = {entry.name: entry for entry in reader.manifest.entries if wanted is None or entry.name in wanted}
    documents = {0: _trees(reader, 0)}
    if source and any(entry.scope == "per-rank" for entry in records.values()):
        documents[source] = _trees(reader, source)
    is_same = world_size is None or world_size == saved_ranks
    tensors = records_by_name(reader.manifest.tensors, records, source, is_same=is_same)
    loaded: dict[str, CapturedEntry] = {}
    for name, entry in records.items():
        trees = documents[source if entry.scope == "per-rank" else 0]
        if name not in trees:
            raise _corrupt(reader, f"the manifest lists the entry {name!r}, the state document does not hold it")
        owner = source if entry.scope == "per-rank" else 0
        tree = decode_entry(
            trees[name],
            _TensorLoader(reader, name, tensors[name], live),
            # Each file once: a tree may refer to one as often as it likes.
            cache(partial(reader.read_stored, name, rank=owner)),
        )
        loaded[name] = CapturedEntry(name, entry.handler, entry.handler_version, tree, entry.scope)
    return loaded


def read_box(reader: CheckpointReader, records: Iterable[TensorRecord], box: Box) -> torch.Tensor:
    """Return a part of a tensor that is stored as one whole, or as shards.

    Of each stored piece the rows (of its first dimension) that the part touches are read.

    Args:
        reader: The checkpoint.
        records: All pieces of the tensor.
        box: The part, in elements of the whole.

    Raises:
        CorruptCheckpointError: Something is damaged, or the pieces do not cover the part.
    """
    found: torch.Tensor | None = None
    nfilled = 0
    for record in records:
        piece = Box(record.global_offset or (0,) * len(record.shape), record.shape)
        common = box if not box.shape else box.overlap(piece)
        if common is None:
            continue
        rows = _read_rows(reader, record, piece, common)
        if found is None:
            if common.shape == box.shape and rows.shape == common.shape:
                return rows
            found = torch.empty(box.shape, dtype=rows.dtype)
        # `rows` holds the piece from the first row that both have.
        held = Box((common.offset[0], *piece.offset[1:]), tuple(rows.shape))
        found[common.slices_in(box)] = rows[common.slices_in(held)]
        nfilled += found[common.slices_in(box)].numel()
    if found is None:
        first = next(iter(records), None)
        if 0 not in box.shape or first is None:
            raise _corrupt(reader, "the shards of a tensor do not cover it")
        return torch.empty(box.shape, dtype=_read_rows(reader, first, Box((), ()), None).dtype)
    if nfilled != found.numel():
        raise _corrupt(reader, "the shards of a tensor do not cover it")
    return found


def records_by_name(
    every: Iterable[TensorRecord], entries: dict[str, EntryRecord], source: int, *, is_same: bool
) -> dict[str, dict[str, list[TensorRecord]]]:
    """Return, for each entry and name, the pieces that a rank may read.

    Args:
        every: The manifest's tensors.
        entries: The entries that are wanted, by name.
        source: The rank of the checkpoint whose own tensors are meant.
        is_same: The job has as many ranks as the one that saved.
    """
    tensors: dict[str, dict[str, list[TensorRecord]]] = {name: {} for name in entries}
    for record in every:
        entry = entries.get(record.entry)
        if entry is None:
            continue
        if record.scope == "per-rank":
            # A buffer of one rank means nothing to the rank of that number among others.
            owner = source if entry.scope == "per-rank" or is_same else 0
            if record.rank not in (None, owner):
                continue
        for name in (record.name, *record.aliases):
            tensors[record.entry].setdefault(name, []).append(record)
    return tensors


def _read_rows(reader: CheckpointReader, record: TensorRecord, piece: Box, common: Box | None) -> torch.Tensor:
    """Return the rows of a stored piece that a part of the whole touches; no row if it touches none."""
    if common is not None and not common.shape:
        return tensor_from_bytes(record, reader.read_tensor(record))
    begin = 0 if common is None else common.offset[0] - piece.offset[0]
    end = 0 if common is None else begin + common.shape[0]
    row_nbytes = record.nbytes // max(record.shape[0], 1) if record.shape else record.nbytes
    shape = (end - begin, *record.shape[1:])
    cut = _without_order(record, shape, row_nbytes * (end - begin))
    return tensor_from_bytes(cut, reader.read_range(record, begin * row_nbytes, end * row_nbytes))


def _without_order(record: TensorRecord, shape: tuple[int, ...], nbytes: int) -> TensorRecord:
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    logical = None if record.logical_shape is None else (shape[0], *record.logical_shape[1:])
    return TensorRecord(**{**fields, "shape": shape, "nbytes": nbytes, "order": None, "logical_shape": logical})


def _trees(reader: CheckpointReader, rank: int) -> dict[str, Any]:
    document = reader.read_state(rank)
    trees = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(trees, dict):
        raise _corrupt(reader, f"the state document of rank {rank} has no entries")
    return trees


class _TensorLoader:
    """Reads tensors by name, each once: names of one tensor give one tensor, as it was."""

    def __init__(
        self,
        reader: CheckpointReader,
        entry: str,
        records: dict[str, list[TensorRecord]],
        live: LiveShards | None,
    ) -> None:
        self._reader = reader
        self._entry = entry
        self._records = records
        self._live = live
        self._loaded: dict[str, Any] = {}

    def __call__(self, name: str) -> torch.Tensor:
        records = self._records[name]
        first = records[0].name
        if first not in self._loaded:
            self._loaded[first] = self._load(name, records)
        return self._loaded[first]  # type: ignore[no-any-return]

    def _load(self, name: str, records: list[TensorRecord]) -> Any:
        record = records[0]
        shape = record.global_shape or record.logical_shape or record.shape
        is_cuttable = not record.encoding.startswith(("sparse_", "complex"))
        like = self._live.wanted(self._entry, name, shape) if self._live and is_cuttable else None
        if like is not None:
            return SavedPart(read_box(self._reader, records, shard_of(like).box), like)
        if record.scope == "sharded":
            return read_box(self._reader, records, Box((0,) * len(shape), tuple(shape)))
        return tensor_from_bytes(record, self._reader.read_tensor(record))


def _corrupt(reader: CheckpointReader, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"step {reader.manifest.step} of {reader.storage.url} contradicts itself",
        why=why,
        next="resume from another checkpoint; `ckptmgr ls` lists them",
    )
