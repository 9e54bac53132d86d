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

from ckptmgr.errors import StateMismatchError, UsageError
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
# Starting workers takes time.
FEW_STOPS = (0, 1, 4, 5, 8, 10)


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
    said = check_every_stop(SILENT[name], stops=FEW_STOPS if "workers" in name else STOPS)
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


def test_an_uninterrupted_iteration_is_the_plain_loop() -> None:
    scramble(0)
    loader = DataLoader(Augmented(), batch_size=BATCH, shuffle=True)
    expected = []
    for _ in range(EPOCHS):
        for batch in loader:
            expected.append(fingerprint(batch))
            train_step(batch)
    end = capture_rng()
    scramble(0)
    seen, rng = finish(start(SILENT["shuffle"]))
    assert [entry[3] for entry in seen] == expected
    assert same_rng(rng, end)


def test_taking_positions_changes_nothing() -> None:
    for make in (SILENT["shuffle"], SILENT["stateful, shuffle"], SILENT["shared generator"]):
        scramble(0)
        alone, rng = finish(start(make))
        seen, end, _ = record(make)
        assert alone == seen
        assert same_rng(rng, end)


def test_epoch_batch_and_last_batch_tell_where_the_position_is() -> None:
    seen, _ = finish(start(SILENT["shuffle"]))
    assert [entry[:3] for entry in seen[3:7]] == [(0, 4, False), (0, 5, True), (1, 1, False), (1, 2, False)]


def test_persistent_workers_of_an_augmenting_data_set_are_exact_in_their_first_epoch_only() -> None:
    make = functools.partial(
        DataLoader, Augmented(), batch_size=BATCH, shuffle=True, **workers(2, persistent_workers=True)
    )
    seen, rng, saves = record(make)
    said: list[str] = []
    rest, end = finish(resume(make, saves[3], said))
    assert rest == seen[3:]
    assert same_rng(end, rng)
    assert len(said) == 1
    assert said[0].startswith("replaying 3 batches of epoch 0 because Augmented may draw")

    said.clear()
    rest, end = finish(resume(make, saves[8], said))
    assert said[0].startswith("not exact: the workers had lived through earlier epochs, and Augmented may draw")
    # The samples and the RNG of the training process are right; only the augmentation is not.
    assert indices(rest) == indices(seen[8:])
    assert same_rng(end, rng)


def indices(seen: list[Any]) -> list[Any]:
    return [[row[0] for row in entry[3][0]] for entry in seen]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
def test_a_changed_number_of_workers_is_exact_where_no_sample_depends_on_them(before: int, after: int) -> None:
    def make(nworkers: int) -> Factory:
        return lambda: DataLoader(PerSampleSeed(Augmented()), batch_size=BATCH, shuffle=True, **workers(nworkers))

    seen, _, saves = record(make(before))
    said: list[str] = []
    rest, _ = finish(resume(make(after), saves[8], said))
    assert rest == seen[8:]
    assert said == []


def test_a_changed_number_of_workers_is_said_where_samples_may_depend_on_them() -> None:
    seen, _, saves = record(SILENT["shuffle"])
    said: list[str] = []
    rest, _ = finish(resume(REPLAYED["2 workers"], saves[8], said))
    assert said[0].startswith("not exact: num_workers was 0 and is 2, and Augmented may draw random numbers")
    assert indices(rest)[:2] == indices(seen[8:])[:2]


def test_skip_on_request_does_not_read_again_and_says_what_is_lost() -> None:
    seen, rng, saves = record(REPLAYED["2 workers"])
    said: list[str] = []
    rest, end = finish(resume(REPLAYED["2 workers"], saves[8], said, on_resume="skip"))
    assert said[0].startswith("not exact: on_resume='skip', and Augmented may draw")
    assert indices(rest) == indices(seen[8:])
    assert rest[2:] == seen[10:]
    assert same_rng(end, rng)


def test_replay_on_request_reads_again() -> None:
    seen, rng, saves = record(SILENT["shuffle"])
    said: list[str] = []
    rest, end = finish(resume(SILENT["shuffle"], saves[8], said, on_resume="replay"))
    assert said[0] == "replaying 3 batches of epoch 1 because on_resume='replay'"
    assert rest == seen[8:]
    assert same_rng(end, rng)


def changed_loaders() -> dict[str, Factory]:
    return {
        "dataset_length is 19 in the checkpoint, 18": lambda: DataLoader(
            Subset(Augmented(), range(18)), batch_size=BATCH, shuffle=True
        ),
        "drop_last is False in the checkpoint, True": lambda: DataLoader(
            Augmented(), batch_size=BATCH, shuffle=True, drop_last=True
        ),
        "SequentialSampler": lambda: DataLoader(Augmented(), batch_size=BATCH),
        "kind is map in the checkpoint, read": lambda: [1, 2, 3],
        "sample_seed is None in the checkpoint, 3": lambda: DataLoader(
            PerSampleSeed(Augmented(), seed=3), batch_size=BATCH, shuffle=True
        ),
    }


@pytest.mark.parametrize("what", changed_loaders())
def test_another_loader_is_refused_in_mid_epoch_and_named_at_its_end(what: str) -> None:
    make = changed_loaders()[what]
    _, _, saves = record(SILENT["shuffle"])
    with pytest.raises(StateMismatchError, match=what):
        resume(make, saves[8], [])
    said: list[str] = []
    position = resume(make, saves[10], said)
    next(position)
    assert what in said[0]
    assert (position.epoch, position.batch) == (2, 1)


def test_a_longer_training_goes_on_from_a_finished_one() -> None:
    for make in (SILENT["shuffle"], SILENT["stateful, stream"], SILENT["2 persistent workers, plain data, generator"]):
        scramble(0)
        longer = DataPosition(make(), epochs=EPOCHS + 1, notify=print)
        expected, end = finish(longer)
        scramble(0)
        position = start(make)
        finish(position)
        save = (position.state_dict(), capture_rng())
        finished = resume(make, save, [])
        assert finish(finished)[0] == []
        again = (finished.state_dict(), capture_rng())
        for one in (save, again):
            scramble(99)
            position = DataPosition(make(), epochs=EPOCHS + 1, notify=print)
            position.load_state_dict(one[0], rng=one[1])
            rest, rng = finish(position)
            assert rest == expected[-len(rest) :]
            assert rest[0][:2] == (EPOCHS, 1)
            assert same_rng(rng, end)


def test_the_end_of_an_epoch_can_be_saved_where_nobody_knows_it_beforehand() -> None:
    saves: list[Any] = []
    scramble(0)
    position = DataPosition(
        DataLoader(Stream(), batch_size=BATCH),
        epochs=EPOCHS,
        notify=print,
        on_epoch_end=lambda epoch: saves.append((epoch, position.state_dict(), capture_rng())),
    )
    seen, rng = finish(position)
    assert [epoch for epoch, *_ in saves] == [0, 1, 2]
    said: list[str] = []
    rest, end = finish(resume(lambda: DataLoader(Stream(), batch_size=BATCH), saves[0][1:], said))
    assert rest == seen[5:]
    assert same_rng(end, rng)
    assert said == []


def test_an_epoch_end_that_was_not_announced_yet_is_announced_after_the_resume() -> None:
    for make in (SILENT["shuffle"], REPLAYED["list"]):
        _, _, saves = record(make)
        ended: list[int] = []
        rest = resume(make, saves[5], [], on_epoch_end=ended.append)
        finish(rest)
        assert ended == [0, 1, 2]


def test_a_position_that_was_not_carried_out_yet_can_be_saved_again() -> None:
    _, _, saves = record(SILENT["shuffle"])
    position = resume(SILENT["shuffle"], saves[8], [])
    assert position.state_dict() == saves[8][0]
    assert (position.epoch, position.batch) == (1, 3)


def test_without_rng_the_random_numbers_of_the_moment_are_kept() -> None:
    seen, _, saves = record(SILENT["shuffle"])
    position = start(SILENT["shuffle"])
    position.load_state_dict(saves[8][0])
    before = capture_rng()
    batch = next(position)
    assert batch[:, 0].tolist() == indices(seen)[8]
    assert not same_rng(before, capture_rng())


def test_a_state_holds_nothing_but_bytes_and_json_values() -> None:
    def check(tree: Any) -> None:
        if isinstance(tree, dict):
            assert all(isinstance(key, str) for key in tree)
            for value in tree.values():
                check(value)
        elif isinstance(tree, list):
            for value in tree:
                check(value)
        elif isinstance(tree, torch.Tensor):
            assert tree.dtype == torch.uint8
        else:
            assert tree is None or isinstance(tree, bool | int | float | str)

    for name in ("shared generator", "own generators", "2 persistent workers, plain data, generator"):
        _, _, saves = record(SILENT[name])
        for state, rng in saves:
            check(state)
            check(rng)


class CountsEpochs(Sampler[int]):
    """Shuffles by a number that nobody restores."""

    def __init__(self) -> None:
        self.nepochs = 0

    def __iter__(self) -> Iterator[int]:
        self.nepochs += 1
        return iter(torch.randperm(NSAMPLES, generator=torch.Generator().manual_seed(self.nepochs)).tolist())

    def __len__(self) -> int:
        return NSAMPLES


def test_a_number_that_nobody_restores_is_named() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=BATCH, sampler=CountsEpochs())

    _, _, saves = record(make)
    said: list[str] = []
    next(resume(make, saves[8], said))
    assert len(said) == 1
    assert said[0].startswith("perhaps not exact: sampler.sampler.nepochs was 2 in the run that saved and is 1 now")


def test_a_sampler_that_draws_for_each_batch_is_named() -> None:
    class Drawing(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return (int(torch.randint(NSAMPLES, ())) for _ in range(NSAMPLES))

        def __len__(self) -> int:
            return NSAMPLES

    said = check_every_stop(lambda: DataLoader(Augmented(), batch_size=BATCH, sampler=Drawing()), stops=(3, 8))
    assert all(line.startswith("perhaps not exact: the sampler draws") for lines in said.values() for line in lines)
    assert all(said.values())


def test_what_is_not_exact_from_the_start_is_said_at_the_start() -> None:
    said: list[str] = []
    DataPosition(DataLoader(StatefulStream(), batch_size=BATCH), notify=said.append)
    assert "StatefulStream has a state of its own" in said[0]
    DataPosition(DataLoader(plain(), **workers(2, in_order=False)), notify=said.append)
    assert "in_order=False" in said[1]


def test_a_data_set_that_ends_early_leaves_the_rng_as_it_was() -> None:
    _, _, saves = record(REPLAYED["list"])
    batches = REPLAYED["list"]()
    position = DataPosition(batches, epochs=EPOCHS, notify=print)
    position.load_state_dict(saves[8][0], rng=saves[8][1])
    del batches[2:]
    before = capture_rng()
    with pytest.raises(StateMismatchError, match="the loader ended after 2 batches, 3 of epoch 1"):
        next(position)
    assert same_rng(before, capture_rng())


def test_a_position_of_another_version_is_refused() -> None:
    with pytest.raises(StateMismatchError, match="version 99"):
        start(SILENT["shuffle"]).load_state_dict({"version": 99})


def test_a_running_iteration_cannot_be_moved() -> None:
    position = start(SILENT["shuffle"])
    next(position)
    with pytest.raises(UsageError, match="before the first batch"):
        position.load_state_dict(position.state_dict())


@pytest.mark.parametrize(
    ("loader", "arguments", "match"),
    [
        (iter([1, 2]), {}, "list_iterator can be iterated only once"),
        (3, {}, "int cannot be iterated"),
        ([1, 2], {"on_resume": "skip"}, "on_resume='skip' is impossible with list"),
        ([1, 2], {"on_resume": "never"}, "on_resume='never'"),
        ([1, 2], {"epochs": -1}, "epochs=-1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(loader: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        DataPosition(loader, notify=print, **arguments)


def test_an_empty_loader_ends_or_is_refused_when_it_never_would() -> None:
    assert list(DataPosition([], epochs=2, notify=print)) == []
    with pytest.raises(UsageError, match="gave no batch"):
        next(DataPosition([], notify=print))


@pytest.mark.parametrize("epochs", ["3", 2.5, True, -1], ids=repr)
def test_a_number_of_epochs_that_cannot_be_meant_is_refused(epochs: Any) -> None:
    with pytest.raises(UsageError, match="epochs="):
        DataPosition([1, 2], epochs=epochs, notify=print)


def test_an_epoch_without_a_batch_is_told() -> None:
    notes: list[str] = []
    assert list(DataPosition([], epochs=2, notify=notes.append)) == []
    assert len(notes) == 2
    assert "no batch in epoch 1" in notes[1]
