"""Another batch size in mid-epoch: each sample of the epoch is trained exactly once, in the epoch's order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.data_position import DataPosition
from ckptmgr.state.per_sample_seed import PerSampleSeed
from ckptmgr.state.rng import capture_rng

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

NSAMPLES = 37

Make = Callable[[int], Any]


class Augmented(Dataset[Any]):
    """Each sample draws from the global generator of the process that reads it."""

    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(torch.rand(()))], dtype=torch.float64)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(NSAMPLES, dtype=torch.float64)


class Buckets(Sampler[list[int]]):
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.randperm(NSAMPLES).split(self.batch_size))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-NSAMPLES // self.batch_size)


class Unsized(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(NSAMPLES)


def plain() -> TensorDataset:
    return TensorDataset(torch.arange(NSAMPLES))


def workers(nworkers: int = 2, **more: Any) -> dict[str, Any]:
    return {"num_workers": nworkers, "multiprocessing_context": "fork", **more}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Make] = {
    "sequential": lambda n: DataLoader(plain(), batch_size=n),
    "shuffle": lambda n: DataLoader(plain(), batch_size=n, shuffle=True),
    "shuffle, drop_last": lambda n: DataLoader(plain(), batch_size=n, shuffle=True, drop_last=True),
    "shuffle, generator": lambda n: DataLoader(plain(), batch_size=n, shuffle=True, generator=seeded()),
    "drawn one by one": lambda n: DataLoader(
        plain(), batch_size=n, sampler=RandomSampler(range(NSAMPLES), replacement=True, generator=seeded())
    ),
    "weighted": lambda n: DataLoader(plain(), batch_size=n, sampler=WeightedRandomSampler([1.0] * NSAMPLES, 31)),
    "distributed": lambda n: DataLoader(
        Subset(TensorDataset(torch.arange(2 * NSAMPLES)), range(2 * NSAMPLES)),
        batch_size=n,
        sampler=DistributedSampler(range(2 * NSAMPLES), num_replicas=2, rank=1),  # type: ignore[arg-type]
    ),
    "batch sampler of torch": lambda n: DataLoader(
        plain(), batch_sampler=BatchSampler(RandomSampler(range(NSAMPLES)), n, False)
    ),
    "augmented": lambda n: DataLoader(Augmented(), batch_size=n, shuffle=True),
    "2 workers, plain data": lambda n: DataLoader(plain(), batch_size=n, shuffle=True, **workers()),
    "2 workers, replayed": lambda n: DataLoader(Augmented(), batch_size=n, shuffle=True, **workers()),
    "2 persistent workers": lambda n: DataLoader(
        PerSampleSeed(Augmented()), batch_size=n, shuffle=True, **workers(persistent_workers=True)
    ),
}
SLOW = ("2 workers, plain data", "2 workers, replayed", "2 persistent workers")


class Run:
    """Processes of one run, each with a batch size of its own."""

    def __init__(self, make: Make, *, epochs: int = 3) -> None:
        self.make, self.epochs = make, epochs
        self.samples: list[list[int]] = [[] for _ in range(epochs)]
        self.sizes: list[list[int]] = [[] for _ in range(epochs)]
        self.said: list[str] = []
        self.saved: Any = None
        self.lasts: list[tuple[int, bool | None]] = []

    def train(self, batch_size: int, nbatches: int | None = None, *, on_resume: Any = "auto") -> Run:
        torch.manual_seed(1 if self.saved is None else 99)
        position = DataPosition(self.make(batch_size), epochs=self.epochs, on_resume=on_resume, notify=self.said.append)
        if self.saved is not None:
            state, rng = self.saved
            position.load_state_dict(state, rng=rng)
        for done, batch in enumerate(position, start=1):
            data = batch[0] if isinstance(batch, list) else batch
            indices = (data[:, 0] if data.ndim == 2 else data).int().tolist()
            self.samples[position.epoch] += indices
            self.sizes[position.epoch].append(len(indices))
            self.lasts.append((position.epoch, position.is_last_batch))
            torch.rand(1)
            if done == nbatches:
                break
        self.saved = position.state_dict(), capture_rng()
        return self


def order_of(make: Make, epochs: int = 3) -> list[list[int]]:
    """The samples of each epoch in a run that reads one by one, which leaves none out."""
    return Run(make, epochs=epochs).train(1).samples


@pytest.mark.parametrize(("first", "second"), [(4, 8), (8, 4), (4, 7), (7, 3), (5, 32)])
@pytest.mark.parametrize("name", [name for name in LOADERS if name not in SLOW])
def test_the_epoch_goes_on_with_the_samples_that_were_not_trained(name: str, first: int, second: int) -> None:
    make = LOADERS[name]
    run = Run(make).train(first, 3).train(second)
    order = order_of(make)
    is_cut = getattr(make(first), "drop_last", False)
    left = len(order[0]) - 3 * first
    rest = left // second * second if is_cut else left
    assert run.samples[0] == order[0][: 3 * first + rest]
    full, part = divmod(left, second)
    assert run.sizes[0] == [first] * 3 + [second] * full + ([part] if part and not is_cut else [])
    assert run.said == [f"batch size {first} -> {second}: going on after {3 * first} samples of epoch 0"]
    for epoch in (1, 2):
        if name not in ("drawn one by one", "weighted"):
            assert len(set(run.samples[epoch])) == len(run.samples[epoch])
        assert len(run.sizes[epoch]) == len(make(second))
    # Each epoch has one last batch, and it is the one that is said to be.
    lasts = [i for i, (_, is_last) in enumerate(run.lasts) if is_last]
    ends = [i for i, (epoch, _) in enumerate(run.lasts) if i + 1 == len(run.lasts) or run.lasts[i + 1][0] > epoch]
    assert lasts == [end for end in ends if run.lasts[end][0] > 0 or rest]


@pytest.mark.parametrize("name", SLOW)
def test_loaders_with_workers_go_on_with_the_samples_that_were_not_trained(name: str) -> None:
    run = Run(LOADERS[name], epochs=2).train(4, 3).train(8, 1).train(5)
    assert run.samples[0] == order_of(LOADERS[name], epochs=2)[0]
    assert run.sizes[0] == [4, 4, 4, 8, 5, 5, 5, 2]
    assert sorted(run.samples[1]) == list(range(NSAMPLES))


def test_in_a_later_epoch_and_with_several_changes_every_sample_is_trained_once() -> None:
    make = LOADERS["shuffle"]
    run = Run(make).train(4, 12).train(6, 2).train(6, 1).train(4, 1).train(3, 1).train(6)
    assert run.samples[1] == Run(make).train(4).samples[1]
    assert run.sizes[1] == [4, 4, 6, 6, 6, 4, 3, 4]
    assert run.said == [
        "batch size 4 -> 6: going on after 8 samples of epoch 1",
        "batch size 6 -> 4: going on after 26 samples of epoch 1",
        "batch size 4 -> 3: going on after 30 samples of epoch 1",
        "batch size 3 -> 6: going on after 33 samples of epoch 1",
    ]


def test_changing_back_before_anything_was_trained_is_as_if_nothing_had_been_changed() -> None:
    make = LOADERS["shuffle"]
    run = Run(make).train(4, 3)
    straight = Run(make).train(4, 3)
    torch.manual_seed(7)
    position = DataPosition(make(8), epochs=3, notify=run.said.append)
    position.load_state_dict(run.saved[0], rng=run.saved[1])
    run.saved = position.state_dict(), run.saved[1]
    assert "recut" in run.saved[0]
    run.train(4)
    straight.train(4)
    assert run.samples == straight.samples
    assert run.sizes == straight.sizes


def test_without_a_change_a_position_is_written_as_before() -> None:
    state, _ = Run(LOADERS["shuffle"]).train(4, 3).saved
    assert state["version"] == 1
    assert "recut" not in state
    state, _ = Run(LOADERS["shuffle"]).train(4, 3).train(8, 1).saved
    assert state["version"] == 2
    assert json.loads(json.dumps(state["recut"])) == {"earlier": [[4, 3]], "began_at": 1}
    # The next epoch is one of a single size.
    assert Run(LOADERS["shuffle"]).train(4, 3).train(8, 5).saved[0]["version"] == 1


def test_the_trained_batches_are_read_again_in_their_own_sizes_where_they_have_to_be() -> None:
    run = Run(LOADERS["2 workers, replayed"], epochs=1).train(4, 3).train(8, 1)
    assert run.said[1].startswith("replaying 3 batches of epoch 0 because")
    run.train(5)
    assert run.said[3].startswith("replaying 4 batches of epoch 0 because")
    again = Run(LOADERS["shuffle"], epochs=1).train(4, 3).train(8, on_resume="replay")
    assert again.samples[0] == order_of(LOADERS["shuffle"], epochs=1)[0]
    assert again.said[1] == "replaying 3 batches of epoch 0 because on_resume='replay'"


REFUSED: dict[str, tuple[Make, str]] = {
    "stateful": (lambda n: StatefulDataLoader(plain(), batch_size=n), "a state of its own"),
    "stream": (lambda n: DataLoader(Stream(), batch_size=n), "Stream is an IterableDataset"),
    "batch sampler": (lambda n: DataLoader(plain(), batch_sampler=Buckets(n)), "Buckets decides by itself"),
    "no length": (lambda n: DataLoader(plain(), batch_size=n, sampler=Unsized()), "Unsized has no length"),
    "other data too": (
        lambda n: DataLoader(TensorDataset(torch.arange(NSAMPLES - n)), batch_size=n),
        "dataset_length is 33",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_rest_of_the_epoch_cannot_be_told_another_batch_size_is_refused(name: str) -> None:
    make, why = REFUSED[name]
    run = Run(make).train(4, 3)
    with pytest.raises(StateMismatchError, match="the batch size was 4 and is 8, in the middle of epoch 0") as refused:
        run.train(8)
    assert why in str(refused.value)
    assert "give batch_size=4" in str(refused.value)


def test_at_the_end_of_an_epoch_any_loader_may_have_another_batch_size() -> None:
    run = Run(LOADERS["shuffle"]).train(4, 10).train(8)
    assert run.samples[0] == order_of(LOADERS["shuffle"])[0]
    assert run.sizes[1] == [8, 8, 8, 8, 5]
    assert run.said[0].startswith("the loader has changed since epoch 0: batch_size is 4 in the checkpoint, 8")
