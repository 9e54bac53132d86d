"""A resumed iteration gives what the uninterrupted one would have given: batches, augmentation and RNG."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr.state.data_position import DataPosition
from ckptmgr.state.per_sample_seed import PerSampleSeed
from ckptmgr.state.rng import capture_rng, same_rng

# torchdata 0.11 calls this on every construction; torch 2.13 deprecates it.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

NSAMPLES = 19
BATCH = 4
NBATCHES = 5
EPOCHS = 3
# In batches since the start: nothing yet, the first, the middle, the last but one and the last of an epoch, later ones.
STOPS = (0, 1, 3, 4, 5, 6, 8, 10, 14, 15)


class Augmented(Dataset[Any]):
    """Draws from all three global generators for every sample."""

    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = (random.random(), float(np.random.rand()), float(torch.rand(())))
        return torch.tensor([float(index), *draws], dtype=torch.float64)


class OwnGenerators(Dataset[Any]):
    """Draws from generators of its own, which go on from epoch to epoch."""

    def __init__(self) -> None:
        self.array_rng = np.random.default_rng(3)
        self.transform = functools.partial(self.jitter, rng=random.Random(4))

    @staticmethod
    def jitter(value: float, *, rng: random.Random) -> float:
        return value + rng.random()

    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, self.transform(0.0), self.array_rng.random()], dtype=torch.float64)


class Counting(Dataset[Any]):
    """Keeps a number that depends on how much was read in this epoch."""

    def __init__(self) -> None:
        self.nread = 0

    def set_epoch(self, epoch: int) -> None:
        self.nread = 1000 * epoch

    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        self.nread += 1
        return torch.tensor([index, self.nread], dtype=torch.float64)


class Stream(IterableDataset[Any]):
    """Shuffled at the start of each epoch, sharded over workers, augmented; of unknown length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        start, every = (info.id, info.num_workers) if info else (0, 1)
        for index in torch.randperm(NSAMPLES).tolist()[start::every]:
            yield torch.tensor([float(index), float(torch.rand(()))], dtype=torch.float64)


class SizedStream(Stream):
    def __len__(self) -> int:
        return NSAMPLES


class StatefulStream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.done = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        start, every = (info.id, info.num_workers) if info else (0, 1)
        mine = range(start, NSAMPLES, every)
        while self.done < len(mine):
            self.done += 1
            yield torch.tensor(mine[self.done - 1], dtype=torch.float64)
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Buckets(Sampler[list[int]]):
    """A batch sampler of one's own: shuffles eagerly in iter(), batches of different sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(NSAMPLES))
        random.shuffle(order)
        sizes = np.random.permutation([3, 5, 4, 2, 5])
        ends = np.cumsum(sizes)
        return iter([order[end - size : end] for size, end in zip(sizes, ends, strict=True)])

    def __len__(self) -> int:
        return NBATCHES


class CyclingLoader(DataLoader[Any]):
    """A subclass with an iteration of its own."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch + 0.0


def mixup(samples: list[torch.Tensor]) -> torch.Tensor:
    batch = torch.stack(samples)
    return batch + torch.rand(()) * batch[torch.randperm(len(batch))]


def stack(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples)


def first(samples: list[Any]) -> torch.Tensor:
    return torch.stack([sample[0] for sample in samples])


def synthetic_batches() -> Iterator[torch.Tensor]:
    for _ in range(NBATCHES):
        yield torch.randn(2)


def plain() -> TensorDataset:
    return TensorDataset(torch.arange(NSAMPLES))


def workers(nworkers: int, **more: Any) -> dict[str, Any]:
    return {"num_workers": nworkers, "multiprocessing_context": "fork" if nworkers else None, **more}


def seeded_generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def shared_generator(**more: Any) -> DataLoader[Any]:
    dataset = Augmented()
    generator = seeded_generator()
    sampler = RandomSampler(dataset, replacement=True, num_samples=NSAMPLES, generator=generator)
    return DataLoader(dataset, batch_size=BATCH, sampler=sampler, generator=generator, **more)


Factory = Callable[[], Any]

# Exact without a word to the user.
SILENT: dict[str, Factory] = {
    "sequential": lambda: DataLoader(Augmented(), batch_size=BATCH),
    "shuffle": lambda: DataLoader(Augmented(), batch_size=BATCH, shuffle=True),
    "shuffle drop_last": lambda: DataLoader(Augmented(), batch_size=BATCH, shuffle=True, drop_last=True),
    "no batching": lambda: DataLoader(Subset(Augmented(), range(NBATCHES)), batch_size=None, shuffle=True),
    "batches as samples": lambda: DataLoader(
        torch.arange(NSAMPLES),  # type: ignore[arg-type]
        batch_size=None,
        sampler=BatchSampler(RandomSampler(range(NSAMPLES)), BATCH, False),
    ),
    "shared generator": shared_generator,
    "shuffle generator": lambda: DataLoader(Augmented(), batch_size=BATCH, shuffle=True, generator=seeded_generator()),
    "even batches with a generator": lambda: DataLoader(
        Subset(Augmented(), range(16)), batch_size=BATCH, shuffle=True, generator=seeded_generator()
    ),
    "weighted": lambda: DataLoader(
        Augmented(), batch_size=BATCH, sampler=WeightedRandomSampler([1.0] * NSAMPLES, NSAMPLES)
    ),
    "subset": lambda: DataLoader(Augmented(), batch_size=BATCH, sampler=SubsetRandomSampler(range(NSAMPLES))),
    "distributed": lambda: DataLoader(
        ConcatDataset([Augmented(), Augmented()]),
        batch_size=BATCH,
        sampler=DistributedSampler(range(2 * NSAMPLES), num_replicas=2, rank=1),  # type: ignore[arg-type]
    ),
    "batch sampler": lambda: DataLoader(Augmented(), batch_sampler=Buckets()),
    "own generators": lambda: DataLoader(OwnGenerators(), batch_size=BATCH, shuffle=True),
    "per-sample seed": lambda: DataLoader(PerSampleSeed(Augmented(), seed=1), batch_size=BATCH, shuffle=True),
    "2 workers, per-sample seed": lambda: DataLoader(
        PerSampleSeed(Augmented(), seed=1), batch_size=BATCH, shuffle=True, **workers(2)
    ),
    "2 workers, per-sample seed, mixup": lambda: DataLoader(
        Subset(PerSampleSeed(OwnGenerators(), seed=1), range(NSAMPLES)),
        batch_size=BATCH,
        shuffle=True,
        collate_fn=mixup,
        **workers(2),
    ),
    "2 workers, plain data": lambda: DataLoader(plain(), batch_size=BATCH, shuffle=True, **workers(2)),
    "2 persistent workers, per-sample seed": lambda: DataLoader(
        PerSampleSeed(Augmented(), seed=1), batch_size=BATCH, shuffle=True, **workers(2, persistent_workers=True)
    ),
    "2 persistent workers, plain data, generator": lambda: DataLoader(
        plain(),
        batch_size=BATCH,
        shuffle=True,
        generator=seeded_generator(),
        **workers(2, persistent_workers=True),
    ),
    "stateful, shuffle": lambda: StatefulDataLoader(Augmented(), batch_size=BATCH, shuffle=True),
    "stateful, sequential": lambda: StatefulDataLoader(Augmented(), batch_size=BATCH),
    "stateful, generator": lambda: StatefulDataLoader(
        Augmented(), batch_size=BATCH, shuffle=True, generator=seeded_generator()
    ),
    "stateful, stream": lambda: StatefulDataLoader(StatefulStream(), batch_size=BATCH),
    "stateful, 2 workers, plain data": lambda: StatefulDataLoader(
        plain(), batch_size=BATCH, shuffle=True, **workers(2)
    ),
    "stateful, 2 persistent workers, plain data": lambda: StatefulDataLoader(
        plain(), batch_size=BATCH, shuffle=True, **workers(2, persistent_workers=True)
    ),
    "stateful, 2 workers, per-sample seed": lambda: StatefulDataLoader(
        PerSampleSeed(Augmented()), batch_size=BATCH, shuffle=True, **workers(2)
    ),
}

# Exact, at the cost of reading again, which is said.
REPLAYED: dict[str, Factory] = {
    "counting": lambda: DataLoader(Counting(), batch_size=BATCH, shuffle=True),
    "2 workers": lambda: DataLoader(Augmented(), batch_size=BATCH, shuffle=True, **workers(2)),
    "2 workers, shared generator": lambda: shared_generator(**workers(2)),
    "2 workers, own generators": lambda: DataLoader(OwnGenerators(), batch_size=BATCH, shuffle=True, **workers(2)),
    "2 workers, plain data, mixup": lambda: DataLoader(
        torch.arange(NSAMPLES),
        batch_size=BATCH,
        shuffle=True,
        collate_fn=mixup,
        **workers(2),  # type: ignore[arg-type]
    ),
    "2 workers, batch sampler": lambda: DataLoader(Augmented(), batch_sampler=Buckets(), **workers(2)),
    "subclass": lambda: CyclingLoader(plain(), batch_size=BATCH, shuffle=True, collate_fn=first),
    "sized stream, 1 worker": lambda: DataLoader(SizedStream(), batch_size=BATCH, **workers(1)),
    "stateful, 2 workers": lambda: StatefulDataLoader(Augmented(), batch_size=BATCH, shuffle=True, **workers(2)),
    "list": lambda: [torch.arange(3) + i for i in range(NBATCHES)],
}


def train_step(batch: Any) -> None:
    torch.rand(3)
    random.random()
    np.random.rand()


def fingerprint(batch: Any) -> list[Any]:
    return [torch.as_tensor(part).tolist() for part in (batch if isinstance(batch, list | tuple) else [batch])]


def finish(position: DataPosition) -> tuple[list[Any], dict[str, Any]]:
    seen = []
    for batch in position:
        seen.append((position.epoch, position.batch, position.is_last_batch, fingerprint(batch)))
        train_step(batch)
    return seen, capture_rng()


def scramble(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def start(make: Factory, *, messages: list[str] | None = None, **more: Any) -> DataPosition:
    return DataPosition(make(), epochs=EPOCHS, notify=(messages if messages is not None else []).append, **more)


def record(make: Factory) -> tuple[list[Any], dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Run without interruption, taking the position at every batch."""
    scramble(0)
    position = start(make)
    saves = [(position.state_dict(), capture_rng())]
    seen = []
    for batch in position:
        seen.append((position.epoch, position.batch, position.is_last_batch, fingerprint(batch)))
        train_step(batch)
        saves.append((position.state_dict(), capture_rng()))
    return seen, capture_rng(), saves


def resume(
    make: Factory, save: tuple[dict[str, Any], dict[str, Any]], messages: list[str], **more: Any
) -> DataPosition:
    scramble(99)
    position = start(make, messages=messages, **more)
    position.load_state_dict(save[0], rng=save[1])
    torch.rand(7)
    return position


def check_every_stop(make: Factory, *, stops: tuple[int, ...] = STOPS) -> dict[int, list[str]]:
    """Compare the rest of the run after each stop; return what the user was told there."""
    seen, rng, saves = record(make)
    said: dict[int, list[str]] = {}
    for stop in sorted({min(stop, len(seen)) for stop in stops}):
        said[stop] = []
        rest, end = finish(resume(make, saves[stop], said[stop]))
        assert rest == seen[stop:], f"other batches after {stop}"
        assert same_rng(end, rng), f"other RNG after {stop}"
    return said


@pytest.mark.parametrize("name", SILENT)
def test_every_stop_resumes_exactly_and_silently(name: str) -> None:
    said = check_every_stop(SILENT[name])
    assert not any(said.values()), said


@pytest.mark.parametrize("name", REPLAYED)
def test_every_stop_resumes_exactly_and_says_the_cost(name: str) -> None:
    said = check_every_stop(REPLAYED[name], stops=(0, 1, 3, 5, 8, 10))
    assert said[0] == []
    assert said[5] == [] or name == "counting"
    assert [line.split(" because ")[0] for line in said[8]] == ["replaying 3 batches of epoch 1"], said[8]


@pytest.mark.parametrize("nworkers", [0, 2])
def test_a_stream_of_unknown_length_is_read_again_at_every_stop(nworkers: int) -> None:
    said = check_every_stop(
        lambda: DataLoader(Stream(), batch_size=BATCH, **workers(nworkers)), stops=(0, 1, 5, 6, 7, 15)
    )
    assert said[0] == []
    assert said[5][0] == (
        "replaying 5 batches of epoch 0 because Stream is an IterableDataset; "
        "a StatefulDataLoader can go on without reading"
    )
    if nworkers == 0:
        assert said[5][1].startswith("perhaps not exact: reading draws from a global random number generator")
    else:
        assert len(said[5]) == 1


def test_a_generator_function_is_called_again_and_its_draws_are_mentioned() -> None:
    said = check_every_stop(lambda: synthetic_batches, stops=(0, 1, 3, 5, 7))
    assert len(said[1]) == 1
    assert said[3][0].startswith("replaying 3 batches of epoch 0")
    assert said[3][1].startswith("perhaps not exact: reading draws")


def test_a_stateful_stream_loader_resumes_from_its_own_state() -> None:
    said = check_every_stop(lambda: StatefulDataLoader(StatefulStream(), batch_size=BATCH))
    assert not any(said.values()), said


def test_a_stateful_stream_loader_with_workers_resumes_and_says_that_their_rng_is_lost() -> None:
    said = check_every_stop(lambda: StatefulDataLoader(StatefulStream(), batch_size=BATCH, **workers(2)))
    assert said[3][0].startswith("not exact: a loader's state does not hold the RNG of its workers")
    # One worker has finished its share, the other has not: loaded, the first would begin again.
    assert said[5][0].startswith("replaying 5 batches of epoch 0 because torchdata would let a worker")


@pytest.mark.parametrize("nworkers", [0, 1])
def test_a_stateful_loader_over_a_stateless_stream_is_read_again(nworkers: int) -> None:
    make = functools.partial(StatefulDataLoader, SizedStream(), batch_size=BATCH, **workers(nworkers))
    said = check_every_stop(make, stops=(0, 3, 5, 8))
    assert said[5] == []
    assert said[8][0] == "replaying 3 batches of epoch 1 because SizedStream has no state_dict() of its own"
