"""What there is to know about a loader before resuming it: its kind, its shape, and what reading from it depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from ckptmgr.errors import UsageError
from ckptmgr.state.elastic_sampler import ElasticSampler
from ckptmgr.state.generators import find_generators
from ckptmgr.state.loader_skip import why_not_skippable
from ckptmgr.state.per_sample_seed import PerSampleSeed
from ckptmgr.state.rng import AnyGenerator

__all__ = [
    "describe_loader",
    "differences",
    "generators_of",
    "keeps_workers",
    "length_of",
    "loader_kind",
    "set_data_epoch",
    "simple_attributes",
    "why_reading_may_differ",
]

_PLAIN_DATA = (TensorDataset, list, tuple, range, np.ndarray, torch.Tensor)
# What decides which samples make up batch k. A change in mid-epoch would repeat some samples and skip others.
# What facts of early checkpoints, and of jobs of one process, do not say.
_UNSAID = {"world_size": 1}
_SHAPE_FACTS = ("kind", "sampler", "dataset_length", "batch_size", "drop_last", "batches", "sample_seed", "world_size")


def loader_kind(source: object) -> str:
    """Return how the position in ``source`` can be restored.

    Returns:
        ``"stateful"``: it has ``state_dict`` and ``load_state_dict``. ``"map"``: a ``DataLoader`` that can skip without
        reading. ``"read"``: anything else that can be iterated from its beginning again, or a function that returns an
        iterable.

    Raises:
        UsageError: It cannot be iterated, or only once.
    """
    if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        if callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None)):
            return "stateful"
        if isinstance(source, DataLoader):
            return "map" if why_not_skippable(source) is None else "read"
        if isinstance(source, Iterator) and iter(source) is source:
            raise UsageError(
                f"{type(source).__qualname__} can be iterated only once",
                why="it is an iterator: neither a second epoch nor a resumed run could begin it anew",
                next="pass what it was made from: the DataLoader, the list, or the generator function without its ()",
            )
        return "read"
    if callable(source):
        return "read"
    raise UsageError(
        f"{type(source).__qualname__} cannot be iterated",
        next="pass a DataLoader, another iterable of batches, or a function that returns one",
    )


def length_of(source: object) -> int | None:
    """Return the number of batches of an epoch, or None where it is unknown or only an estimate."""
    dataset = getattr(source, "dataset", None)
    if isinstance(dataset, IterableDataset) and getattr(source, "num_workers", 0) > 1:
        # DataLoader divides the length of the whole; how the workers share it is up to the data set.
        return None
    try:
        return len(source)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def keeps_workers(source: object) -> bool:
    """Say whether worker processes live on from one epoch to the next."""
    return isinstance(source, DataLoader) and source.persistent_workers and source.num_workers > 0


def describe_loader(source: object) -> dict[str, Any]:
    """Return the facts that a checkpoint records of a loader: JSON-like values only."""
    dataset = getattr(source, "dataset", None)
    batch_sampler = getattr(source, "batch_sampler", None)
    seeds = [layer.seed for layer in _layers(dataset) if isinstance(layer, PerSampleSeed)]
    facts = {
        "kind": loader_kind(source),
        "loader": _name(source),
        "sampler": [_name(layer) for layer in _sampler_layers(_index_sampler(source))],
        "dataset_length": None if isinstance(dataset, IterableDataset) else _optional_len(dataset),
        "batch_size": _plain(getattr(source, "batch_size", None) or getattr(batch_sampler, "batch_size", None)),
        "drop_last": _plain(getattr(source, "drop_last", None) or getattr(batch_sampler, "drop_last", None)),
        "batches": length_of(source),
        "num_workers": _plain(getattr(source, "num_workers", 0)),
        "keeps_workers": keeps_workers(source),
        "sample_seed": seeds[0] if seeds else None,
    }
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if (world_size := torch.distributed.get_world_size()) > 1:
            facts["world_size"] = world_size
        if getattr(dataset, "is_elastic", False) is True:
            facts["is_elastic"] = True
    if isinstance(batch_sampler, ElasticSampler):
        facts |= {"batch_size": batch_sampler.global_batch_size, "world_size": batch_sampler.world_size}
    return facts


def differences(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each fact by which batch k of the live loader is not that of the saved one.

    A data set with ``is_elastic = True`` says that its state means the same on any number of ranks.
    """
    names = [name for name in _SHAPE_FACTS if name != "world_size" or not live.get("is_elastic")]
    if live.get("kind") != "map":
        # Each worker reads a share of an iterable data set, and a stateful loader keeps a state for each of them.
        names.append("num_workers")
    return [
        _ranks_differ(saved.get(name) or 1, live.get(name) or 1)
        if name == "world_size"
        else f"{name} is {saved.get(name)} in the checkpoint, {live.get(name)} in the live loader"
        for name in names
        if (saved.get(name) or _UNSAID.get(name)) != (live.get(name) or _UNSAID.get(name))
    ]


def _ranks_differ(saved: int, live: int) -> str:
    return (
        f"it was read by {saved} rank{'s' * (saved != 1)}, each its own batches, and this job has {live}: which "
        "samples are left cannot be told without an ElasticSampler (or a data set with is_elastic = True)"
    )


def why_reading_may_differ(loader: DataLoader[Any]) -> str | None:
    """Return why a sample that a worker reads may depend on what the worker read before, or None when it cannot.

    None only where that is known: :class:`PerSampleSeed`, and plain data (tensors, arrays, lists, ``TensorDataset``)
    with torch's own collate function. A probe that reads a sample and looks whether the RNG moved would prove nothing
    about the other samples.
    """
    owned = find_generators({"collate_fn": loader.collate_fn})
    if owned:
        return f"collate_fn draws from a generator of its own ({', '.join(owned)})"
    leaves = [layer for layer in _layers(loader.dataset) if not _has_inner(layer)]
    if all(isinstance(leaf, PerSampleSeed) for leaf in leaves):
        return None
    unknown = [leaf for leaf in leaves if not isinstance(leaf, PerSampleSeed) and type(leaf) not in _PLAIN_DATA]
    if unknown:
        return f"{_name(unknown[0])} may draw random numbers in the workers"
    if loader.collate_fn not in (default_collate, default_convert):
        return f"collate_fn {_name(loader.collate_fn)} may draw random numbers in the workers"
    if loader.worker_init_fn is not None:
        return f"worker_init_fn {_name(loader.worker_init_fn)} may change what the workers read"
    return None


def set_data_epoch(source: object, epoch: int) -> None:
    """Call ``set_epoch(epoch)`` on whatever has it: samplers, batch sampler, data set and those inside it."""
    batch_sampler = getattr(source, "batch_sampler", None)
    told: set[int] = set()
    for root in (getattr(source, "sampler", None), batch_sampler):
        for layer in _sampler_layers(root):
            _tell(layer, epoch, told)
    pending = [getattr(source, "dataset", None)]
    while pending:
        dataset = pending.pop()
        # A data set that takes the epoch passes it on by itself, if it should.
        if not _tell(dataset, epoch, told):
            pending.extend(_inner(dataset))


def simple_attributes(source: object) -> dict[str, Any]:
    """Return the numbers and flags that sampler and data set keep, by path, to notice state that nobody restores."""
    owners: list[tuple[str, object]] = [
        *((f"sampler{'.sampler' * i}", layer) for i, layer in enumerate(_sampler_layers(_index_sampler(source)))),
        *((f"dataset[{i}]" if i else "dataset", layer) for i, layer in enumerate(_layers(_dataset_of(source)))),
    ]
    # torchdata's distributed sampler counts in these; they are stale between epochs and reset by iter().
    ignored = {"yielded", "next_yielded", "_told_epoch", "_nsearches"}
    return {
        f"{path}.{name}": value
        for path, owner in owners
        for name, value in getattr(owner, "__dict__", {}).items()
        if name not in ignored and _is_simple(value)
    }


def generators_of(source: object) -> dict[str, AnyGenerator]:
    """Return the generator objects that iterating ``source`` may draw from, by path; not the global ones."""
    if not isinstance(source, DataLoader) and not hasattr(source, "dataset"):
        return find_generators({"loader": source})
    names = ("generator", "batch_sampler", "sampler", "dataset", "collate_fn", "worker_init_fn")
    return find_generators({name: getattr(source, name, None) for name in names})


def _dataset_of(source: object) -> object:
    if hasattr(source, "dataset"):
        return source.dataset
    return None if isinstance(source, list | tuple) else source


def _inner(dataset: object) -> list[object]:
    if isinstance(dataset, PerSampleSeed):
        return []
    if isinstance(dataset, Subset):
        return [dataset.dataset]
    if isinstance(dataset, ConcatDataset):
        return list(dataset.datasets)
    if isinstance(dataset, StackDataset):
        return list(dataset.datasets.values() if isinstance(dataset.datasets, dict) else dataset.datasets)
    return []


def _has_inner(dataset: object) -> bool:
    # Only these exact types are known to add nothing of their own; a subclass may do anything.
    return type(dataset) in (Subset, ConcatDataset, StackDataset)


def _layers(dataset: object) -> Iterator[object]:
    if dataset is not None:
        yield dataset
        for inner in _inner(dataset):
            yield from _layers(inner)


def _index_sampler(source: object) -> object:
    batch_sampler = getattr(source, "batch_sampler", None)
    return getattr(source, "sampler", None) if batch_sampler is None else batch_sampler


def _sampler_layers(sampler: object) -> Iterator[object]:
    depth = 0
    while sampler is not None and depth < 8:
        yield sampler
        sampler = getattr(sampler, "sampler", None)
        depth += 1


def _tell(target: object, epoch: int, told: set[int]) -> bool:
    set_epoch = getattr(target, "set_epoch", None)
    if not callable(set_epoch):
        return False
    if id(target) not in told:
        told.add(id(target))
        set_epoch(epoch)
    return True


def _is_simple(value: object) -> bool:
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -(2**53) < value < 2**53
    return isinstance(value, float) and math.isfinite(value)


def _plain(value: object) -> int | bool | None:
    return value if isinstance(value, int) else None


def _optional_len(value: object) -> int | None:
    try:
        return len(value)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _name(value: object) -> str:
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return type(value).__qualname__
