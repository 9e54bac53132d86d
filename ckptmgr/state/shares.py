"""Which rank writes what: every byte of a checkpoint is written once, and the work is split over the ranks by bytes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from xxhash import xxh3_128_hexdigest

from ckptmgr.errors import StateMismatchError, TopologyError
from ckptmgr.format.payload import Scope
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.tensors import StoredTensor

__all__ = ["Layout", "Share", "layout_digest", "layout_of", "plan_shares", "refuse_different_layouts"]

Layout: TypeAlias = list[list[Any]]
"""``[entry, name, dtype, shape, whole shape or None, offset or None, nbytes, is rank 0's]`` for each tensor of which
somebody writes a copy for all; what JSON holds."""

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes of a state.

    Attributes:
        rank: Which rank.
        world_size: Of how many.
        mine: Entry and name of replicated tensors and shards that this rank writes.
        own: Entry and name of compared tensors that differ between the ranks: each writes its own.
    """

    OF_ONE: ClassVar[Share]

    rank: int
    world_size: int
    mine: frozenset[tuple[str, str]] = frozenset()
    own: frozenset[tuple[str, str]] = frozenset()

    def scope_of(self, entry: CapturedEntry, tensor: StoredTensor) -> Scope | None:
        """Return the scope in which this rank writes a tensor; None where another rank does."""
        key = (entry.name, tensor.name)
        if self.world_size == 1:
            return "replicated"
        special = entry.tensor_scopes.get(tensor.name)
        if entry.scope == "per-rank" or special == "per-rank" or (special == "compared" and key in self.own):
            return "per-rank"
        if key not in self.mine:
            return None
        return "replicated" if tensor.global_offset is None else "sharded"


Share.OF_ONE = Share(0, 1)


def layout_of(entries: Iterable[CapturedEntry], encoders: Iterable[EntryEncoder]) -> Layout:
    """Describe what is written once for all ranks."""
    layout: Layout = []
    for entry, encoder in zip(entries, encoders, strict=True):
        for tensor in encoder.tensors if entry.scope == "replicated" else ():
            special = entry.tensor_scopes.get(tensor.name)
            if special != "per-rank":
                whole, offset = tensor.global_shape, tensor.global_offset
                layout.append(
                    [
                        *(entry.name, tensor.name, tensor.dtype, list(tensor.shape)),
                        *(whole and list(whole), None if offset is None else list(offset)),
                        *(tensor.nbytes, special in ("rank-0", "compared")),
                    ]
                )
    return layout


def layout_digest(layout: Layout) -> str:
    """Return what says that two layouts are the same."""
    return xxh3_128_hexdigest(repr(layout).encode())


def refuse_different_layouts(layouts: Sequence[Layout]) -> None:
    """Raise if the ranks do not have the same tensors.

    Raises:
        StateMismatchError: Names what some ranks have and others have not.
    """
    wanted = {(entry, name): _whole(item) for item in layouts[0] for entry, name in [item[:2]]}
    lines: list[str] = []
    for rank, layout in enumerate(layouts[1:], start=1):
        found = {(item[0], item[1]): _whole(item) for item in layout}
        for key in [key for key in wanted if key not in found][:_SHOWN]:
            lines.append(f"rank {rank} has no {'/'.join(key)}")
        for key in [key for key in found if key not in wanted][:_SHOWN]:
            lines.append(f"rank 0 has no {'/'.join(key)}, which rank {rank} has")
        for key in [key for key in wanted if key in found and found[key] != wanted[key]][:_SHOWN]:
            dtype, shape = wanted[key]
            lines.append(
                f"{'/'.join(key)} is {dtype} {shape} on rank 0, {found[key][0]} {found[key][1]} on rank {rank}"
            )
    if lines:
        raise StateMismatchError(
            "the ranks do not hold the same state",
            why="\n        ".join(lines[:_SHOWN])
            + (f"\n        and {len(lines) - _SHOWN} more" * (len(lines) > _SHOWN)),
            next="build the same modules and optimizers on every rank; what differs by design goes into an entry of "
            "its own (a dict, or an object with state_dict), which is saved for each rank",
        )


def plan_shares(layouts: Sequence[Layout]) -> list[list[int]]:
    """Decide who writes what, so that the ranks write about equally many bytes.

    The largest tensors are given away first, each to the rank that has the least so far among those that hold it.
    A pure function: the same layouts give the same plan.

    Args:
        layouts: Of each rank; with the same names.

    Returns:
        For each rank, indices into its layout.

    Raises:
        TopologyError: No rank holds a part of a sharded tensor.
    """
    holders: dict[tuple[str, str, tuple[int, ...] | None], list[tuple[int, int]]] = {}
    nbytes: dict[tuple[str, str, tuple[int, ...] | None], int] = {}
    for rank, layout in enumerate(layouts):
        for index, (entry, name, _, _, whole, offset, size, is_rank_0s) in enumerate(layout):
            if is_rank_0s and rank:
                continue
            is_empty = whole is not None and size == 0 and 0 not in whole
            if is_empty:
                continue
            key = (entry, name, None if offset is None else tuple(offset))
            holders.setdefault(key, []).append((rank, index))
            nbytes[key] = size
    _refuse_holes(layouts, nbytes)
    shares: list[list[int]] = [[] for _ in layouts]
    load = [0] * len(layouts)
    every = list(range(len(layouts)))
    least = [(0, rank) for rank in every]
    for key in sorted(holders, key=lambda key: (-nbytes[key], key[0], key[1], key[2] or ())):
        held = holders[key]
        if len(held) == len(layouts):
            # All hold it, as with DDP: who has the least is on top of the heap, once stale places are put right.
            while load[least[0][1]] != least[0][0]:
                heapq.heapreplace(least, (load[least[0][1]], least[0][1]))
            rank = least[0][1]
            index = held[rank][1]
        else:
            rank, index = min(held, key=lambda place: (load[place[0]], place[0]))
        shares[rank].append(index)
        load[rank] += nbytes[key]
    return [sorted(share) for share in shares]


def _whole(item: list[Any]) -> tuple[str, tuple[int, ...]]:
    return item[2], tuple(item[3] if item[4] is None else item[4])


def _refuse_holes(layouts: Sequence[Layout], nbytes: dict[Any, int]) -> None:
    wanted = {(item[0], item[1]) for item in layouts[0]}
    for entry, name in sorted(wanted - {(entry, name) for entry, name, _ in nbytes}):
        raise TopologyError(
            f"no rank holds {entry}/{name}", why="its shards are empty on all ranks", next="look at its device mesh"
        )
