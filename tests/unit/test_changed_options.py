"""A program that was changed since the checkpoint: what differs is named, and goes on as if it had always been so."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.state.capture import capture_state, restore_state
from ckptmgr.state.changed_options import OptionChange, changed_options, describe_options
from ckptmgr.state.training_options import TrainingOptions

OBJECTS = dict[str, Any]
Schedule = Callable[[Optimizer], LRScheduler]

STEPS = 12


def build(schedule: Schedule | None = None, optimizer: Any = SGD, **options: Any) -> OBJECTS:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    made = optimizer(model.parameters(), **{"lr": 0.1, **options})
    objects = {"model": model, "optimizer": made}
    return objects if schedule is None else {**objects, "scheduler": schedule(made)}


def train(objects: OBJECTS, nsteps: int) -> list[list[float]]:
    """Return the learning rates (and what is cycled with them) before each step."""
    rates = []
    for _ in range(nsteps):
        rates.append([float(value) for group in objects["optimizer"].param_groups for value in cycled(group)])
        objects["optimizer"].zero_grad()
        objects["model"](torch.ones(1, 2)).sum().backward()
        objects["optimizer"].step()
        scheduler = objects.get("scheduler")
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    return rates


def cycled(group: dict[str, Any]) -> list[float]:
    return [group["lr"], *([group["momentum"]] if "momentum" in group else group.get("betas", ()))]


def resumed(old: OBJECTS, saved: Any, new: OBJECTS, mode: Any = "apply") -> TrainingOptions:
    """Put the state of one program into another, as a resume does."""
    options = TrainingOptions(new, mode)
    states = {entry.name: entry for entry in capture_state(old)}
    options.check(saved, {name: entry.tree for name, entry in states.items()})
    restore_state(new, states)
    options.take_up(saved)
    return options


def assert_same_rates(found: list[list[float]], expected: list[list[float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-7, abs=1e-12)


SCHEDULES: dict[str, Schedule] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda n: 1 / (n + 1)),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: MultiStepLR(o, [2, 7, 7, 9], gamma=0.5),
    "ConstantLR": lambda o: ConstantLR(o, 0.5, total_iters=8),
    "LinearLR": lambda o: LinearLR(o, 0.2, total_iters=8),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: PolynomialLR(o, 10, power=2.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10),
    "CosineAnnealingLR, to a minimum": lambda o: CosineAnnealingLR(o, 8, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 3, T_mult=2, eta_min=1e-4),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=2),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=4), CosineAnnealingLR(o, 5), ExponentialLR(o, 0.9)], milestones=[4, 9]
    ),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_another_learning_rate_the_schedule_goes_on_as_if_it_had_begun_with_it(name: str, stop: int) -> None:
    old = build(SCHEDULES[name])
    saved = describe_options(old)
    train(old, stop)
    new = build(SCHEDULES[name], lr=0.02)
    resumed(old, saved, new)
    assert new["scheduler"].get_last_lr() == [new["optimizer"].param_groups[0]["lr"]]
    assert_same_rates(train(new, STEPS - stop), train(build(SCHEDULES[name], lr=0.02), STEPS)[stop:])


CHANGED: dict[str, tuple[Schedule, Schedule]] = {
    "StepLR": (lambda o: StepLR(o, 3, gamma=0.5), lambda o: StepLR(o, 2, gamma=0.7)),
    "MultiStepLR": (lambda o: MultiStepLR(o, [2, 7], gamma=0.5), lambda o: MultiStepLR(o, [3, 3, 8], gamma=0.1)),
    "LinearLR": (lambda o: LinearLR(o, 0.2, total_iters=8), lambda o: LinearLR(o, 0.5, total_iters=10)),
    "ExponentialLR": (lambda o: ExponentialLR(o, 0.9), lambda o: ExponentialLR(o, 0.99)),
    "CosineAnnealingLR": (
        lambda o: CosineAnnealingLR(o, 8, eta_min=1e-3),
        lambda o: CosineAnnealingLR(o, 30, eta_min=1e-4),
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: CosineAnnealingWarmRestarts(o, 3, T_mult=2),
        lambda o: CosineAnnealingWarmRestarts(o, 4, eta_min=1e-3),
    ),
    "OneCycleLR": (lambda o: OneCycleLR(o, 0.1, total_steps=20), lambda o: OneCycleLR(o, 0.02, total_steps=30)),
    "CyclicLR": (
        lambda o: CyclicLR(o, 0.001, 0.1, step_size_up=4),
        lambda o: CyclicLR(o, 0.002, 0.05, step_size_up=6, max_momentum=0.8, base_momentum=0.7),
    ),
    "SequentialLR": (
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)], milestones=[4]),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=6), ExponentialLR(o, 0.8)], milestones=[6]),
    ),
    "ChainedScheduler": (
        lambda o: ChainedScheduler([ConstantLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)]),
        lambda o: ChainedScheduler([ConstantLR(o, 0.2, total_iters=6), ExponentialLR(o, 0.8)]),
    ),
}


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 10])
@pytest.mark.parametrize("name", CHANGED)
def test_changed_arguments_of_a_scheduler_count_as_if_they_had_always_been_so(name: str, stop: int) -> None:
    before, after = CHANGED[name]
    old = build(before, momentum=0.9)
    saved = describe_options(old)
    train(old, stop)
    new = build(after, momentum=0.9, lr=0.3)
    resumed(old, saved, new)
    assert_same_rates(train(new, STEPS - stop), train(build(after, momentum=0.9, lr=0.3), STEPS)[stop:])


def test_a_one_cycle_keeps_the_betas_that_it_does_not_cycle() -> None:
    old = build(lambda o: OneCycleLR(o, 0.1, total_steps=20), AdamW)
    saved = describe_options(old)
    train(old, 6)
    new = build(lambda o: OneCycleLR(o, 0.02, total_steps=20), AdamW, betas=(0.9, 0.95))
    resumed(old, saved, new)
    expected = build(lambda o: OneCycleLR(o, 0.02, total_steps=20), AdamW, betas=(0.9, 0.95))
    assert_same_rates(train(new, 6), train(expected, 12)[6:])


def test_reductions_on_a_plateau_stay_and_new_arguments_count_from_now_on() -> None:
    old = build(lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1))
    saved = describe_options(old)
    train(old, 5)
    assert old["optimizer"].param_groups[0]["lr"] == 0.025
    new = build(lambda o: ReduceLROnPlateau(o, factor=0.1, patience=1))
    resumed(old, saved, new)
    assert [rate for rate, _ in train(new, 3)] == pytest.approx([0.025, 0.025, 0.0025])


def test_options_of_the_optimizer_are_set_and_tuples_stay_tuples() -> None:
    old = build(optimizer=AdamW)
    saved = describe_options(old)
    train(old, 2)
    new = build(optimizer=AdamW, lr=0.05, weight_decay=0.3, betas=(0.8, 0.95))
    changes = resumed(old, saved, new).applied
    group = new["optimizer"].param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.05, 0.3, (0.8, 0.95))
    assert [str(change) for change in changes] == [
        "learning rate of optimizer: 0.1 -> 0.05",
        "betas of optimizer: [0.9, 0.999] -> [0.8, 0.95]",
        "weight decay of optimizer: 0.01 -> 0.3",
    ]


def test_a_rate_that_the_loop_has_changed_by_hand_keeps_its_share() -> None:
    old = build()
    saved = describe_options(old)
    old["optimizer"].param_groups[0]["lr"] = 0.025
    train(old, 1)
    new = build(lr=0.2)
    resumed(old, saved, new)
    assert new["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05)


def test_from_a_rate_of_zero_the_new_one_is_set() -> None:
    old = build(lr=0.0)
    saved = describe_options(old)
    train(old, 1)
    new = build(lr=0.2)
    resumed(old, saved, new)
    assert new["optimizer"].param_groups[0]["lr"] == 0.2
    frozen = build(lr=0.0)
    resumed(new, describe_options(build(lr=0.2)), frozen)
    assert frozen["optimizer"].param_groups[0]["lr"] == 0.0


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor() -> None:
    def schedule(o: Optimizer) -> LRScheduler:
        return StepLR(o, 2, gamma=0.5)

    old = build(schedule, AdamW, lr=torch.tensor(0.1), capturable=False, foreach=False)
    saved = describe_options(old)
    train(old, 3)
    new = build(schedule, AdamW, lr=torch.tensor(0.02), capturable=False, foreach=False)
    live = new["optimizer"].param_groups[0]["lr"]
    changes = resumed(old, saved, new).applied
    assert new["optimizer"].param_groups[0]["lr"] is live
    assert float(live) == pytest.approx(0.01)
    assert [(change.was, change.now) for change in changes] == [(0.1, 0.02)]
    train(new, 1)
    assert float(live) == pytest.approx(0.005)
    assert isinstance(new["scheduler"].base_lrs[0], torch.Tensor)


def test_a_rate_that_became_a_tensor_is_no_other_rate() -> None:
    assert changed_options(describe_options(build()), describe_options(build(lr=torch.tensor(0.1)))) == []


def groups(first: float, second: float, *, swapped: bool = False) -> OBJECTS:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    listed = [{"params": model[0].parameters(), "lr": first}, {"params": model[1].parameters(), "lr": second}]
    return {"model": model, "optimizer": SGD(listed[::-1] if swapped else listed)}


def test_groups_are_compared_by_their_parameters_and_named() -> None:
    old = groups(0.1, 0.2)
    saved = describe_options(old)
    new = groups(0.1, 0.3, swapped=True)
    changes = resumed(old, saved, new).applied
    assert changes == [
        OptionChange("optimizer", "lr", 0.2, 0.3, group=0, group_name="model/1.bias, …"),
    ]
    assert [group["lr"] for group in new["optimizer"].param_groups] == [0.3, 0.1]


def test_a_warm_up_that_has_changed_is_no_change_of_the_learning_rate() -> None:
    saved = describe_options(build(lambda o: LinearLR(o, 0.1)))
    changes = changed_options(saved, describe_options(build(lambda o: LinearLR(o, 0.2))))
    assert [str(change) for change in changes] == ["start_factor of scheduler: 0.1 -> 0.2"]


@pytest.mark.parametrize("name", [*SCHEDULES, "OneCycleLR", "CyclicLR"])
def test_where_nothing_differs_nothing_is_said_and_no_bit_changes(name: str, caplog: Any) -> None:
    schedule = SCHEDULES.get(name) or CHANGED[name][0]
    old = build(schedule, momentum=0.9)
    saved = json.loads(json.dumps(describe_options(old)))
    train(old, 5)
    new = build(schedule, momentum=0.9)
    with caplog.at_level(logging.INFO, "ckptmgr"):
        options = resumed(old, saved, new)
    assert caplog.text == ""
    assert options.applied == []
    assert options.in_force == saved
    for entry in ("optimizer", "scheduler"):
        assert repr(new[entry].state_dict()) == repr(old[entry].state_dict())
    assert train(new, 5) == train(old, 5)


def test_kept_options_are_named_at_every_resume_and_applied_ones_at_none(caplog: Any) -> None:
    old = build(lambda o: StepLR(o, 2, gamma=0.5))
    first = describe_options(old)
    train(old, 2)
    caplog.set_level(logging.INFO, "ckptmgr")
    for _ in range(2):
        kept = build(lambda o: StepLR(o, 2, gamma=0.5), lr=0.01)
        saved = resumed(old, first, kept, "keep").in_force
        assert caplog.messages == [
            "the checkpoint's options stay in force: learning rate of optimizer: built with 0.01, the checkpoint was "
            "built with 0.1; kept at 0.05. on_changed_options='apply' goes on with this program's"
        ]
        assert kept["optimizer"].param_groups[0]["lr"] == 0.05
        old, first = kept, saved
        caplog.clear()
    applied = build(lambda o: StepLR(o, 2, gamma=0.5), lr=0.01)
    saved = resumed(old, first, applied).in_force
    assert caplog.messages == ["applied: learning rate of optimizer: 0.1 -> 0.01 (0.05 -> 0.005 at this point)"]
    caplog.clear()
    again = build(lambda o: StepLR(o, 2, gamma=0.5), lr=0.01)
    resumed(applied, saved, again)
    assert caplog.messages == []
    assert again["optimizer"].param_groups[0]["lr"] == pytest.approx(0.005)


def test_a_checkpoint_without_the_description_is_compared_with_nothing(caplog: Any) -> None:
    old = build()
    train(old, 1)
    new = build(lr=0.01)
    options = TrainingOptions(new, "apply")
    options.check(None, {})
    restore_state(new, capture_state(old))
    options.take_up(None)
    assert caplog.text == ""
    assert new["optimizer"].param_groups[0]["lr"] == 0.1


def test_what_was_used_before_is_not_described_and_what_makes_state_when_built_is() -> None:
    used = build(SCHEDULES["StepLR"])
    used["optimizer"] = AdamW(used["model"].parameters())
    used["scheduler"] = StepLR(used["optimizer"], 2)
    train(used, 1)
    assert describe_options(used) == {}
    assert describe_options(build(optimizer=Adagrad))["optimizer"]["groups"][0]["options"]["lr"] == 0.1
    adagrad = build(optimizer=Adagrad)
    train(adagrad, 1)
    assert describe_options(adagrad) == {}


def test_how_the_optimizer_computes_is_no_option_of_the_training_path() -> None:
    saved, live = describe_options(build(foreach=True)), describe_options(build(foreach=False))
    assert changed_options(saved, live) == []


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [(Adam, {}, {"amsgrad": True}), (RMSprop, {}, {"momentum": 0.9}), (RMSprop, {}, {"centered": True})],
)
def test_options_that_need_state_which_nobody_kept_are_refused(optimizer: Any, before: Any, after: Any) -> None:
    old = build(optimizer=optimizer, **before)
    saved = describe_options(old)
    train(old, 1)
    with pytest.raises(StateMismatchError, match="has not kept"):
        resumed(old, saved, build(optimizer=optimizer, **after))
    train(new := build(optimizer=SGD, momentum=0.9), 1)
    assert resumed(new, describe_options(build(momentum=0.9)), build(momentum=0.0)).applied != []


def test_a_schedule_that_would_have_ended_already_is_refused() -> None:
    old = build(lambda o: OneCycleLR(o, 0.1, total_steps=20), momentum=0.9)
    saved = describe_options(old)
    train(old, 12)
    with pytest.raises(StateMismatchError, match="stands at step 12 already"):
        resumed(old, saved, build(lambda o: OneCycleLR(o, 0.1, total_steps=10), momentum=0.9))


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="on_changed_options"):
        TrainingOptions({}, "aply")  # type: ignore[arg-type]


def test_a_scheduler_of_ones_own_is_scaled_and_its_options_count_from_the_next_step() -> None:
    class Halving(LRScheduler):
        def __init__(self, optimizer: Optimizer, every: int) -> None:
            self.every = every
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            share = 0.5 if self.last_epoch and self.last_epoch % self.every == 0 else 1.0
            return [group["lr"] * share for group in self.optimizer.param_groups]

    old = build(lambda o: Halving(o, 2))
    saved = describe_options(old)
    train(old, 4)
    new = build(lambda o: Halving(o, 3), lr=0.2)
    resumed(old, saved, new)
    assert [rate for rate, _ in train(new, 4)] == pytest.approx([0.05, 0.05, 0.025, 0.025])
    assert math.isclose(new["scheduler"].base_lrs[0], 0.2)
