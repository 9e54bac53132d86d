"""When to save."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
import pytest

from ckptmgr.errors import UsageError
from ckptmgr.policy import (
    AnyOf,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    MetricSpan,
    Moment,
    OnException,
    OnImprovement,
    OnSignal,
    Trigger,
    widen_spans,
)


def saved_steps(trigger: Trigger, steps: list[int], *, last_saved_step: int = 0) -> list[int]:
    saved = []
    for step in steps:
        if trigger.reason_to_save(Moment(step=step, last_saved_step=last_saved_step)):
            saved.append(step)
            last_saved_step = step
    return saved


def test_every_steps_saves_at_each_multiple() -> None:
    assert saved_steps(EverySteps(3), list(range(1, 11))) == [3, 6, 9]


def test_every_steps_does_not_miss_a_multiple_that_the_steps_jump_over() -> None:
    assert saved_steps(EverySteps(100), [95, 105, 190, 210, 290, 520]) == [105, 210, 520]


def test_every_steps_goes_on_at_the_multiples_after_a_resume_in_between() -> None:
    assert saved_steps(EverySteps(100), [151, 199, 200, 250, 300], last_saved_step=150) == [200, 300]


def test_every_steps_does_not_save_the_step_that_was_just_resumed() -> None:
    assert EverySteps(100).reason_to_save(Moment(step=200, last_saved_step=200)) is None


def test_every_steps_accepts_an_integer_of_numpy() -> None:
    trigger = EverySteps(np.int64(5))  # type: ignore[arg-type]
    assert trigger == EverySteps(5)
    assert type(trigger.n) is int


def test_every_epochs_saves_at_the_end_of_each_nth_epoch_only() -> None:
    trigger = EveryEpochs(2)
    ends = [trigger.reason_to_save(Moment(step=1, epoch=epoch, is_epoch_end=True)) for epoch in range(4)]
    assert ends == [None, "every 2 epochs", None, "every 2 epochs"]
    assert trigger.reason_to_save(Moment(step=1, epoch=1)) is None


def test_every_epochs_is_silent_where_nobody_counts_epochs() -> None:
    assert EveryEpochs(1).reason_to_save(Moment(step=1, is_epoch_end=True)) is None


@pytest.mark.parametrize("interval", [90, 90.0, timedelta(seconds=90)])
def test_every_seconds_saves_when_the_newest_save_is_old_enough(interval: float | timedelta) -> None:
    trigger = EverySeconds(interval)
    assert trigger.reason_to_save(Moment(step=1, seconds_since_save=89.9)) is None
    assert trigger.reason_to_save(Moment(step=1, seconds_since_save=90.0)) == "every 90 s"


def test_improvement_means_strictly_better_than_every_save_before() -> None:
    trigger = OnImprovement("loss", "min")
    seen: dict[str, MetricSpan] = {}
    reasons = []
    for loss in (0.5, math.nan, 0.5, 0.7, 0.4):
        reasons.append(trigger.reason_to_save(Moment(step=1, metrics={"loss": loss}, seen=seen)))
        seen = widen_spans(seen, {"loss": loss})
    assert reasons == ["first loss: 0.5", None, None, None, "best loss: 0.4"]


def test_improvement_upwards_looks_at_the_highest_value() -> None:
    seen = {"acc": MetricSpan(0.1, 0.8)}
    trigger = OnImprovement("acc", "max")
    assert trigger.reason_to_save(Moment(step=1, metrics={"acc": 0.8}, seen=seen)) is None
    assert trigger.reason_to_save(Moment(step=1, metrics={"acc": 0.9}, seen=seen)) == "best acc: 0.9"


def test_a_missing_metric_is_no_improvement() -> None:
    assert OnImprovement("acc", "max").reason_to_save(Moment(step=1)) is None


def test_spans_do_not_depend_on_the_order_and_ignore_nan() -> None:
    values = [0.5, math.nan, 0.1, 0.9]
    forwards: dict[str, MetricSpan] = {}
    backwards: dict[str, MetricSpan] = {}
    for value, other in zip(values, reversed(values), strict=True):
        forwards = widen_spans(forwards, {"loss": value})
        backwards = widen_spans(backwards, {"loss": other})
    assert forwards == backwards == {"loss": MetricSpan(0.1, 0.9)}


def test_a_signal_and_an_exception_are_reasons() -> None:
    quiet = Moment(step=1)
    assert OnSignal().reason_to_save(quiet) is None
    assert OnException().reason_to_save(quiet) is None
    assert OnSignal().reason_to_save(Moment(step=1, signalled=True)) == "signal"
    assert OnException().reason_to_save(Moment(step=1, failed=True)) == "exception"


def test_any_of_gives_the_reason_of_the_first_that_has_one() -> None:
    trigger = AnyOf(EverySteps(10), OnSignal(), EverySteps(5))
    assert trigger.reason_to_save(Moment(step=10, signalled=True)) == "every 10 steps"
    assert trigger.reason_to_save(Moment(step=5, signalled=True)) == "signal"
    assert trigger.reason_to_save(Moment(step=5)) == "every 5 steps"
    assert trigger.reason_to_save(Moment(step=4)) is None


@pytest.mark.parametrize("value", [0, -1, 2.0, math.nan, True, "10", None])
@pytest.mark.parametrize("trigger", [EverySteps, EveryEpochs])
def test_an_interval_that_is_no_positive_whole_number_is_refused_at_once(trigger: type, value: object) -> None:
    with pytest.raises(UsageError) as refused:
        trigger(value)
    assert trigger.__name__ in refused.value.what
    assert refused.value.why
    assert refused.value.next


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "10", None, timedelta(0)])
def test_a_duration_that_is_not_positive_and_finite_is_refused_at_once(value: object) -> None:
    with pytest.raises(UsageError) as refused:
        EverySeconds(value)  # type: ignore[arg-type]
    assert refused.value.why
    assert refused.value.next


def test_a_mode_or_metric_that_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="mode='lowest'"):
        OnImprovement("loss", "lowest")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="metric"):
        OnImprovement("", "min")


@pytest.mark.parametrize("slip", [EverySteps, [EverySteps(3)], 3])
def test_any_of_refuses_what_is_no_trigger(slip: object) -> None:
    with pytest.raises(UsageError, match="AnyOf"):
        AnyOf(slip)  # type: ignore[arg-type]
