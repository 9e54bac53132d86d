"""Random augmentation that depends on the sample and the epoch, and on nothing else."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ckptmgr.errors import UnsupportedStateError, UsageError
from ckptmgr.state.generators import capture_generators, find_generators, restore_generators
from ckptmgr.state.rng import AnyGenerator

__all__ = ["PerSampleSeed"]


class PerSampleSeed(Dataset[Any]):
    """A map-style data set that seeds the random number generators anew for every sample.

    While a sample is read, Python's ``random``, NumPy's global generator, torch's CPU generator and the generator
    objects that the data set holds are seeded from ``(seed, epoch, index)``. So augmentation is the same whatever the
    number of workers and whichever worker reads the sample, and a resumed run skips trained samples without reading
    them. Generators on GPUs are left alone.

    In the training process the generators are put back after each read. In a worker they stay seeded from what was read
    last, so that what a ``collate_fn`` draws there (mixup, for instance) depends only on the batch.

    A data set with ``__getitems__`` is asked for the whole batch at once, under one seed made from all its indices.

    The epoch lies in shared memory: it reaches workers that live on (``persistent_workers=True``), forked or spawned.
    Set it between two epochs, after the last batch of the one and before ``iter(loader)`` for the other; samples that
    were prefetched earlier carry the earlier epoch.

    Args:
        dataset: The data set to read from. Its indices are integers, strings, or tuples and lists of them.
        seed: Any integer; another seed gives other augmentation.

    Attributes:
        dataset: The data set inside.
        seed: The seed.

    Raises:
        UsageError: ``dataset`` is an ``IterableDataset`` or has no ``__getitem__``.

    Example:
        >>> loader = DataLoader(PerSampleSeed(images, seed=7), batch_size=32, shuffle=True, num_workers=4)
    """

    def __init__(self, dataset: Any, *, seed: int = 0) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise UsageError(
                f"PerSampleSeed cannot wrap {type(dataset).__qualname__}",
                why="it seeds by index, and this data set is not read by index",
                next="give the iterable data set state_dict() and load_state_dict(), and use a StatefulDataLoader",
            )
        self.dataset = dataset
        self.seed = operator.index(seed)
        self._epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._told_epoch = 0
        self._generators: dict[str, AnyGenerator] = {}
        self._nsearches = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next read is seeded with; 0 until :meth:`set_epoch`."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, here and in every worker that has this data set; passed on to the data set inside."""
        if epoch < 0:
            raise UsageError(f"epoch {epoch} is negative")
        self._epoch.fill_(epoch)
        self._tell_epoch()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._read([index], batched=False)[0]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        return self._read(indices, batched=callable(getattr(self.dataset, "__getitems__", None)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy made by copy.deepcopy or pickle would no longer be shared with workers.
        if not self._epoch.is_shared():  # type: ignore[no-untyped-call]
            self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def _read(self, indices: Sequence[Any], *, batched: bool) -> Any:
        in_worker = get_worker_info() is not None
        self._tell_epoch()
        self._find_generators()
        prefix = f"{self.seed}:{int(self._epoch)}:"
        if in_worker:
            samples = self._read_seeded(prefix, indices, batched=batched)
            self._seed(prefix + "collate:" + _key(list(indices)))
            return samples
        python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        own = capture_generators(self._generators)
        try:
            return self._read_seeded(prefix, indices, batched=batched)
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)
            restore_generators(self._generators, own)

    def _read_seeded(self, prefix: str, indices: Sequence[Any], *, batched: bool) -> Any:
        if batched:
            self._seed(prefix + _key(list(indices)))
            return self.dataset.__getitems__(indices)
        samples = []
        for index in indices:
            self._seed(prefix + _key(index))
            samples.append(self.dataset[index])
        return samples

    def _seed(self, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=32).digest()
        random.seed(int.from_bytes(digest[:8], "little"))
        np.random.seed(np.frombuffer(digest[8:24], dtype="<u4").astype(np.uint32))
        # torch.manual_seed would seed the GPUs as well, and those belong to the training step.
        torch.default_generator.manual_seed(int.from_bytes(digest[24:], "little"))
        for path, generator in self._generators.items():
            _seed_generator(generator, hashlib.blake2b(f"{path}:{key}".encode(), digest_size=8).digest())

    def _find_generators(self) -> None:
        # Twice, since a data set may create its generator at the first read.
        if self._nsearches < 2:
            self._nsearches += 1
            self._generators = find_generators({"dataset": self.dataset})

    def _tell_epoch(self) -> None:
        epoch = int(self._epoch)
        if epoch != self._told_epoch:
            self._told_epoch = epoch
            if callable(getattr(self.dataset, "set_epoch", None)):
                self.dataset.set_epoch(epoch)


def _seed_generator(generator: AnyGenerator, digest: bytes) -> None:
    seed = int.from_bytes(digest, "little")
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(np.frombuffer(digest, dtype="<u4").astype(np.uint32))
    else:
        generator.seed(seed)


def _key(index: Any) -> str:
    """Return a text that is the same for equal indices in every process: 3, numpy.int64(3) and tensor(3) are one."""
    if isinstance(index, str):
        return repr(index)
    if isinstance(index, list | tuple):
        return "(" + ",".join(map(_key, index)) + ")"
    try:
        return str(operator.index(index))
    except TypeError:
        raise UnsupportedStateError(
            f"PerSampleSeed cannot seed by an index of type {type(index).__qualname__}",
            why="only integers, strings, and tuples and lists of them give the same seed in every process",
            next="let the sampler give integers",
        ) from None
