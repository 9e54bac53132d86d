"""Augmentation is a function of seed, epoch and index, whoever reads the sample."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ckptmgr.errors import UnsupportedStateError, UsageError
from ckptmgr.state.per_sample_seed import PerSampleSeed
from ckptmgr.state.rng import capture_rng, same_rng


class Augmented(Dataset[Any]):
    def __init__(self) -> None:
        self.own = np.random.default_rng()
        self.own_torch = torch.Generator()
        self.own_python = random.Random()
        self.legacy = np.random.RandomState()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: Any) -> torch.Tensor:
        draws = (
            random.random(),
            float(np.random.rand()),
            float(torch.rand(())),
            self.own.random(),
            float(torch.rand((), generator=self.own_torch)),
            self.own_python.random(),
            self.legacy.rand(),
        )
        return torch.tensor([int(index), self.epoch, *draws], dtype=torch.float64)


class Spawnable(Dataset[Any]):
    """Holds no torch.Generator: torch cannot send one to a spawned process everywhere."""

    def __init__(self) -> None:
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), self.own.random()], dtype=torch.float64)


class Batched(Augmented):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Keyed(Dataset[Any]):
    def __getitem__(self, index: Any) -> float:
        return random.random()


def epochs(loader: DataLoader[Any], dataset: PerSampleSeed, n: int = 2) -> list[list[float]]:
    rows = []
    for epoch in range(n):
        dataset.set_epoch(epoch)
        rows.extend(row for batch in loader for row in batch.tolist())
    return rows


def reference(inner: Any = None) -> list[list[float]]:
    dataset = PerSampleSeed(inner or Augmented(), seed=7)
    return epochs(DataLoader(dataset, batch_size=3), dataset)


def test_samples_differ_between_indices_epochs_and_seeds_and_repeat_otherwise() -> None:
    rows = reference()
    assert len({row[2] for row in rows}) == len(rows)
    assert rows == reference()
    other = PerSampleSeed(Augmented(), seed=8)
    assert other[0].tolist()[2:] != rows[0][2:]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("nworkers", [1, 2])
def test_the_number_of_workers_does_not_matter(nworkers: int, persistent: bool) -> None:
    dataset = PerSampleSeed(Augmented(), seed=7)
    loader = DataLoader(
        Subset(dataset, range(12)),
        batch_size=2,
        num_workers=nworkers,
        persistent_workers=persistent,
        multiprocessing_context="fork",
    )
    assert epochs(loader, dataset) == reference()


def test_spawned_workers_that_live_on_are_told_the_epoch() -> None:
    dataset = PerSampleSeed(Spawnable(), seed=7)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="spawn")
    assert epochs(loader, dataset) == reference(Spawnable())


def test_an_epoch_that_was_left_early_does_not_leak_into_the_next() -> None:
    dataset = PerSampleSeed(Augmented(), seed=7)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    next(iter(loader))
    dataset.set_epoch(1)
    assert [row for batch in loader for row in batch.tolist()] == reference()[12:]


def test_the_training_process_keeps_its_rng_and_the_generators_of_the_data_set() -> None:
    inner = Augmented()
    dataset = PerSampleSeed(inner)
    before, own = capture_rng(), inner.own.bit_generator.state
    dataset[3]
    dataset.__getitems__([1, 2])
    assert same_rng(before, capture_rng())
    assert inner.own.bit_generator.state == own


def test_the_rng_is_put_back_when_reading_fails() -> None:
    class Failing(Keyed):
        def __getitem__(self, index: Any) -> float:
            random.random()
            raise OSError("disk")

    before = capture_rng()
    with pytest.raises(OSError, match="disk"):
        PerSampleSeed(Failing())[0]
    assert same_rng(before, capture_rng())


def test_a_data_set_that_reads_batches_is_asked_once_and_is_exact_for_the_batch() -> None:
    first = PerSampleSeed(Batched(), seed=1).__getitems__([3, 1])
    again = PerSampleSeed(Batched(), seed=1).__getitems__([3, 1])
    assert [row.tolist() for row in first] == [row.tolist() for row in again]
    assert [row[0].item() for row in first] == [3, 1]


def test_equal_indices_of_different_types_give_the_same_sample() -> None:
    dataset = PerSampleSeed(Keyed(), seed=1)
    assert dataset[3] == dataset[np.int64(3)] == dataset[torch.tensor(3)]
    assert dataset["3"] != dataset[3]
    assert dataset[(1, "a")] == dataset[[1, "a"]]
    assert dataset[12, 3] != dataset[1, 23]
    with pytest.raises(UnsupportedStateError, match="float"):
        dataset[0.5]


def test_copies_read_the_same_and_still_reach_their_workers() -> None:
    dataset = PerSampleSeed(Augmented(), seed=7)
    for twin in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        loader = DataLoader(twin, batch_size=3, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
        assert epochs(loader, twin) == reference()
    assert dataset.epoch == 0


def test_what_cannot_be_seeded_by_index_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(UsageError, match="Stream"):
        PerSampleSeed(Stream())
    with pytest.raises(UsageError, match="negative"):
        PerSampleSeed(Keyed()).set_epoch(-1)
