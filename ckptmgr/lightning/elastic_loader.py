"""A train loader whose epoch goes on on any number of ranks, where Lightning would give it a sampler that cannot."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from ckptmgr.state.elastic_sampler import ElasticSampler
from ckptmgr.state.loader_facts import loader_kind

__all__ = ["ElasticLoaders"]


class ElasticLoaders:
    """Stands between a Trainer and the place where it gives loaders a sampler for several ranks.

    Lightning's DistributedSampler cuts the epoch into one part for each rank, so what is left of it in mid-epoch cannot
    be told on another number of ranks; and it repeats samples. An `ElasticSampler` takes its place in train loaders
    that only say how large a batch is and whether to shuffle. One that the user gave stays as it is.

    Args:
        trainer: The Trainer.
        notify: Takes one sentence for the user.
    """

    def __init__(self, trainer: Any, notify: Callable[[str], None]) -> None:
        self._trainer = trainer
        self._notify = notify
        self._has_told = False
        self._continued: Mapping[str, Any] | None = None

    def go_on_with(self, position: Mapping[str, Any] | None) -> None:
        """Note the position that training goes on from: its epochs have an order already."""
        loaders = position["loaders"] if position is not None else ()
        self._continued = next((saved["sampler"] for saved in loaders if "sampler" in saved), None)

    def prepare(self, original: Callable[..., Any], loader: Any, shuffle: bool, mode: Any) -> Any:
        """Return what the Trainer iterates instead of a loader; called in the place of ``_prepare_dataloader``."""
        if mode != "predict" and isinstance(getattr(loader, "batch_sampler", None), ElasticSampler):
            return loader
        if mode != "train" or not self._is_wanted(loader):
            return original(loader, shuffle, mode)
        return self._with_elastic_sampler(loader)

    def _is_wanted(self, loader: Any) -> bool:
        trainer = self._trainer
        if not _leaves_the_order_to_us(loader) or trainer.overfit_batches:
            return False
        if trainer.world_size > 1:
            return bool(trainer._data_connector._requires_distributed_sampler(loader))
        # One rank needs no sampler of its own, unless it goes on in an order that several began.
        return self._continued is not None and bool(trainer._accelerator_connector.use_distributed_sampler)

    def _with_elastic_sampler(self, loader: Any) -> Any:
        place = {"num_replicas": 1, "rank": 0}
        if self._trainer.world_size > 1:
            place = self._trainer.distributed_sampler_kwargs
        shuffle = isinstance(loader.sampler, RandomSampler)
        # Lightning's own choice of a seed; but a run that goes on keeps the order that it began with.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self._continued is None else self._continued["seed"]
        sampler = ElasticSampler(
            len(loader.dataset),
            global_batch_size=loader.batch_size * place["num_replicas"],
            shuffle=shuffle,
            seed=seed,
            drop_last=loader.drop_last,
            rank=place["rank"],
            world_size=place["num_replicas"],
        )
        if not shuffle and not self._has_told:
            self._has_told = True
            self._notify("the train loader has shuffle=False, and is not shuffled: Lightning alone would have done so")
        clone = copy.copy(loader)
        # DataLoader.__setattr__ refuses to replace a sampler, so the entries are set below it.
        vars(clone).update(batch_sampler=sampler, sampler=sampler.sampler, _iterator=None)
        return clone


def _leaves_the_order_to_us(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler: Any = loader.sampler
    if loader_kind(loader) != "map" or not len(loader.dataset):  # type: ignore[arg-type]
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    return type(sampler) is SequentialSampler
