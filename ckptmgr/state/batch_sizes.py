"""Another batch size in the middle of an epoch: the epoch goes on with exactly the samples that were not trained yet.

Which samples an epoch has, and in which order, is up to the sampler; how many of them make a batch is not. So a
position counts samples as soon as the batch size changes: the batches that were trained keep their sizes, and the rest
of the order is cut anew. A further save in that epoch remembers all sizes, so that another process can cut it alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.elastic_position import count_elastically, elastic_sampler_of
from ckptmgr.state.elastic_sampler import RestOfEpoch
from ckptmgr.state.loader_facts import describe_loader, differences

__all__ = ["SIZE_ATTRIBUTE", "Earlier", "RecutBatches", "batches_passed", "batches_to_pass", "recut_position"]

Earlier = Sequence[Sequence[int]]
"""``[batch size, number of batches]`` of what was trained in this epoch before the size that is in force."""

_SIZE_FACTS = ("batch_size", "batches")
SIZE_ATTRIBUTE = "sampler.batch_size"
"""Path of the one attribute of a loader's sampler that another batch size changes."""


@dataclass(frozen=True, slots=True)
class _Cut:
    earlier: list[list[int]]
    began_at: int
    batch: int
    is_last_batch: bool
    nsamples: int


class RecutBatches:
    """The batches of one epoch of which the first ones had other sizes.

    Args:
        sampler: The live loader's, over the order of the epoch.
        earlier: The sizes of the batches before those of the live loader.
    """

    def __init__(self, sampler: BatchSampler, earlier: Earlier) -> None:
        self._sampler = sampler
        self._earlier = [(int(size), int(count)) for size, count in earlier]

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self._sampler.sampler)
        for size, count in self._earlier:
            for _ in range(count):
                batch = list(itertools.islice(order, size))
                if len(batch) < size:
                    return
                yield batch
        yield from BatchSampler(order, self._sampler.batch_size, self._sampler.drop_last)

    def __len__(self) -> int:
        trained = sum(size * count for size, count in self._earlier)
        batches = sum(count for _, count in self._earlier)
        return batches + _number_of_batches(self._sampler, len(self._sampler.sampler) - trained)  # type: ignore[arg-type]


def batches_passed(state: Mapping[str, Any]) -> int:
    """Return how many batches of the epoch were trained, whatever their sizes.

    Args:
        state: A position with ``batch`` and, once the size has changed in its epoch, ``recut``.
    """
    recut = state.get("recut")
    if not recut:
        return int(state["batch"])
    return int(state["batch"]) - int(recut["began_at"]) + sum(int(count) for _, count in recut["earlier"])


def batches_to_pass(loader: Any, recut: Mapping[str, Any] | None) -> Iterable[list[int]] | None:
    """Return the epoch's batches, the first ones in their own sizes; None: those of the loader's own sampler.

    With an `ElasticSampler`, they begin where the sizes that are in force do.
    """
    sampler = elastic_sampler_of(loader)
    if sampler is not None:
        return RestOfEpoch(sampler, int(recut["samples"]) if recut else 0)
    return None if recut is None else RecutBatches(loader.batch_sampler, recut["earlier"])


def recut_position(state: Mapping[str, Any], loader: Any) -> tuple[dict[str, Any], str] | None:
    """Count a position in mid-epoch anew for a live loader with another batch size.

    The index of the batch becomes the one at which the epoch ends where the live loader's ends: its length does not
    change in mid-epoch, and nobody who counts to it has to know.

    Args:
        state: The position: ``epoch``, ``batch``, ``facts``, ``attributes`` and perhaps ``recut`` and ``sampler``.
        loader: The live loader.

    Returns:
        What is new of the position, and a sentence for the user; None if the batch size is not what differs.

    Raises:
        StateMismatchError: The batch size differs, and the rest of the epoch cannot be cut anew with this loader.
    """
    sampler = elastic_sampler_of(loader)
    if sampler is not None and "sampler" in state:
        return count_elastically(state, loader, sampler)
    saved, live = state["facts"], describe_loader(loader)
    if saved["batch_size"] == live["batch_size"] or not (saved["batch_size"] and live["batch_size"]):
        return None
    same_but_size = {**live, **{name: saved[name] for name in _SIZE_FACTS}}
    others = differences(saved, same_but_size)
    reason = "; ".join(others) if others else _why_not(saved, loader)
    was, now = saved["batch_size"], live["batch_size"]
    if reason is not None:
        raise StateMismatchError(
            f"the batch size was {was} and is {now}, in the middle of epoch {state['epoch']}",
            why=f"the samples that are left of the epoch cannot be told: {reason}",
            next=f"give batch_size={was} until the end of this epoch, or resume from a checkpoint at the end of one",
        )
    cut = _cut(state, loader.batch_sampler, was)
    recut = {"earlier": cut.earlier, "began_at": cut.began_at} if cut.earlier else None
    attributes = {**state["attributes"], **{name: now for name in state["attributes"] if name == SIZE_ATTRIBUTE}}
    new = {
        "batch": cut.batch,
        "is_last_batch": cut.is_last_batch,
        "recut": recut,
        "facts": live,
        "attributes": attributes,
    }
    return new, f"batch size {was} -> {now}: going on after {cut.nsamples} samples of epoch {state['epoch']}"


def _why_not(saved: Mapping[str, Any], loader: Any) -> str | None:
    kind = type(loader).__qualname__
    if saved["kind"] == "stateful":
        return f"{kind} has a state of its own, which counts batches"
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return f"{type(loader.dataset).__qualname__} is an IterableDataset, without an order that could be cut anew"
    if saved["kind"] != "map" or not isinstance(loader, DataLoader):
        return f"{kind} can only be read from its beginning"
    sampler = loader.batch_sampler
    if type(sampler) is not BatchSampler or saved["sampler"][:1] != [BatchSampler.__qualname__]:
        return f"{type(sampler).__qualname__} decides by itself which samples make a batch"
    if not isinstance(sampler.sampler, Sized):
        return f"{type(sampler.sampler).__qualname__} has no length"
    return None


def _cut(state: Mapping[str, Any], sampler: BatchSampler, size: int) -> _Cut:
    before = state.get("recut") or {"earlier": [], "began_at": 0}
    earlier = [[int(old), int(count)] for old, count in before["earlier"]]
    trained = int(state["batch"]) - int(before["began_at"])
    if trained:
        earlier.append([size, trained])
    nsamples = sum(old * count for old, count in earlier)
    # Back at a size, its batches are counted on.
    continued = earlier.pop()[1] if earlier and earlier[-1][0] == sampler.batch_size else 0
    length, order = len(sampler), sampler.sampler
    batch = length - _number_of_batches(sampler, len(order) - nsamples)  # type: ignore[arg-type]
    return _Cut(earlier, batch - continued, batch, batch >= length, nsamples)


def _number_of_batches(sampler: BatchSampler, nsamples: int) -> int:
    nsamples = max(nsamples, 0)
    return nsamples // sampler.batch_size if sampler.drop_last else -(-nsamples // sampler.batch_size)
