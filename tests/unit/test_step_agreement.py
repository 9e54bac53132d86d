"""What ranks agree on at step boundaries, how often they talk, and what each of them knows by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from ranks_of_threads import meet, on_all

from ckptmgr.policy.triggers import (
    EveryEpochs,
    EverySeconds,
    EverySteps,
    Moment,
    OnException,
    OnImprovement,
    OnSignal,
    known_everywhere,
    may_need_any_step,
)
from ckptmgr.ranks.group import Channel, Ranks
from ckptmgr.ranks.steps import StepAgreement


class SteppingClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class CountingChannel:
    """Counts how often a channel is used."""

    def __init__(self, channel: Channel) -> None:
        self.world_size = channel.world_size
        self.whats: list[str] = []
        self._channel = channel

    def exchange(self, what: str, job: Callable[[], Any], answer: Callable[[Sequence[Any]], Any]) -> Any:
        self.whats.append(what)
        return self._channel.exchange(what, job, answer)


def train(
    ranks: list[Ranks],
    steps: int,
    *,
    step_s: float,
    signals: dict[int, int] | None = None,
    talks_always: bool = False,
    decide: Callable[[int, bool], str | None] = lambda step, must_stop: None,
    known: Callable[[int], str | None] = lambda step: None,
) -> tuple[list[list[tuple[str | None, bool]]], list[list[str]]]:
    """Run a loop on all ranks until the first stop; return what each was told by step, and the steps of its talks."""
    channels = [CountingChannel(rank.loop) for rank in ranks]

    def loop(rank: Ranks) -> list[tuple[str | None, bool]]:
        clock, told = SteppingClock(), []
        agreement = StepAgreement(channels[rank.rank], talks_always=talks_always, clock=clock)  # type: ignore[arg-type]
        for step in range(1, steps + 1):
            # The ranks' clocks do not agree.
            clock.now += step_s * (1 + rank.rank)
            got_signal = (signals or {}).get(rank.rank, steps + 1) <= step
            told.append(
                agreement.at_step(
                    f"step {step}",
                    is_told_to_stop=got_signal,
                    decide=lambda must_stop, step=step: decide(step, must_stop),
                    known=lambda step=step: known(step),
                )
            )
            if told[-1][1]:
                break
        return told

    told = on_all(ranks, loop)
    for rank in ranks:
        rank.close()
    return told, [channel.whats for channel in channels]


@pytest.mark.parametrize(("step_s", "apart"), [(0.2, 1), (0.05, 1), (0.01, 5), (0.001, 50), (1e-9, 1000)])
def test_the_ranks_talk_about_every_50_ms_of_rank_0_at_the_same_steps(step_s, apart):
    told, talks = train(meet(2), 2500, step_s=step_s)
    assert told[0] == told[1] == [(None, False)] * 2500
    assert talks[0] == talks[1]
    steps = [int(what.split()[1]) for what in talks[0]]
    gaps = {after - before for before, after in itertools.pairwise(steps[2:])} or {steps[-1] - steps[-2]}
    # Step times are sums of floats: one step more or less.
    assert all(apart - 1 <= gap <= apart + 1 for gap in gaps), gaps
    assert steps[0] == 1


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_signal_on_one_rank_stops_all_at_one_step_soon_after(victim):
    def decide(step: int, must_stop: bool) -> str | None:
        return "signal" if must_stop else None

    told, _ = train(meet(3), 200, step_s=0.01, signals={victim: 42}, decide=decide)
    assert told[0] == told[1] == told[2]
    assert told[0][-1] == ("signal", True)
    assert 42 <= len(told[0]) <= 42 + 6
    assert not any(stop for _, stop in told[0][:-1])


def test_every_rank_gets_the_same_at_every_step_from_what_is_known_and_what_is_decided():
    def known(step: int) -> str | None:
        return "every 7 steps" if step % 7 == 0 else None

    def decide(step: int, must_stop: bool) -> str | None:
        return known(step) or "by rank 0's clock"

    told, talks = train(meet(2), 100, step_s=0.01, known=known, decide=decide)
    assert told[0] == told[1]
    asked = {int(what.split()[1]) for what in talks[0]}
    for step, (reason, _) in enumerate(told[0], start=1):
        expected = known(step) or ("by rank 0's clock" if step in asked else None)
        assert reason == expected, step


def test_what_cannot_wait_is_asked_at_every_step():
    told, talks = train(
        meet(2), 30, step_s=1e-6, talks_always=True, decide=lambda step, _: "best" if step == 17 else None
    )
    assert len(talks[0]) == len(talks[1]) == 30
    assert [reason for reason, _ in told[1]] == [None] * 16 + ["best"] + [None] * 13


def test_one_rank_alone_decides_at_every_step_and_stops_at_once():
    told, talks = train([Ranks.alone()], 9, step_s=1e-6, signals={0: 4}, decide=lambda step, _: f"step {step}")
    assert told == [[("step 1", False), ("step 2", False), ("step 3", False), ("step 4", True)]]
    assert talks == [[]]


class OneOf(tuple[Any, ...]):
    """Stands for a trigger of the user's that is made of others."""

    @property
    def triggers(self) -> tuple[Any, ...]:
        return tuple(self)

    def reason_to_save(self, moment: Moment) -> str | None:
        return next((reason for part in self if (reason := part.reason_to_save(moment))), None)


class OwnTrigger:
    """A user's trigger, of which nothing is known."""

    def reason_to_save(self, moment: Moment) -> str | None:
        return "of the user's"


DUE = Moment(
    step=10,
    epoch=0,
    is_epoch_end=True,
    last_saved_step=0,
    seconds_since_save=1e9,
    metrics={"loss": 0.0},
    signalled=True,
    failed=True,
)


@pytest.mark.parametrize(
    ("trigger", "known", "any_step"),
    [
        (EverySteps(10), "every 10 steps", False),
        (EveryEpochs(1), "epoch end", False),
        (EverySeconds(1), None, False),
        (OnSignal(), None, False),
        (OnException(), None, False),
        (OnImprovement("loss", "min"), None, True),
        (OwnTrigger(), None, True),
        (OneOf((OnSignal(), EverySteps(5))), "every 5 steps", False),
        (OneOf((OnImprovement("loss", "min"), OneOf((EverySeconds(1), EveryEpochs(1))))), "epoch end", True),
        (OneOf(()), None, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_every_rank_knows_of_a_trigger_is_what_follows_from_step_and_epoch(trigger, known, any_step):
    assert known_everywhere(trigger).reason_to_save(DUE) == known
    assert may_need_any_step(trigger) is any_step


def test_what_every_rank_knows_does_not_depend_on_what_only_one_of_them_has():
    trigger = known_everywhere(OneOf((OnSignal(), EverySeconds(1), OnImprovement("loss", "min"), EverySteps(20))))
    assert trigger.reason_to_save(DUE) is None
