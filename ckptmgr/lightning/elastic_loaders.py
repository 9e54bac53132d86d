"""Train loaders whose epoch goes on on another number of ranks: what Lightning would shard, an `ElasticSampler` does.

With ``use_distributed_sampler=True`` Lightning puts a DistributedSampler into each loader. Its order depends on the
number of ranks, so an epoch that was interrupted could not go on on others. For training, an elastic sampler takes its
place; a loader that has one already is left as it is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from ckptmgr.state.elastic_sampler import ElasticSampler

__all__ = ["ElasticLoaders"]


class ElasticLoaders:
    """Takes the place of the method by which a Trainer puts samplers into loaders, for one ``fit``.

    Args:
        trainer: The Trainer.
        saved: Returns the saved state of the elastic sampler that is to be continued, if there is one.
    """

    def __init__(self, trainer: Any, saved: Callable[[], Mapping[str, Any] | None]) -> None:
        self._trainer = trainer
        self._connector = trainer._data_connector
        self._saved = saved

    def install(self) -> None:
        """Take the place. Idempotent."""
        original = type(self._connector)._prepare_dataloader

        def prepare(dataloader: object, shuffle: bool, mode: Any) -> object:
            if isinstance(getattr(dataloader, "batch_sampler", None), ElasticSampler):
                return dataloader
            if str(getattr(mode, "value", mode)) == "train" and self._can_take(dataloader):
                return self._elastic(dataloader, shuffle=shuffle)
            return original(self._connector, dataloader, shuffle, mode)

        self._connector._prepare_dataloader = prepare

    def uninstall(self) -> None:
        """Leave nothing behind. Idempotent."""
        vars(self._connector).pop("_prepare_dataloader", None)

    def _can_take(self, dataloader: Any) -> bool:
        if type(dataloader) is not DataLoader or self._trainer.overfit_batches:
            return False
        sampler = dataloader.sampler
        is_plain = (
            type(dataloader.batch_sampler) is BatchSampler
            and type(sampler) in (RandomSampler, SequentialSampler)
            and not getattr(sampler, "replacement", False)
            and getattr(sampler, "_num_samples", None) is None
        )
        # One rank goes on elastically with what several have begun.
        return is_plain and (self._connector._requires_distributed_sampler(dataloader) or self._saved() is not None)

    def _elastic(self, dataloader: Any, *, shuffle: bool) -> Any:
        kwargs = self._trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        saved = self._saved() or {"seed": int(os.environ.get("PL_GLOBAL_SEED", 0)), "shuffle": shuffle}
        world_size = int(kwargs["num_replicas"])
        sampler = ElasticSampler(
            len(dataloader.dataset),
            global_batch_size=dataloader.batch_size * world_size,
            shuffle=bool(saved["shuffle"]),
            seed=int(saved["seed"]),
            drop_last=dataloader.drop_last,
            rank=int(kwargs["rank"]),
            world_size=world_size,
        )
        elastic = copy.copy(dataloader)
        # DataLoader.__setattr__ refuses to replace a sampler, so the entries are set below it.
        elastic.__dict__.update(batch_sampler=sampler, sampler=sampler.sampler, batch_size=None, drop_last=False)
        return elastic
