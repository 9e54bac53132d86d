"""What holds for every policy and every run."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.policy import (
    Budget,
    CheckpointFacts,
    KeepAll,
    KeepBest,
    KeepEveryEpochs,
    KeepEverySteps,
    KeepLast,
    KeepTagged,
    KeepWithin,
    RetentionPolicy,
    Union,
    best,
    plan,
)

metrics = st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats(width=16))


@st.composite
def runs(draw: st.DrawFn) -> list[CheckpointFacts]:
    steps = sorted(draw(st.lists(st.integers(0, 60), max_size=20)))
    return [
        CheckpointFacts(
            id=f"{step:010d}-000001-{save:04d}",
            step=step,
            epoch=draw(st.none() | st.integers(0, 12)),
            created_at=draw(st.none() | st.integers(0, 1000)),
            nbytes=draw(st.integers(0, 50)),
            metrics=draw(metrics),
            tags=draw(st.frozensets(st.sampled_from(["paper", "keep"]), max_size=2)),
        )
        for save, step in enumerate(steps)
    ]


counts = st.integers(1, 30)
simple = st.one_of(
    st.builds(KeepLast, counts),
    st.builds(KeepBest, counts, st.sampled_from(["loss", "acc"]), st.sampled_from(["min", "max"])),
    st.builds(KeepEverySteps, counts),
    st.builds(KeepEveryEpochs, counts),
    st.builds(KeepWithin, st.integers(1, 500)),
    st.just(KeepTagged()),
    st.just(KeepAll()),
)
limits = st.integers(1, 300)
policies = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda some: Union(*some)),
        st.builds(lambda limit, some: Budget(limit, *some), limits, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@given(policies, runs())
def test_the_newest_is_always_kept(policy: RetentionPolicy, run: list[CheckpointFacts]) -> None:
    if run:
        assert plan(policy, run).keep[run[-1].id][0] == "newest"


@given(policies, runs())
def test_every_checkpoint_is_either_kept_with_a_reason_or_dropped(
    policy: RetentionPolicy, run: list[CheckpointFacts]
) -> None:
    decided = plan(policy, run)
    assert sorted((*decided.keep, *decided.drop)) == [facts.id for facts in run]
    assert all(decided.keep.values())


@given(st.lists(policies, min_size=1, max_size=4), runs())
def test_a_union_keeps_exactly_what_its_policies_keep(
    several: list[RetentionPolicy], run: list[CheckpointFacts]
) -> None:
    together = set(plan(Union(*several), run).keep)
    assert together == set().union(*(plan(policy, run).keep for policy in several))


@given(policies, runs(), st.randoms(use_true_random=False))
def test_the_order_in_which_checkpoints_are_listed_does_not_matter(
    policy: RetentionPolicy, run: list[CheckpointFacts], chance: random.Random
) -> None:
    shuffled = chance.sample(run, len(run))
    assert plan(policy, shuffled) == plan(policy, run)


@given(policies, runs())
def test_deciding_again_about_what_was_kept_drops_nothing(policy: RetentionPolicy, run: list[CheckpointFacts]) -> None:
    decided = plan(policy, run)
    kept = [facts for facts in run if facts.id in decided.keep]
    assert plan(policy, kept).drop == {}


@given(runs(), st.sampled_from(["min", "max"]))
def test_nothing_beats_the_best(run: list[CheckpointFacts], mode: str) -> None:
    winner = best(run, "loss", mode)  # type: ignore[arg-type]
    values = [facts.metrics["loss"] for facts in run if not math.isnan(facts.metrics.get("loss", math.nan))]
    if winner is None:
        assert not values
    else:
        assert winner.metrics["loss"] == (min(values) if mode == "min" else max(values))


@given(limits, st.lists(policies, min_size=1, max_size=3), runs())
def test_a_budget_is_kept_except_by_the_newest_and_what_is_tagged(
    limit: int, several: list[RetentionPolicy], run: list[CheckpointFacts]
) -> None:
    kept = [facts for facts in run if facts.id in plan(Budget(limit, *several), run).keep]
    free = [facts for facts in kept if not facts.tags and facts != run[-1]]
    assert not free or sum(facts.nbytes for facts in kept) <= limit
    wanted = set(plan(Union(*several, KeepTagged()), run).keep)
    assert {facts.id for facts in kept} <= wanted


@given(policies, runs())
def test_each_drop_has_a_reason(policy: RetentionPolicy, run: list[CheckpointFacts]) -> None:
    assert all(plan(policy, run).drop.values())
