"""However often and on however many ranks an epoch is taken up again, each of its samples is trained exactly once."""

from collections import Counter

import pytest
from elastic_samples import Epoch, flat, order
from hypothesis import given, settings
from hypothesis import strategies as st

starts = st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.integers(0, 6), st.integers(0, 3))


@settings(max_examples=120, deadline=None)
@given(
    length=st.integers(0, 70),
    epoch=st.integers(0, 3),
    seed=st.sampled_from([0, 1, 2**64 - 1]),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    killed=st.lists(starts, max_size=5),
    last=starts,
)
def test_an_epoch_trains_each_sample_once(
    length: int,
    epoch: int,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    killed: list[tuple[int, int, int, int]],
    last: tuple[int, int, int, int],
) -> None:
    run = Epoch(length, epoch, {"seed": seed, "shuffle": shuffle, "drop_last": drop_last})
    whole = order(length, epoch, seed=seed, shuffle=shuffle)
    assert sorted(whole) == list(range(length))
    for world_size, batch_size, nbatches, ahead in killed:
        run.train(world_size, batch_size, nbatches, ahead=ahead)
        # The samples trained so far are the first ones of the order, on any ranks and in any batches.
        assert set(run.samples) == set(whole[: run.position])
    left = length - run.position
    world_size, batch_size, *_ = last
    run.train(world_size, batch_size)
    counts = Counter(run.samples)
    for ranks in run.batches:
        sizes = [len(mine) for mine in ranks]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    if drop_last:
        assert set(counts.values()) <= {1}
        assert len(counts) == length - left % (world_size * batch_size)
    else:
        assert set(counts) == set(range(length))
        # A rank may only repeat in the one batch of an epoch that has fewer samples left than ranks.
        repeated = sum(max(0, len(ranks) - len(set(map(tuple, ranks)))) for ranks in run.batches)
        assert sum(counts.values()) == length + repeated
        assert repeated == 0 or len({sample for mine in run.batches[-1] for sample in mine}) < len(run.batches[-1])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@settings(max_examples=25, deadline=None)
@given(over=st.integers(0, 15), kills=st.tuples(*[st.integers(0, 4)] * 3), batch_size=st.integers(1, 4))
def test_four_ranks_two_one_and_four_again_train_what_four_would(
    shuffle: bool, drop_last: bool, over: int, kills: tuple[int, int, int], batch_size: int
) -> None:
    # More full batches than are killed: only at the end of an epoch do the numbers of ranks differ.
    length = 13 * 4 * batch_size + over
    run = Epoch(length, 2, {"seed": 5, "shuffle": shuffle, "drop_last": drop_last})
    # The global batch stays: 4 ranks of so many, 2 of twice as many, 1 of four times as many.
    for world_size, nbatches in zip((4, 2, 1), kills, strict=True):
        run.train(world_size, 4 * batch_size // world_size, nbatches)
    run.train(4, batch_size)
    straight = Epoch(length, 2, run.options).train(4, batch_size)
    assert [sorted(flat(ranks)) for ranks in run.batches] == [sorted(flat(ranks)) for ranks in straight.batches]
    assert len(set(run.samples)) == len(run.samples)
