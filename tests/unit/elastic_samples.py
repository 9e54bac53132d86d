"""Ranks that train one epoch together, in one process: what each batch had, and where they stood."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ckptmgr import ElasticSampler


@dataclass
class Epoch:
    """An epoch that several starts train, each on its number of ranks, until it is killed.

    Attributes:
        batches: For each global batch that was trained, what each rank had of it.
        state: Of the samplers, as the last save has it.
    """

    length: int
    epoch: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    batches: list[list[list[int]]] = field(default_factory=list)
    state: dict[str, Any] | None = None

    def train(self, world_size: int, batch_size: int, nbatches: int | None = None, *, ahead: int = 0) -> Epoch:
        """Start ranks with so many samples for each; a kill after ``nbatches`` loses what was fetched ahead."""
        samplers = [
            ElasticSampler(
                self.length, global_batch_size=world_size * batch_size, rank=rank, world_size=world_size, **self.options
            )
            for rank in range(world_size)
        ]
        for sampler in samplers:
            if self.state is not None:
                sampler.load_state_dict(self.state)
            sampler.set_epoch(self.epoch)
        left = samplers[0].batches_left(samplers[0].position)
        trained = left if nbatches is None else min(nbatches, left)
        fetched = [list(itertools.islice(sampler, trained + ahead)) for sampler in samplers]
        assert {len(batches) for batches in fetched} == {min(trained + ahead, left)}
        self.batches += [list(ranks) for ranks in zip(*(batches[:trained] for batches in fetched), strict=True)]
        for sampler in samplers:
            sampler.advance(trained)
        states = [sampler.state_dict() for sampler in samplers]
        assert all(state == states[0] for state in states)
        self.state = states[0]
        return self

    @property
    def samples(self) -> list[int]:
        """What was trained, in order but for the ranks of a batch."""
        return flat(flat(self.batches))

    @property
    def position(self) -> int:
        return 0 if self.state is None else int(self.state["position"])


def order(length: int, epoch: int = 0, **options: Any) -> list[int]:
    """The order of an epoch, read off one rank that trains one by one."""
    sampler = ElasticSampler(length, global_batch_size=1, **options)
    sampler.set_epoch(epoch)
    return flat(sampler)


def flat(batches: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(batches))
