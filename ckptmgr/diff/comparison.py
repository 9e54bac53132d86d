"""Two checkpoints side by side: what is recorded of them, their state, and every tensor, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ckptmgr.diff.documents import ValueChange, changes_between_trees, paths_of_tree, renamed_tree, with_digests
from ckptmgr.diff.elements import Array
from ckptmgr.diff.facts import compare_facts
from ckptmgr.diff.measure import Measure, Measured
from ckptmgr.diff.pairing import EntryPairs, TensorPair, pair_entries, pair_tensors
from ckptmgr.diff.records import Diff, TensorDiff, TensorForm
from ckptmgr.diff.sides import OpenSide, open_pair
from ckptmgr.diff.tensors import TensorStream, WholeTensor, band_dim, forward_ranges
from ckptmgr.errors import CorruptCheckpointError, UsageError
from ckptmgr.progress import progress

__all__ = ["MAX_VALUES", "compare"]

MAX_VALUES = 10_000
"""Places of the state that are kept; beyond them they are counted."""


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    *,
    only: Sequence[str] = (),
    weights: bool = True,
    read: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Diff:
    """Compare two checkpoints, of one run or of two; or weights in safetensors files with them, or with each other.

    Every byte that is read of a checkpoint is checked against its digest. Memory is bounded by blocks of 16 MiB: one
    of each side, of a tensor in shards one of each shard that a row of it lies in. Nothing that stands in a checkpoint
    is built, imported or unpickled.

    Args:
        a: ``RUN_DIR`` or ``RUN_DIR@SELECTOR``; or a safetensors file, its index, or a directory with
            ``model.safetensors`` or ``model.safetensors.index.json``. What it has is "before".
        b: The same, "after". None: ``a`` is compared with the checkpoint before it.
        only: Patterns of paths (``entry/name``, as file names are matched); what none of them matches, or lies in, is
            left out, and so is everything but the state.
        weights: Look at the elements of tensors. Without it they are compared by form, and by digests where there are
            some.
        read: Read tensors also whose digests are equal: to find damage, and the NaNs in them.
        storage_options: For the storages; never recorded.

    Raises:
        RunNotFoundError, CheckpointNotFoundError: Nothing answers to a reference.
        CorruptCheckpointError: Something that was read is damaged, or contradicts itself.
        UsageError: A reference or a pattern cannot be meant so; or a pattern matches nothing.
        StorageError, FormatVersionError: Something cannot be read at this moment, or by this version.
    """
    first, second = open_pair(a, b, storage_options=storage_options)
    chosen = _Choice(tuple(only))
    entries = pair_entries(first, second)
    pairs, ties = pair_tensors(first, second, entries)
    pairs = [pair for pair in pairs if chosen.has_pair(pair)]
    values = _Values(chosen)
    values.add(ties)
    for change in _documents(first, second, entries, chosen):
        values.add([change])
    changes = tuple(change for change in entries.changes if chosen.has(change.name))
    chosen.refuse_unused()
    facts, notes = ([], []) if only else compare_facts(first, second)
    tensors = _compare_tensors(pairs, weights=weights, read=read)
    return Diff(
        a=first.described(),
        b=second.described(),
        facts=tuple(facts),
        entries=changes,
        values=tuple(values.kept),
        nvalues=values.count,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.order)),
        notes=(*entries.notes, *notes),
    )


@dataclass(slots=True)
class _Choice:
    """Which paths are compared; remembers which patterns have matched something."""

    patterns: tuple[str, ...]
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if any(not isinstance(pattern, str) or not pattern for pattern in self.patterns):
            raise UsageError(
                f"only={self.patterns!r}", why="it is a list of patterns of paths", next="only=['model/*']"
            )

    def has(self, *paths: str) -> bool:
        matched = [pattern for pattern in self.patterns if any(_covers(pattern, path) for path in paths)]
        self._used.update(matched)
        return bool(matched) or not self.patterns

    def has_pair(self, pair: TensorPair) -> bool:
        entry, name, _ = pair.key
        return self.has(*(f"{entry}/{one}" for one in (name, *pair.aliases)))

    @property
    def is_complete(self) -> bool:
        """Whether every pattern has matched something."""
        return len(self._used) == len(set(self.patterns))

    def refuse_unused(self) -> None:
        unused = [pattern for pattern in self.patterns if pattern not in self._used]
        if unused:
            raise UsageError(
                f"the pattern {unused[0]!r} matches nothing",
                why="neither an entry, a tensor nor a value of the state is called so, on either side",
                next="`ckptmgr show RUN_DIR@REF` lists the entries; a pattern matches a whole path: 'model/layers.3.*'",
            )


def _covers(pattern: str, path: str) -> bool:
    parts = path.split("/")
    return any(fnmatchcase("/".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


@dataclass(slots=True)
class _Values:
    """Changes of values: the first ones, and how many there are."""

    chosen: _Choice
    kept: list[ValueChange] = field(default_factory=list)
    count: int = 0

    def add(self, changes: Sequence[ValueChange]) -> None:
        for change in changes:
            if self.chosen.has(change.path):
                self.count += 1
                if len(self.kept) < MAX_VALUES:
                    self.kept.append(change)


def _documents(a: OpenSide, b: OpenSide, entries: EntryPairs, chosen: _Choice) -> Iterator[ValueChange]:
    """Yield what differs between the state documents: entry by entry, and rank by rank where ranks have their own."""
    if a.manifest is None or b.manifest is None:
        return
    sides = (_Documents(a), _Documents(b))
    nranks = min(len(a.manifest.states), len(b.manifest.states))
    for rank in range(max(1, nranks)):
        for told, name in entries.first.items():
            names = (name, entries.second[told])
            is_own = [side.is_own(each) for side, each in zip(sides, names, strict=True)]
            if rank and not any(is_own):
                continue
            first, second = (side.tree(each, rank) for side, each in zip(sides, names, strict=True))
            if told in entries.optimizers and entries.renamed:
                second = renamed_tree(second, entries.renamed)
            for tree in () if chosen.is_complete else (first, second):
                any(chosen.has(path) and chosen.is_complete for path in paths_of_tree(tree, told))
            yield from changes_between_trees(first, second, told, rank=rank if any(is_own) and nranks > 1 else None)


class _Documents:
    """The state documents of a checkpoint: that of rank 0 is kept, and the last one of another rank."""

    def __init__(self, side: OpenSide) -> None:
        assert side.reader is not None
        self._reader = side.reader
        self._own = {entry.name for entry in side.reader.manifest.entries if entry.scope == "per-rank"}
        self._trees: dict[int, dict[str, Any]] = {}

    def is_own(self, entry: str) -> bool:
        """Say whether each rank has an entry for itself."""
        return entry in self._own

    def tree(self, entry: str, rank: int) -> Any:
        """Return the tree of an entry that a rank takes; what all have together stands in the document of rank 0."""
        rank = rank if entry in self._own else 0
        if rank not in self._trees:
            self._trees = {0: self._trees[0]} if 0 in self._trees else {}
            document = self._reader.read_state(rank)
            trees = document.get("entries") if isinstance(document, dict) else None
            self._trees[rank] = trees if isinstance(trees, dict) else {}
        if entry not in self._trees[rank]:
            raise CorruptCheckpointError(
                f"step {self._reader.manifest.step} of {self._reader.storage.url} contradicts itself",
                why=f"the manifest lists the entry {entry!r}, the state document of rank {rank} does not hold it",
                next="compare another checkpoint; `ckptmgr ls` lists them",
            )
        digests = {
            file.name: file.digest
            for file in self._reader.manifest.files
            if file.entry == entry and file.name is not None and file.rank in (None, rank)
        }
        tree = self._trees[rank][entry]
        return with_digests(tree, digests) if digests else tree


def _compare_tensors(pairs: Sequence[TensorPair], *, weights: bool, read: bool) -> list[TensorDiff]:
    wanted = [weights and _needs_reading(pair, read=read) for pair in pairs]
    total = sum(
        side.nbytes
        for pair, is_wanted in zip(pairs, wanted, strict=True)
        for side in (pair.a, pair.b)
        if is_wanted and side is not None
    )
    with progress("comparing tensors", total) as advance:
        return [_compared(pair, advance if is_wanted else None) for pair, is_wanted in zip(pairs, wanted, strict=True)]


def _needs_reading(pair: TensorPair, *, read: bool) -> bool:
    a, b = pair.a, pair.b
    if a is None or b is None or a.shape != b.shape or not Measure(a.dtype, b.dtype).is_comparable:
        return False
    return read or a.fingerprint is None or a.fingerprint != b.fingerprint


def _compared(pair: TensorPair, advance: Callable[[int], None] | None) -> TensorDiff:
    a, b = pair.a, pair.b
    measured: Measured | None = None
    is_same_bits: bool | None = None
    if a is not None and b is not None:
        if advance is not None:
            measured = _measured(a, b, advance)
            is_same_bits = measured.is_same_bits
        else:
            is_same_bits = _known_bits(a, b)
    entry, name, rank = pair.key
    return TensorDiff(entry, name, rank, _form(a), _form(b), is_same_bits, measured, pair.aliases)


def _known_bits(a: WholeTensor, b: WholeTensor) -> bool | None:
    """Return whether two tensors have the same bits, as far as that is known without reading."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.fingerprint is None or b.fingerprint is None:
        return None
    if a.fingerprint == b.fingerprint:
        return True
    # Cut in the same way, equal bits would have equal digests.
    cuts = [{(piece.offset, piece.shape) for piece in tensor.pieces} for tensor in (a, b)]
    return False if cuts[0] == cuts[1] else None


def _form(tensor: WholeTensor | None) -> TensorForm | None:
    return None if tensor is None else TensorForm(tensor.dtype, tensor.shape, tensor.nbytes)


def _measured(a: WholeTensor, b: WholeTensor, advance: Callable[[int], None]) -> Measured:
    measure = Measure(a.dtype, b.dtype)
    dim = band_dim((a, b))
    streams = [TensorStream(tensor, dim) for tensor in (a, b)]
    buffers: list[Array] = []
    for begin, end in forward_ranges((a, b)):
        # The first range is the largest.
        buffers = buffers or [np.empty(stream.nbytes_of(begin, end), dtype=np.uint8) for stream in streams]
        parts = [stream.read(begin, end, buffer) for stream, buffer in zip(streams, buffers, strict=True)]
        measure.add(*parts)
        advance(sum(part.size for part in parts))
    return measure.result()
