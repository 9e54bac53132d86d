"""What to keep, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from ckptmgr.errors import UsageError
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


def at(step: int, *, tags: Sequence[str] = (), save: int = 1, **metrics: float) -> CheckpointFacts:
    return CheckpointFacts(id=f"{step:010d}-000001-{save:04d}", step=step, metrics=metrics, tags=frozenset(tags))


def of(step: int, **known: object) -> CheckpointFacts:
    return CheckpointFacts(id=f"{step:010d}-000001-0001", step=step, **known)  # type: ignore[arg-type]


def kept_steps(policy: RetentionPolicy, checkpoints: Sequence[CheckpointFacts]) -> list[int]:
    return [int(name.split("-")[0]) for name in plan(policy, checkpoints).keep]


def test_keep_last_keeps_the_newest_k() -> None:
    assert kept_steps(KeepLast(2), [at(step) for step in (30, 10, 20, 40)]) == [30, 40]


def test_of_two_saves_at_one_step_the_later_is_the_newer() -> None:
    decided = plan(KeepLast(1), [at(10, save=2), at(10, save=1)])
    assert list(decided.keep) == ["0000000010-000001-0002"]
    assert list(decided.drop) == ["0000000010-000001-0001"]


def test_keep_best_keeps_the_k_best_and_says_which_place_each_has() -> None:
    saved = [at(1, loss=0.1), at(2, loss=0.3), at(3, loss=0.2), at(4, loss=0.9)]
    reasons = plan(KeepBest(2, "loss"), saved).keep
    assert list(reasons.values()) == [("best loss",), ("2nd best loss",), ("newest",)]


def test_keep_best_prefers_the_newer_of_equals() -> None:
    assert kept_steps(KeepBest(1, "acc", "max"), [at(1, acc=0.5), at(2, acc=0.5), at(3, acc=0.1)]) == [2, 3]


def test_a_missing_or_nan_metric_is_never_best() -> None:
    saved = [at(1, loss=math.nan), at(2), at(3, loss=7.0), at(4)]
    assert kept_steps(KeepBest(3, "loss"), saved) == [3, 4]
    assert best(saved, "loss", "min") == saved[2]
    assert best(saved, "accuracy", "max") is None


def test_keep_every_steps_keeps_the_first_at_or_after_each_multiple() -> None:
    saved = [at(step) for step in (70, 140, 210, 280, 350, 420)]
    assert kept_steps(KeepEverySteps(100), saved) == [140, 210, 350, 420]


def test_what_keep_every_steps_keeps_once_it_keeps_for_good() -> None:
    policy = KeepEverySteps(100)
    kept: list[CheckpointFacts] = []
    promised: set[str] = set()
    for step in range(30, 1000, 30):
        kept.append(at(step))
        promised |= set(policy.reasons_to_keep(kept))
        decided = plan(policy, kept)
        assert promised <= set(decided.keep)
        kept = [facts for facts in kept if facts.id in decided.keep]
    assert len(promised) == 9


def test_a_tag_pins() -> None:
    saved = [at(1, tags=["paper", "best-so-far"]), at(2), at(3)]
    assert plan(KeepTagged(), saved).keep == {
        saved[0].id: ("tagged best-so-far", "tagged paper"),
        saved[2].id: ("newest",),
    }


def test_keep_all_drops_nothing() -> None:
    assert plan(KeepAll(), [at(1), at(2)]).drop == {}


DAY = 86400.0


def test_keep_within_counts_age_back_from_the_newest_checkpoint() -> None:
    saved = [of(day, created_at=1e9 + day * DAY) for day in range(1, 11)]
    assert kept_steps(KeepWithin("3d"), saved) == [7, 8, 9, 10]
    assert plan(KeepWithin("3d"), saved).keep[saved[6].id] == ("within 3d of the newest",)


def test_keep_within_loses_nothing_to_a_clock_that_is_unknown_or_wrong() -> None:
    saved = [of(1, created_at=None), of(2, created_at=1e9 + 50 * DAY), of(3, created_at=1e9), of(4, created_at=None)]
    assert kept_steps(KeepWithin(DAY), saved) == [1, 2, 3, 4]


def test_keep_every_epochs_keeps_the_last_of_every_nth_epoch() -> None:
    saved = [of(step, epoch=step // 10) for step in range(0, 100, 5)]
    assert kept_steps(KeepEveryEpochs(4), saved) == [35, 75, 95]


def test_keep_every_epochs_takes_the_next_epoch_that_has_one() -> None:
    saved = [of(epoch, epoch=epoch) for epoch in (1, 4, 5, 7, 12)] + [of(13)]
    assert kept_steps(KeepEveryEpochs(3), saved) == [4, 5, 12, 13]


def test_a_budget_keeps_what_matters_most_as_far_as_it_fits() -> None:
    saved = [of(step, nbytes=10, metrics={"acc": float(step % 5)}) for step in range(1, 11)]
    decided = plan(Budget(40, KeepBest(2, "acc", "max"), KeepLast(4)), saved)
    assert [facts.step for facts in saved if facts.id in decided.keep] == [4, 8, 9, 10]
    decided = plan(Budget(30, KeepBest(2, "acc", "max"), KeepLast(4)), saved)
    assert [facts.step for facts in saved if facts.id in decided.keep] == [4, 9, 10]
    assert decided.keep[saved[8].id] == ("best acc", "last 4")
    assert decided.drop[saved[7].id] == "over the budget of 30 bytes (would be: last 4)"
    assert decided.drop[saved[0].id] == "nothing keeps it"


def test_a_budget_lets_something_smaller_in_behind_what_does_not_fit() -> None:
    saved = [of(1, nbytes=3), of(2, nbytes=90), of(3, nbytes=10)]
    assert kept_steps(Budget("20B", KeepAll()), saved) == [1, 3]


def test_the_newest_and_what_is_tagged_stay_whatever_they_take() -> None:
    saved = [of(1, nbytes=500, tags=frozenset({"paper"})), of(2, nbytes=1), of(3, nbytes=500)]
    decided = plan(Budget(100, KeepAll()), saved)
    assert decided.keep == {saved[0].id: ("tagged paper", "all are kept"), saved[2].id: ("newest", "all are kept")}


def test_what_another_policy_keeps_is_not_the_budgets_to_drop() -> None:
    saved = [of(step, nbytes=10) for step in (1, 2, 3)]
    decided = plan(Union(Budget(10, KeepAll()), KeepLast(2)), saved)
    assert list(decided.keep) == [saved[1].id, saved[2].id]
    assert decided.drop == {saved[0].id: "over the budget of 10 bytes (would be: all are kept)"}


@pytest.mark.parametrize(
    "slip", [lambda: Budget("5GB"), lambda: Budget("5 cars", KeepAll()), lambda: Budget(5, KeepAll)]
)
def test_a_budget_that_cannot_be_meant_is_refused(slip: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        slip()


def test_a_union_keeps_what_any_keeps_with_all_reasons() -> None:
    saved = [at(step, loss=1 / step) for step in (100, 200, 300, 400)]
    decided = plan(Union(KeepLast(2), KeepEverySteps(200), KeepBest(1, "loss")), saved)
    assert decided.keep == {
        saved[1].id: ("every 200 steps",),
        saved[2].id: ("last 2",),
        saved[3].id: ("newest", "last 2", "every 200 steps", "best loss"),
    }
    assert list(decided.drop) == [saved[0].id]


def test_an_empty_run_needs_no_decision() -> None:
    assert plan(KeepLast(1), []).keep == {}


class OfAUser:
    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> Mapping[str, Sequence[str]]:
        return {checkpoints[0].id: "because", checkpoints[1].id: (), "unknown": ("?",)}


def test_a_users_policy_may_be_sloppy() -> None:
    saved = [at(1), at(2), at(3)]
    decided = plan(OfAUser(), saved)
    assert decided.keep == {saved[0].id: ("because",), saved[2].id: ("newest",)}
    assert list(decided.drop) == [saved[1].id]


def test_a_second_save_of_a_step_takes_the_place_of_the_first() -> None:
    saved = [at(10), at(20), at(30, save=1), at(30, save=2)]
    assert kept_steps(KeepLast(2), saved) == [20, 30]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, math.nan, None])
@pytest.mark.parametrize("policy", [KeepLast, KeepEverySteps, KeepEveryEpochs, lambda k: KeepBest(k, "loss")])
def test_a_count_that_is_no_positive_whole_number_is_refused_at_once(policy: type, value: object) -> None:
    with pytest.raises(UsageError) as refused:
        policy(value)
    assert refused.value.why
    assert refused.value.next


def test_a_mode_that_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="mode='best'"):
        KeepBest(1, "loss", "best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="mode=None"):
        best([], "loss", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("slip", [KeepAll, [KeepAll()], 3])
def test_a_union_refuses_what_is_no_policy(slip: object) -> None:
    with pytest.raises(UsageError, match="Union"):
        Union(slip)  # type: ignore[arg-type]
