"""A batch sampler whose epoch goes on with the samples that are left, on another number of ranks too."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed
from torch.utils.data import Sampler

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.state.epoch_order import EpochOrder, whole_number

__all__ = ["ElasticSampler", "RestOfEpoch"]

_log = logging.getLogger("ckptmgr")

_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Split:
    global_batch_size: int
    drop_last: bool
    rank: int | None
    world_size: int | None


class ElasticSampler(Sampler[list[int]]):
    """Batches whose order depends on seed, epoch and global position only.

    The *position* is how many samples of the epoch all ranks together have trained. From there on the order of the
    epoch is cut into global batches, and rank ``r`` of ``n`` takes every ``n``-th sample of each, beginning with the
    ``r``-th. So an epoch that was interrupted goes on with exactly the samples that are left, each once, whatever the
    number of ranks and the batch size are then.

    The end of an epoch, where fewer samples are left than make a global batch:

    ===================================  ==============================================================================
    left over                            what happens
    ===================================  ==============================================================================
    any, ``drop_last=True``              not trained in this epoch
    at least one for each rank           a smaller last batch; ranks differ by one sample at most
    fewer than ranks                     they join the last full batch, so that no rank waits for one that has no batch:
                                         some ranks get one sample more than usual in it
    fewer than ranks, and there is no    one batch of one sample for each rank: ranks that would have none repeat one of
    full batch (before it) any more      the others', which is logged. Nothing else is ever repeated
    ===================================  ==============================================================================

    The order itself is :class:`~ckptmgr.state.epoch_order.EpochOrder`'s, the attribute ``sampler``.

    ``Checkpointer`` and ``CheckpointManager`` keep the position of a ``DataLoader`` that has this sampler by
    themselves, and call ``set_epoch``. In a loop of your own, call :meth:`advance` for each batch that was *trained*
    (workers fetch ahead, so the sampler cannot know), save :meth:`state_dict`, and call :meth:`set_epoch` at the
    beginning of each epoch, also of one that goes on.

    Args:
        length: Number of samples of the data set.
        global_batch_size: Samples of a step on all ranks together, gradient accumulation not included. The number of
            ranks must divide it.
        shuffle: Whether each epoch has an order of its own; else it is 0, 1, 2, ...
        seed: From 0 up to 2**64 - 1; the same on all ranks.
        drop_last: Leave out what does not make a global batch at the end of the epoch.
        rank: This process among those that train together. None: that of ``torch.distributed`` if it is initialised
            when the batches are asked for, else 0.
        world_size: Number of those processes. None: that of ``torch.distributed``, else 1.

    Raises:
        UsageError: A number is out of range, or the number of ranks does not divide ``global_batch_size``.

    Example:
        >>> sampler = ElasticSampler(len(dataset), global_batch_size=256, seed=7)
        >>> loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
    """

    def __init__(
        self,
        length: int,
        *,
        global_batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise UsageError(f"rank={rank!r}, world_size={world_size!r}", why="they go together: give both or neither")
        if rank is not None:
            world_size = whole_number("world_size", world_size, at_least=1)
            rank = whole_number("rank", rank, below=world_size)
        self.sampler = EpochOrder(length, shuffle=shuffle, seed=seed)
        size = whole_number("global_batch_size", global_batch_size, at_least=1)
        self._split = _Split(size, bool(drop_last), rank, world_size)
        # Epoch and position: what was trained of another epoch says nothing about this one.
        self._trained = (0, 0)
        self._place()

    @property
    def length(self) -> int:
        """Number of samples of an epoch."""
        return self.sampler.length

    @property
    def global_batch_size(self) -> int:
        """Samples of a batch on all ranks together."""
        return self._split.global_batch_size

    @property
    def drop_last(self) -> bool:
        """Whether what makes no global batch is left out."""
        return self._split.drop_last

    @property
    def shuffle(self) -> bool:
        """Whether each epoch has an order of its own."""
        return self.sampler.shuffle

    @property
    def seed(self) -> int:
        """What the order depends on besides the epoch."""
        return self.sampler.seed

    @property
    def rank(self) -> int:
        """This process among those that train together."""
        return self._place()[0]

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return self._place()[1]

    @property
    def epoch(self) -> int:
        """The epoch whose batches are given."""
        return self.sampler.epoch

    @property
    def position(self) -> int:
        """Samples of this epoch that were trained, by all ranks together."""
        epoch, position = self._trained
        return position if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0. Another one begins at its first sample, the same one keeps its position."""
        self.sampler.set_epoch(epoch)

    def advance(self, batches: int = 1) -> None:
        """Count batches of this epoch as trained; to be called on every rank. A running iteration is not moved.

        Raises:
            UsageError: The epoch has fewer batches left.
        """
        left = self.batches_left(self.position)
        if whole_number("batches", batches) > left:
            raise UsageError(
                f"{batches} batches cannot have been trained", why=f"epoch {self.epoch} had {left} batches left"
            )
        self._trained = (self.epoch, self.position_after(batches, start=self.position))

    def batches_left(self, start: int) -> int:
        """Return how many batches each rank gets from position ``start`` to the end of the epoch."""
        full, rest = divmod(max(self.length - start, 0), self.global_batch_size)
        if self.drop_last or not rest or (full and rest < self.world_size):
            return full
        return full + 1

    def position_after(self, batches: int, *, start: int = 0) -> int:
        """Return the position after ``batches`` batches that were cut from position ``start`` on."""
        if not self.drop_last and batches >= self.batches_left(start):
            return self.length
        return start + min(batches, self.batches_left(start)) * self.global_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return _Batches(self, self.position)

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, whatever was trained of this one."""
        return self.batches_left(0)

    def state_dict(self) -> dict[str, Any]:
        """Return seed, epoch, position and length: equal on all ranks, and plain values."""
        return self.state_at(self.position)

    def state_at(self, position: int) -> dict[str, Any]:
        """Return what :meth:`state_dict` would at another position of this epoch."""
        return {
            "version": _VERSION,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "position": position,
            "length": self.length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position. Number of ranks and batch size may be others than when it was saved.

        Raises:
            StateMismatchError: The position is inside of an epoch, and length, seed or shuffle are others: the samples
                that are left cannot be told. Nothing was changed.
        """
        self.check(state)
        epoch, position = int(state["epoch"]), int(state["position"])
        if position >= int(state["length"]):
            # Over is over, of whatever length.
            position = self.length
        self.set_epoch(epoch)
        self._trained = (epoch, position)

    def check(self, state: Mapping[str, Any]) -> None:
        """Look whether the samples that are left at a saved position can be told; changes nothing.

        Raises:
            StateMismatchError: They cannot.
        """
        if state.get("version") != _VERSION:
            raise StateMismatchError(
                f"a sampler's state of version {state.get('version')} cannot be read",
                why=f"this version reads {_VERSION}",
                next="resume with the version of ckptmgr that saved it",
            )
        live, position = self.state_dict(), state["position"]
        names = [name for name in ("length", "seed", "shuffle") if state[name] != live[name]]
        if names and 0 < position < state["length"]:
            raise StateMismatchError(
                f"the sampler is not the one that had trained {position} samples of epoch {state['epoch']}",
                why="; ".join(f"{name} was {state[name]} and is {live[name]}" for name in names),
                next="go on with that sampler, or from a state between two epochs",
            )

    def _place(self) -> tuple[int, int]:
        rank, world_size = self._split.rank, self._split.world_size
        if rank is None or world_size is None:
            is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if is_there else 0
            world_size = torch.distributed.get_world_size() if is_there else 1
        if self.global_batch_size % world_size:
            raise UsageError(
                f"global_batch_size={self.global_batch_size} cannot be split over {world_size} ranks",
                why="each rank takes the same number of samples of a global batch",
                next=f"make it a multiple of {world_size}, or start another number of ranks",
            )
        return rank, world_size


class RestOfEpoch:
    """This rank's batches from a position to the end of the epoch that the sampler is set to when they are asked for.

    Args:
        sampler: Whose batches.
        start: The position.
    """

    def __init__(self, sampler: ElasticSampler, start: int) -> None:
        self._sampler = sampler
        self._start = start

    def __iter__(self) -> Iterator[list[int]]:
        return _Batches(self._sampler, self._start)

    def __len__(self) -> int:
        return self._sampler.batches_left(self._start)


class _Batches(Iterator[list[int]]):
    """An iterator with a state: torchdata begins the epoch again if a sampler has one and its iterator has none."""

    def __init__(self, sampler: ElasticSampler, start: int) -> None:
        self._sampler = sampler
        self._start = start
        self._given = 0
        self._order: npt.NDArray[np.int64] | None = None

    def __next__(self) -> list[int]:
        sampler = self._sampler
        if self._given >= sampler.batches_left(self._start):
            raise StopIteration
        if self._order is None:
            # Not earlier: a loader with workers makes two iterators and uses one, and sorting millions takes a while.
            self._order = sampler.sampler.indices()
        begin = sampler.position_after(self._given, start=self._start)
        self._given += 1
        batch = self._order[begin : sampler.position_after(self._given, start=self._start)]
        rank, world_size = sampler.rank, sampler.world_size
        if rank >= len(batch):
            _log.warning(
                "%d samples are left of epoch %d for %d ranks: rank %d trains one of them again",
                len(batch),
                sampler.epoch,
                world_size,
                rank,
            )
            rank %= len(batch)
        mine: list[int] = batch[rank::world_size].tolist()
        return mine

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_at(self._sampler.position_after(self._given, start=self._start))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sampler.check(state)
        self._start, self._given = int(state["position"]), 0
