"""An epoch that is interrupted goes on with the samples that are left, on any number of ranks and in any batches."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from elastic_samples import Epoch, flat, order
from lightning_samples import Broken, Model, Numbered, assert_resumes_exactly, make_trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import Checkpointer, CheckpointManager, ElasticSampler, PerSampleSeed, StateMismatchError, UsageError
from ckptmgr.state.data_position import DataPosition
from ckptmgr.state.epoch_order import EpochOrder
from ckptmgr.state.rng import capture_rng, same_rng

# torchdata 0.11 calls this on every construction; torch 2.13 deprecates it.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

NSAMPLES = 46


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (0, 0, [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]),
        (0, 1, [5, 3, 7, 8, 11, 2, 4, 1, 10, 0, 6, 9]),
        (7, 0, [8, 4, 1, 6, 3, 2, 11, 7, 5, 9, 10, 0]),
        (2**64 - 1, 2**40, [4, 8, 9, 1, 11, 6, 10, 5, 2, 7, 0, 3]),
    ],
)
def test_the_order_of_an_epoch_never_changes(seed: int, epoch: int, expected: list[int]) -> None:
    # Whoever changes these lists makes runs that are interrupted now train other samples when they go on.
    assert order(12, epoch, seed=seed) == expected
    assert order(12, epoch, seed=seed, shuffle=False) == list(range(12))


def test_nor_does_that_of_a_long_one() -> None:
    long = EpochOrder(100_000, shuffle=True, seed=3)
    long.set_epoch(5)
    digest = hashlib.sha256(long.indices().astype("<i8").tobytes()).hexdigest()
    assert digest == "a020fa55e52c22a997542053112998ec6f479bbdeebc7757669b3836bd8c10dd"
    assert list(long) == long.indices().tolist()
    assert len(long) == 100_000


def test_no_random_number_of_anybody_else_is_drawn() -> None:
    before = capture_rng()
    list(ElasticSampler(100, global_batch_size=7))
    assert same_rng(before, capture_rng())


@pytest.mark.parametrize(
    ("length", "drop_last", "sizes"),
    [
        (32, False, [[4, 4, 4, 4], [4, 4, 4, 4]]),
        (22, False, [[4, 4, 4, 4], [2, 2, 1, 1]]),
        (20, False, [[4, 4, 4, 4], [1, 1, 1, 1]]),
        # Fewer than ranks: they join the last full batch.
        (19, False, [[5, 5, 5, 4]]),
        (35, False, [[4, 4, 4, 4], [5, 5, 5, 4]]),
        (31, True, [[4, 4, 4, 4]]),
        (3, True, []),
        (0, False, []),
    ],
)
def test_the_end_of_an_epoch_is_shared_so_that_every_rank_has_a_batch(
    length: int, drop_last: bool, sizes: list[list[int]]
) -> None:
    run = Epoch(length, options={"drop_last": drop_last}).train(4, 4)
    assert [[len(mine) for mine in ranks] for ranks in run.batches] == sizes
    assert len(set(run.samples)) == len(run.samples) == sum(flat(sizes))
    assert len(ElasticSampler(length, global_batch_size=16, rank=0, world_size=4, drop_last=drop_last)) == len(sizes)


def test_only_an_end_with_fewer_samples_than_ranks_is_padded_and_that_is_logged(caplog: Any) -> None:
    run = Epoch(11, options={"shuffle": False}).train(1, 3, 3)
    assert caplog.messages == []
    run.train(4, 2)
    assert run.batches[-1] == [[9], [10], [9], [10]]
    assert caplog.messages == [
        "2 samples are left of epoch 0 for 4 ranks: rank 2 trains one of them again",
        "2 samples are left of epoch 0 for 4 ranks: rank 3 trains one of them again",
    ]


def test_a_position_is_what_was_trained_and_not_what_was_fetched() -> None:
    sampler = ElasticSampler(20, global_batch_size=4)
    batches = iter(sampler)
    for _ in range(4):
        next(batches)
    sampler.advance(2)
    assert sampler.position == 8
    assert flat(sampler) == order(20)[8:]
    assert len(sampler) == 5
    assert sampler.state_dict() == {
        "version": 1,
        "seed": 0,
        "shuffle": True,
        "epoch": 0,
        "position": 8,
        "length": 20,
    }
    sampler.set_epoch(0)
    assert sampler.position == 8
    sampler.set_epoch(1)
    assert sampler.position == 0
    with pytest.raises(UsageError, match="6 batches cannot have been trained"):
        sampler.advance(6)


def test_a_position_belongs_to_its_length_seed_and_shuffle() -> None:
    saved = Epoch(20, 3).train(2, 2, 2).state
    assert saved is not None
    for change, why in [
        ({"length": 21}, "length was 20 and is 21"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was True and is False"),
    ]:
        live = ElasticSampler(**{"length": 20, "global_batch_size": 4, **change})  # type: ignore[arg-type]
        with pytest.raises(StateMismatchError, match="had trained 8 samples of epoch 3") as refused:
            live.load_state_dict(saved)
        assert why in str(refused.value)
        assert (live.epoch, live.position) == (0, 0)
        # Between two epochs nothing is left over that could be mistaken.
        live.load_state_dict({**saved, "position": 20})
        assert (live.epoch, live.position, list(live)) == (3, live.length, [])
    with pytest.raises(StateMismatchError, match="version 9"):
        ElasticSampler(20, global_batch_size=4).load_state_dict({**saved, "version": 9})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"global_batch_size": 2.5}, "global_batch_size=2.5"),
        ({"length": -1}, "length=-1"),
        ({"length": [1, 2]}, r"length=\[1, 2\]"),
        ({"seed": 2**64}, "seed="),
        ({"rank": 1}, "give both or neither"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"rank": 0, "world_size": 0}, "world_size=0"),
        ({"rank": 0, "world_size": 3}, "cannot be split over 3 ranks"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ElasticSampler(**{"length": 10, "global_batch_size": 4, **arguments})


def test_the_ranks_are_those_of_torch_distributed_once_it_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ElasticSampler(10, global_batch_size=4, shuffle=False)
    assert (sampler.rank, sampler.world_size) == (0, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert list(sampler) == [[1, 3], [5, 7], [9]]


class Reading(Dataset[Any]):
    """Knows what was read of it."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(torch.rand(()))], dtype=torch.float64)


Make = Callable[..., Any]


def forked(nworkers: int = 2, **more: Any) -> dict[str, Any]:
    return {"num_workers": nworkers, "multiprocessing_context": "fork", **more}


def loader(data: Any = None, *, rank: int = 0, world_size: int = 1, size: int = 12, **more: Any) -> DataLoader[Any]:
    options = {name: more.pop(name) for name in ("shuffle", "seed", "drop_last") if name in more}
    data = TensorDataset(torch.arange(NSAMPLES)) if data is None else data
    sampler = ElasticSampler(len(data), global_batch_size=size, rank=rank, world_size=world_size, **options)
    return DataLoader(data, batch_sampler=sampler, **more)


def indices(batch: Any) -> list[int]:
    data = batch[0] if isinstance(batch, list) else batch
    return (data[:, 0] if data.ndim == 2 else data).int().tolist()


class Job:
    """Simulated ranks, each with a loader of its own; they stop together and rank 0 saves for all."""

    def __init__(self, make: Make = loader, epochs: int = 2) -> None:
        self.make, self.epochs = make, epochs
        self.samples: list[list[int]] = [[] for _ in range(epochs)]
        self.said: list[str] = []
        self.saved: Any = None

    def train(self, world_size: int, nbatches: int | None = None, **more: Any) -> Job:
        saves = []
        for rank in range(world_size):
            said = self.said if rank == 0 else []
            live = self.make(rank=rank, world_size=world_size, **more)
            position = DataPosition(live, epochs=self.epochs, notify=said.append)
            if self.saved is not None:
                position.load_state_dict(self.saved[0], rng=self.saved[1])
            lasts = []
            for done, batch in enumerate(position, start=1):
                self.samples[position.epoch] += indices(batch)
                lasts.append((position.epoch, position.is_last_batch))
                if done == nbatches:
                    break
            for (epoch, is_last), following in itertools.pairwise(lasts):
                assert is_last == (following[0] != epoch)
            saves.append((position.state_dict(), capture_rng()))
        assert all(state["sampler"] == saves[0][0]["sampler"] for state, _ in saves)
        self.saved = saves[0]
        return self

    def check(self) -> None:
        for epoch, samples in enumerate(self.samples):
            assert sorted(samples) == list(range(NSAMPLES)), epoch


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kills", [(1, 1, 1), (3, 0, 0), (2, 1, 3), (5, 1, 1), (4, 1, 1), (0, 5, 1)], ids=str)
def test_a_loop_on_four_two_one_and_four_ranks_trains_each_sample_once(kills: Any, shuffle: bool) -> None:
    job = Job()
    for world_size, nbatches in zip((4, 2, 1), kills, strict=True):
        if nbatches:
            job.train(world_size, nbatches, shuffle=shuffle)
    job.train(4, shuffle=shuffle)
    job.check()


@pytest.mark.parametrize(
    "options",
    [forked(), forked(persistent_workers=True), {"data": PerSampleSeed(Augmented()), **forked(1)}],
    ids=["2 workers", "2 persistent workers", "1 worker, per-sample seed"],
)
def test_workers_fetch_ahead_and_nothing_is_lost(options: dict[str, Any]) -> None:
    job = Job().train(2, 1, **options).train(1, 2, **options, size=5).train(2, 3, **options).train(1, **options)
    job.check()
    # Batch sizes and numbers of ranks are all that had to be said.
    assert job.said == [
        "batch size 12 -> 5, world size 2 -> 1: going on after 12 samples of epoch 0",
        "batch size 5 -> 12, world size 1 -> 2: going on after 22 samples of epoch 0",
        "world size 2 -> 1: going on after 12 samples of epoch 1",
    ]


def test_without_a_change_the_run_is_that_without_interruption_to_the_bit() -> None:
    for options in ({}, forked()):
        straight, broken = [], []
        torch.manual_seed(1)
        for batch in DataPosition(loader(Augmented(), **options), epochs=2, notify=pytest.fail):
            straight.append(batch.tolist())
        said: list[str] = []
        saved: Any = None
        for nbatches in (2, 3, None):
            torch.manual_seed(1 if saved is None else 9)
            position = DataPosition(loader(Augmented(), **options), epochs=2, notify=said.append)
            if saved is not None:
                position.load_state_dict(saved[0], rng=saved[1])
            for done, batch in enumerate(position, start=1):
                broken.append(batch.tolist())
                if done == nbatches:
                    break
            saved = position.state_dict(), capture_rng()
        assert broken == straight
        assert len(said) == (2 if options else 0)
        assert all(line.startswith("replaying ") for line in said)


def test_what_was_trained_is_not_read_again() -> None:
    job = Job().train(1, 2).train(1, 1, size=4)
    data = Reading()
    job.train(1, 1, data=data, size=6)
    assert data.read == order(NSAMPLES)[28:34]
    assert sorted(job.samples[0]) == sorted(order(NSAMPLES)[:34])


def test_an_epoch_that_the_sampler_was_told_to_go_on_with_is_counted_from_there() -> None:
    job = Job()
    state = Epoch(NSAMPLES).train(4, 2, 2).state

    def make(**more: Any) -> DataLoader[Any]:
        live = loader(**more)
        live.batch_sampler.load_state_dict(state)  # type: ignore[union-attr]
        return live

    position = DataPosition(make(), notify=pytest.fail)
    first = indices(next(position))
    job.saved = position.state_dict(), capture_rng()
    assert job.saved[0]["sampler"]["position"] == 28
    # In another process, whatever its sampler was told.
    for again in (loader, make):
        taken_up = DataPosition(again(), epochs=1, notify=pytest.fail)
        taken_up.load_state_dict(job.saved[0])
        rest = flat(indices(batch) for batch in taken_up)
        assert first + rest == order(NSAMPLES)[16:]
    job.samples[0] = order(NSAMPLES)[:28]
    job.train(2, size=10).check()


def test_augmentation_of_workers_that_begins_anew_is_said() -> None:
    job = Job().train(1, 2, data=Augmented(), **forked()).train(1, data=Augmented(), size=4, **forked())
    job.check()
    (said,) = job.said
    assert said.startswith("batch size 12 -> 4: going on after 24 samples of epoch 0; not exact: Augmented may draw")


def test_another_order_in_the_middle_of_an_epoch_is_refused_and_between_two_it_is_not() -> None:
    job = Job().train(1, 2)
    for change in ({"seed": 1}, {"shuffle": False}, {"seed": 1, "size": 6}):
        with pytest.raises(StateMismatchError, match="had trained 24 samples of epoch 0"):
            job.train(1, **change)
    with pytest.raises(StateMismatchError, match="drop_last is False in the checkpoint, True in the live loader"):
        job.train(1, size=6, drop_last=True)
    with pytest.raises(StateMismatchError, match="sampler is"):
        DataPosition(DataLoader(Reading(), batch_size=12), notify=print).load_state_dict(job.saved[0])
    job.train(1, 2).train(2, seed=1, size=6)
    job.check()
    assert job.said[0].startswith("the loader has changed since epoch 0")


def test_torchdata_goes_on_where_the_sampler_stood() -> None:
    for options in ({}, forked()):

        def make(size: int = 12, options: Any = options) -> Any:
            sampler = ElasticSampler(NSAMPLES, global_batch_size=size)
            return StatefulDataLoader(torch.arange(NSAMPLES), batch_sampler=sampler, **options)  # type: ignore[arg-type]

        straight = [batch.tolist() for batch in DataPosition(make(), epochs=2, notify=pytest.fail)]
        position = DataPosition(make(), epochs=2, notify=pytest.fail)
        first = [next(position).tolist() for _ in range(6)]
        resumed = DataPosition(make(), epochs=2, notify=pytest.fail)
        resumed.load_state_dict(position.state_dict(), rng=capture_rng())
        assert first + [batch.tolist() for batch in resumed] == straight
        with pytest.raises(StateMismatchError, match="which counts batches"):
            DataPosition(make(6), epochs=2, notify=print).load_state_dict(position.state_dict())


class Counts(torch.nn.Module):
    """A model that remembers which samples it was trained with, in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, NSAMPLES, dtype=torch.int64))


def count_samples(run_dir: Path, size: int, options: dict[str, Any], kill_after: int | None, result: Path) -> None:
    torch.manual_seed(os.getpid())
    model = Counts()
    live = loader(size=size, seed=3, **options)
    with Checkpointer(run_dir, {"model": model}, every_n_steps=2, background=False) as ckpt:
        step = ckpt.resume()
        for done, batch in enumerate(ckpt.batches(live, epochs=2)):
            if done == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            model.counts[ckpt.epoch, indices(batch)] += 1
            step += 1
            ckpt.step(step)
    torch.save(model.counts, result)


def test_a_plain_loop_that_is_killed_again_and_again_trains_each_sample_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    persistent = forked(persistent_workers=True)
    starts = [(12, {}, 3), (5, persistent, 7), (7, forked(), 3)]
    result = tmp_path / "result"
    for size, options, kill_after in [*starts, (9, {}, None)]:
        process = fork.Process(target=count_samples, args=(tmp_path / "run", size, options, kill_after, result))
        process.start()
        # With a time limit, it would wait for the orphaned workers too.
        process.join()
        assert process.exitcode == (0 if kill_after is None else -signal.SIGKILL)
    assert torch.equal(torch.load(result), torch.ones(2, NSAMPLES, dtype=torch.int64))


def elastic(size: int = 4, **more: Any) -> DataLoader[Any]:
    data = Numbered(22)
    return DataLoader(data, batch_sampler=ElasticSampler(len(data), global_batch_size=size, seed=3), **more)


def test_lightning_goes_on_exactly(tmp_path: Path) -> None:
    # In mid-epoch, at the end of an epoch of 6 batches, and in the next one.
    breaks = [("training_step", 4), ("training_step", 4), ("training_step", 3)]
    assert_resumes_exactly(tmp_path, *breaks, loader=lambda: elastic(**forked(persistent_workers=True)))


def test_lightning_goes_on_with_another_batch_size(tmp_path: Path, caplog: Any) -> None:
    seen: list[Any] = []
    for size, breaks in ((4, 3), (6, 2), (5, 6), (4, None)):
        pl.seed_everything(size, verbose=False)
        model = Model(None if breaks is None else ("training_step", breaks))
        trainer = make_trainer(tmp_path, CheckpointManager(tmp_path / "run", every_n_train_steps=1), max_epochs=3)
        try:
            trainer.fit(model, elastic(size))
        except Broken:
            assert breaks is not None
        seen += model.seen
    for epoch in range(3):
        samples = flat(batch for e, _, batch in seen if e == epoch)
        assert samples == order(22, epoch, seed=3), epoch
    assert [message for message in caplog.messages if "going on after" in message] == [
        "batch size 4 -> 6: going on after 8 samples of epoch 0",
        "batch size 6 -> 5: going on after 14 samples of epoch 0",
        "batch size 5 -> 4: going on after 15 samples of epoch 1",
    ]
