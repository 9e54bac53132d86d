"""A loader that starts in mid-epoch reads nothing, and shuffles as if it had started at the beginning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

from ckptmgr.errors import StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.state.loader_skip import skipping_loader, why_not_skippable
from ckptmgr.state.rng import capture_rng, restore_rng, same_rng


class Recorder(Dataset[Any]):
    def __init__(self, n: int = 20) -> None:
        self.n = n
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class DrawingSampler(Sampler[int]):
    """Draws from the global generator for every sample, as no sampler of torch does."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(20):
            yield int(torch.randint(20, ()))

    def __len__(self) -> int:
        return 20


def make(nworkers: int = 0, **more: Any) -> DataLoader[Any]:
    if nworkers:
        more["multiprocessing_context"] = "fork"
    return DataLoader(TensorDataset(torch.arange(20)), batch_size=4, shuffle=True, num_workers=nworkers, **more)


def values(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


@pytest.mark.parametrize("nworkers", [0, 2])
@pytest.mark.parametrize("skipped", [0, 1, 3, 5])
def test_the_rest_of_the_epoch_and_the_rng_are_those_of_the_whole_epoch(nworkers: int, skipped: int) -> None:
    torch.manual_seed(1)
    start = capture_rng()
    iterator = iter(make(nworkers))
    for _ in range(skipped):
        next(iterator)
        torch.rand(3)
    stopped = capture_rng()
    expected, end = values(iterator), capture_rng()

    restore_rng(start)
    loader = skipping_loader(make(nworkers), skipped)
    iterator = iter(loader)
    loader.prime()
    restore_rng(stopped)
    assert len(loader) == len(expected)
    assert values(iterator) == expected
    assert same_rng(capture_rng(), end)


def test_nothing_is_read_that_is_skipped() -> None:
    dataset = Recorder()
    loader = skipping_loader(DataLoader(dataset, batch_size=4), 3)
    iterator = iter(loader)
    loader.prime()
    assert dataset.read == []
    assert [batch.tolist() for batch in iterator] == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert dataset.read == list(range(12, 20))


def test_without_prime_the_skip_runs_at_the_first_batch() -> None:
    torch.manual_seed(2)
    expected = values(make())[2:]
    torch.manual_seed(2)
    assert values(skipping_loader(make(), 2)) == expected


def test_the_original_loader_is_left_as_it_was() -> None:
    loader = make()
    before = dict(vars(loader))
    values(skipping_loader(loader, 2))
    assert vars(loader) == before


def test_persistent_workers_belong_to_the_original_which_goes_on_with_its_own_sampler() -> None:
    loader = make(2, persistent_workers=True)
    assert len(values(skipping_loader(loader, 3))) == 2
    started: Any = loader._iterator
    assert started is not None
    assert len(values(loader)) == 5
    assert len(values(skipping_loader(loader, 4))) == 1
    assert sorted(index for batch in values(loader) for index in batch) == list(range(20))
    assert loader._iterator is started


def test_a_sampler_instead_of_a_batch_sampler_is_skipped_by_sample() -> None:
    torch.manual_seed(3)
    expected = [int(x[0]) for x in DataLoader(TensorDataset(torch.arange(9)), batch_size=None, shuffle=True)][4:]
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_size=None, shuffle=True)
    assert [int(x[0]) for x in skipping_loader(loader, 4)] == expected


def test_a_plain_list_of_batches_is_a_batch_sampler_too() -> None:
    loader = DataLoader(Recorder(), batch_sampler=[[1, 2], [3], [4, 5, 6]])
    assert [batch.tolist() for batch in skipping_loader(loader, 1)] == [[3], [4, 5, 6]]


def test_draws_for_each_batch_are_noticed() -> None:
    loader = skipping_loader(DataLoader(Recorder(), batch_size=4, sampler=DrawingSampler()), 2)
    iter(loader)
    loader.prime()
    assert loader.draws_per_batch is True
    quiet = skipping_loader(make(), 2)
    assert quiet.draws_per_batch is None
    iter(quiet)
    quiet.prime()
    assert quiet.draws_per_batch is False


def test_a_sampler_that_ends_too_early_is_named() -> None:
    loader = skipping_loader(make(), 6)
    iter(loader)
    with pytest.raises(StateMismatchError, match="the sampler ended after 5 batches"):
        loader.prime()


def test_what_cannot_skip_is_refused_with_the_reason() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return super().__iter__()

    assert "IterableDataset" in (why_not_skippable(DataLoader(Stream())) or "")
    assert "overrides DataLoader.__iter__" in (why_not_skippable(Own(Recorder())) or "")
    assert "not a torch DataLoader" in (why_not_skippable([1, 2]) or "")
    with pytest.raises(UnsupportedStateError, match="without reading"):
        skipping_loader(Own(Recorder()), 1)
    with pytest.raises(UsageError):
        skipping_loader(make(), -1)
    with pytest.raises(UsageError, match=r"prime\(\) before iter\(\)"):
        skipping_loader(make(), 1).prime()


def test_the_private_names_of_torch_that_we_rely_on_exist() -> None:
    loader = make(1, persistent_workers=True)
    iterator: Any = iter(loader)
    assert loader._iterator is iterator
    assert iterator._index_sampler is loader.batch_sampler
    assert callable(iterator._reset)
    assert isinstance(BatchSampler(RandomSampler(range(3)), 2, False).sampler, RandomSampler)
