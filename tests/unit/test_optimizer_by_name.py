"""Optimizer state follows the parameters' names: into another order, other groups, another set of parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_state import bits, restored, saved
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, ReduceLROnPlateau, StepLR

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.capture import check_state
from ckptmgr.state.training_options import TrainingOptions

Build = Callable[[Any], Optimizer]


class Net(nn.Module):
    """Four layers of the same shapes: by number, everything fits everywhere."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).tanh() + 2 * self.b(x).tanh() + self.c(x) ** 2 - self.d(x)

    def pick(self, names: Iterable[str]) -> list[nn.Parameter]:
        known = dict(self.named_parameters())
        return [known[name] for name in names]


NAMES = [name for name, _ in Net().named_parameters()]


def train(module: nn.Module, optimizer: Optimizer, steps: int = 3, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(torch.randn(5, 3, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(build: Build, groups: Any = None) -> tuple[Net, Optimizer]:
    module = Net()
    optimizer = build(grouped(module, groups or [NAMES]))
    train(module, optimizer)
    return module, optimizer


def grouped(module: Net, groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Make groups of lists of names, or of pairs of such a list with options."""
    pairs = ((group, {}) if isinstance(group, list) else group for group in groups)
    return [{"params": module.pick(names), **options} for names, options in pairs]


def carried(module: Net, optimizer: Optimizer, build: Build, groups: Any) -> tuple[Net, Optimizer]:
    """Save, and restore into a fresh program with other groups."""
    live = Net(seed=5)
    other = build(grouped(live, groups))
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    return live, other


def state_of(module: Net, optimizer: Optimizer) -> dict[str, Any]:
    return {name: bits(optimizer.state[p]) for name, p in module.named_parameters() if p in optimizer.state}


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "ckptmgr"]


@pytest.fixture(autouse=True)
def listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ckptmgr")


# Another order


def test_the_silent_moment_swap_of_other_checkpointers_does_not_happen_here() -> None:
    module, optimizer = trained(AdamW)
    swapped = ["b.weight", "a.bias", "a.weight", *NAMES[3:]]
    live, other = carried(module, optimizer, AdamW, [swapped])
    assert state_of(live, other) == state_of(module, optimizer)


@pytest.mark.parametrize("named", [False, True])
def test_torchs_own_loading_swaps_the_moments_without_a_word(named: bool) -> None:
    # What the test above protects from, also with named_parameters().
    module, optimizer = trained(AdamW)
    live = Net(seed=5)
    known = dict(live.named_parameters())
    order = ["b.weight", "a.bias", "a.weight", *NAMES[3:]]
    other = AdamW([(name, known[name]) for name in order] if named else [known[name] for name in order])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, after = state_of(module, optimizer), state_of(live, other)
    assert after["a.weight"] == before["b.weight"] != before["a.weight"]


def test_nothing_is_said_where_all_is_carried_in_place(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer = trained(AdamW, [NAMES[:4], NAMES[4:]])
    carried(module, optimizer, AdamW, [NAMES[:4], NAMES[4:]])
    assert said(caplog) == []


def test_another_order_is_told_as_news_and_not_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer = trained(AdamW)
    carried(module, optimizer, AdamW, [NAMES[::-1]])
    assert said(caplog) == [(logging.INFO, "optimizer AdamW: state carried by name for 8 of 8 parameters")]


def test_training_goes_on_bit_by_bit_after_another_order_and_other_groups() -> None:
    module, optimizer = trained(AdamW)
    live, other = carried(module, optimizer, AdamW, [NAMES[5:], NAMES[:5][::-1]])
    assert train(live, other, seed=4) == train(module, optimizer, seed=4)
    assert state_of(live, other) == state_of(module, optimizer)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_moments_are_carried_whatever_the_order_the_groups_and_what_is_frozen(data: st.DataObject) -> None:
    def partition() -> list[list[str]]:
        order = data.draw(st.permutations(NAMES))
        chosen = order[: data.draw(st.integers(1, len(order)))]
        groups: dict[int, list[str]] = {}
        for name in chosen:
            groups.setdefault(data.draw(st.integers(0, 3)), []).append(name)
        return list(groups.values())

    before, after = partition(), partition()
    module, optimizer = trained(AdamW, before)
    was, now = ({name for group in groups for name in group} for groups in (before, after))
    if not was & now:
        with pytest.raises(StateMismatchError, match="no parameter of the live optimizer"):
            carried(module, optimizer, AdamW, after)
        return
    live, other = carried(module, optimizer, AdamW, after)
    expected = state_of(module, optimizer)
    assert state_of(live, other) == {name: expected[name] for name in NAMES if name in was & now}
    train(live, other, steps=1)
    assert set(state_of(live, other)) == now


# Other parameters


def test_a_frozen_parameter_is_dropped_and_an_unfrozen_one_starts_empty(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer = trained(AdamW, [NAMES[:6]])
    live, other = carried(module, optimizer, AdamW, [NAMES[2:]])
    expected = state_of(module, optimizer)
    assert state_of(live, other) == {name: expected[name] for name in NAMES[2:6]}
    assert said(caplog) == [
        (
            logging.WARNING,
            "optimizer AdamW: state carried by name for 4 of 6 parameters; initialised for 2 (model/d.weight, "
            "model/d.bias), which the checkpoint has not; dropped for 2 (model/a.weight, model/a.bias), which the live "
            "optimizer has not",
        )
    ]
    train(live, other, steps=1)
    assert other.state[live.d.bias]["step"] == 1
    assert other.state[live.b.bias]["step"] == 4


def test_long_lists_of_names_are_counted_and_cut(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer = trained(AdamW)
    carried(module, optimizer, AdamW, [NAMES[:3]])
    assert "dropped for 5 (model/b.bias, model/c.weight, model/c.bias, …)" in said(caplog)[0][1]


def test_no_step_is_taken_to_make_state(monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = trained(AdamW, [NAMES[:4]])
    entries = saved({"model": module, "optimizer": optimizer})
    live = Net(seed=5)
    other = AdamW(live.parameters())
    monkeypatch.setattr(AdamW, "step", lambda *_: pytest.fail("a step was taken"))
    rng = torch.get_rng_state()
    restored({"model": live, "optimizer": other}, entries)
    assert torch.equal(rng, torch.get_rng_state())


def test_state_that_an_optimizer_makes_when_it_is_built_stays_for_new_parameters() -> None:
    def build(params: Any) -> Optimizer:
        return torch.optim.Adagrad(params, initial_accumulator_value=0.5)

    module, optimizer = trained(build, [NAMES[:4]])
    live, other = carried(module, optimizer, build, [NAMES])
    assert torch.equal(other.state[live.d.bias]["sum"], torch.full((3,), 0.5))
    assert state_of(live, other)["a.weight"] == state_of(module, optimizer)["a.weight"]
    train(live, other)


def test_a_parameter_that_had_no_gradient_yet_has_no_state_afterwards_either(caplog: pytest.LogCaptureFixture) -> None:
    module = Net()
    module.a.weight.requires_grad_(False)
    optimizer = AdamW(module.parameters())
    train(module, optimizer)
    live = Net(seed=5)
    other = AdamW(live.parameters())
    train(live, other)
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert state_of(live, other) == state_of(module, optimizer)
    assert said(caplog) == []


def test_a_model_whose_names_are_all_others_is_refused() -> None:
    module, optimizer = trained(AdamW)
    with pytest.raises(StateMismatchError, match="no parameter of the live optimizer is in the checkpoint's") as caught:
        check_state({"net": module, "optimizer": AdamW(module.parameters())}, saved_as(module, optimizer))
    assert "'optimizer'" in str(caught.value)


def saved_as(module: Net, optimizer: Optimizer) -> dict[str, Any]:
    entries = saved({"model": module, "optimizer": optimizer})
    return {"net": entries["model"], "optimizer": entries["optimizer"]}


def test_every_shape_that_differs_is_told_and_nothing_is_changed() -> None:
    module, optimizer = trained(AdamW)
    live = Net(seed=5)
    live.a, live.c = nn.Linear(3, 4), nn.Linear(3, 4)
    other = AdamW(live.parameters())
    entries = saved({"model": module, "optimizer": optimizer})
    before = bits(other.state_dict())
    with pytest.raises(StateMismatchError) as caught:
        check_state({"model": live, "optimizer": other}, entries)
    for name in ("a.weight", "a.bias", "c.weight", "c.bias"):
        assert f"'model/{name}' was float32" in str(caught.value)
    assert bits(other.state_dict()) == before


def test_a_failure_later_on_puts_everything_back() -> None:
    class Fails:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: Any) -> None:
            raise RuntimeError("no")

    module, optimizer = trained(AdamW)
    live = Net(seed=5)
    other = AdamW(grouped(live, [NAMES[6:], NAMES[:4]]), lr=0.5)
    train(live, other)
    before, groups = bits(other.state_dict()), [dict(group) for group in other.param_groups]
    with pytest.raises(StateMismatchError, match="refused"):
        restored(
            {"model": live, "optimizer": other, "last": Fails()},
            saved({"model": module, "optimizer": optimizer, "last": Fails()}),
        )
    assert bits(other.state_dict()) == before
    assert [dict(group) for group in other.param_groups] == groups


# Groups


def test_a_group_that_was_split_gives_both_parts_its_options() -> None:
    module, optimizer = trained(lambda p: AdamW(p, lr=0.5, weight_decay=0.25))
    _, other = carried(module, optimizer, AdamW, [NAMES[:3], (NAMES[3:], {"lr": 7.0})])
    assert [(group["lr"], group["weight_decay"]) for group in other.param_groups] == [(0.5, 0.25)] * 2


def test_groups_that_were_merged_take_the_options_of_the_majority_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer = trained(SGD, [(NAMES[:3], {"lr": 0.1}), (NAMES[3:], {"lr": 0.2})])
    _, other = carried(module, optimizer, SGD, [NAMES])
    assert [group["lr"] for group in other.param_groups] == [0.2]
    assert said(caplog) == [
        (logging.INFO, "optimizer SGD: state carried by name for 8 of 8 parameters"),
        (
            logging.WARNING,
            "optimizer SGD: group 0 mixes parameters of the checkpoint's groups 1 (5) and 0 (3): it goes on with the "
            "options of group 1, lr=0.2 and not 0.1",
        ),
    ]


def test_merged_groups_of_the_same_options_need_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer = trained(AdamW, [NAMES[:3], NAMES[3:]])
    carried(module, optimizer, AdamW, [NAMES])
    assert [level for level, _ in said(caplog)] == [logging.INFO]


def test_a_group_of_new_parameters_keeps_the_programs_options() -> None:
    module, optimizer = trained(lambda p: AdamW(p, lr=0.5), [NAMES[:4]])
    _, other = carried(module, optimizer, AdamW, [(NAMES[4:], {"lr": 0.125}), NAMES[:4]])
    assert [group["lr"] for group in other.param_groups] == [0.125, 0.5]


def test_names_of_groups_are_the_programs() -> None:
    module, optimizer = trained(AdamW, [(NAMES, {"name": "all"})])
    _, other = carried(module, optimizer, AdamW, [(NAMES[:3], {"name": "first"}), (NAMES[3:], {"name": "last"})])
    assert [group["name"] for group in other.param_groups] == ["first", "last"]


def test_param_names_stay_in_the_live_order() -> None:
    module, optimizer = Net(), None
    optimizer = AdamW(module.named_parameters())
    train(module, optimizer)
    live = Net(seed=5)
    order = list(live.named_parameters())[::-1]
    other = AdamW([{"params": order[:3]}, {"params": order[3:]}])
    restored({"optimizer": other}, saved({"optimizer": optimizer}))
    assert state_of(live, other) == state_of(module, optimizer)
    assert [group["param_names"] for group in other.param_groups] == [NAMES[:4:-1], NAMES[4::-1]]


def test_a_slot_that_the_new_group_needs_and_nobody_kept_is_refused() -> None:
    groups = [(NAMES[:2], {"amsgrad": False}), (NAMES[2:], {"amsgrad": True})]
    module, optimizer = trained(AdamW, groups)
    live = Net(seed=5)
    entries = saved({"model": module, "optimizer": optimizer})
    with pytest.raises(StateMismatchError) as caught:
        check_state({"model": live, "optimizer": AdamW(live.parameters())}, entries)
    assert "'model/a.weight' came into a group whose options need 'max_exp_avg_sq'" in str(caught.value)
    assert "'model/a.bias' came" in str(caught.value)


def test_state_of_a_new_parameter_that_does_not_fit_the_options_in_force_begins_anew() -> None:
    module, optimizer = trained(lambda p: AdamW(p, amsgrad=True), [NAMES[:4]])
    live = Net(seed=5)
    other = AdamW(live.parameters())
    train(live, other)
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert set(state_of(live, other)) == set(NAMES[:4])
    train(live, other)


def test_a_slot_that_the_new_group_has_no_use_for_is_dropped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    groups = [(NAMES[:2], {"momentum": 0.9}), (NAMES[2:], {"momentum": 0.0})]
    module, optimizer = trained(lambda p: SGD(p, lr=0.1), groups)
    live, other = carried(module, optimizer, lambda p: SGD(p, lr=0.1), [NAMES])
    assert not any(other.state[p] for p in live.parameters())
    told = "optimizer SGD: momentum_buffer dropped, for their group has no use for it: 2 (model/a.weight, model/a.bias)"
    assert (logging.WARNING, told) in said(caplog)


def test_momentum_begins_anew_where_the_new_group_has_it(caplog: pytest.LogCaptureFixture) -> None:
    groups = [(NAMES[:2], {"momentum": 0.0}), (NAMES[2:], {"momentum": 0.9})]
    module, optimizer = trained(lambda p: SGD(p, lr=0.1), groups)
    live, other = carried(module, optimizer, lambda p: SGD(p, lr=0.1), [NAMES])
    told = "optimizer SGD: momentum_buffer initialised, for the checkpoint has none: 2 (model/a.weight, model/a.bias)"
    assert (logging.WARNING, told) in said(caplog)
    train(live, other)
    assert "momentum_buffer" in other.state[live.a.weight]


# Schedulers


def lambdas(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda epoch: 0.5**epoch)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambdas,
    "StepLR": lambda o: StepLR(o, 1, 0.5),
    "ChainedScheduler": lambda o: ChainedScheduler([lambdas(o)]),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("scheduler_first", [False, True])
def test_base_rates_follow_groups_that_changed_places(name: str, scheduler_first: bool) -> None:
    def program(flipped: bool) -> tuple[SGD, dict[str, Any]]:
        model = Net()
        groups = grouped(model, [(NAMES[:3], {"lr": 0.8}), (NAMES[3:], {"lr": 0.1})])
        optimizer = SGD(groups[::-1] if flipped else groups)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": SCHEDULES[name](optimizer)}
        return optimizer, dict(reversed(state.items())) if scheduler_first else state

    optimizer, state = program(False)
    optimizer.step()
    state["scheduler"].step()
    other, live = program(True)
    restored(live, saved(state))
    for one, scheduler in ((optimizer, state["scheduler"]), (other, live["scheduler"])):
        one.step()
        scheduler.step()
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups][::-1]
    assert live["scheduler"].get_last_lr() == pytest.approx([0.025, 0.2])


def test_schedules_of_split_and_merged_groups_go_on() -> None:
    module = Net()
    optimizer = SGD(grouped(module, [(NAMES[:3], {"lr": 0.8}), (NAMES[3:], {"lr": 0.1})]))
    scheduler = lambdas(optimizer)
    plateau = ReduceLROnPlateau(optimizer, min_lr=[0.01, 0.02])
    optimizer.step()
    scheduler.step()
    entries = saved({"model": module, "optimizer": optimizer, "scheduler": scheduler, "plateau": plateau})
    live = Net()
    other = SGD(grouped(live, [NAMES[4:], NAMES[:2], NAMES[2:4]]), lr=1.0)
    state = {"scheduler": lambdas(other), "plateau": ReduceLROnPlateau(other, min_lr=[0, 0, 0])}
    restored({"model": live, "optimizer": other, **state}, entries)
    assert state["scheduler"].base_lrs == [0.1, 0.8, 0.8]
    assert state["plateau"].min_lrs == [0.02, 0.01, 0.01]
    other.step()
    state["scheduler"].step()
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.025, 0.2, 0.2])


def test_split_groups_whose_scheduler_comes_first_are_refused_with_what_to_do() -> None:
    module = Net()
    optimizer = SGD(grouped(module, [NAMES]), lr=0.1)
    entries = saved({"scheduler": lambdas(optimizer), "model": module, "optimizer": optimizer})
    live = Net()
    other = SGD(grouped(live, [NAMES[:3], NAMES[3:]]), lr=0.1)
    with pytest.raises(StateMismatchError, match="drives 1 parameter groups, the live one 2") as caught:
        check_state({"scheduler": lambdas(other), "model": live, "optimizer": other}, entries)
    assert "put it into the state before its scheduler" in str(caught.value)


def test_a_schedule_over_a_group_of_new_parameters_is_refused() -> None:
    module = Net()
    optimizer = SGD(grouped(module, [NAMES[:3]]), lr=0.1)
    entries = saved({"model": module, "optimizer": optimizer, "scheduler": lambdas(optimizer)})
    live = Net()
    other = SGD(grouped(live, [NAMES[:3], NAMES[3:]]), lr=0.1)
    with pytest.raises(StateMismatchError, match="group 1 of the optimizer that the scheduler drives"):
        check_state({"model": live, "optimizer": other, "scheduler": lambdas(other)}, entries)


# Adam and AdamW


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("first", "second"), [(Adam, AdamW), (AdamW, Adam)])
def test_adam_and_adamw_go_on_with_each_others_moments(
    first: Any, second: Any, amsgrad: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module, optimizer = trained(lambda p: first(p, lr=0.5, betas=(0.8, 0.9), amsgrad=amsgrad, weight_decay=0.3))
    live, other = carried(module, optimizer, lambda p: second(p, amsgrad=amsgrad), [NAMES[::-1]])
    assert state_of(live, other) == state_of(module, optimizer)
    (group,) = other.param_groups
    fresh = second(Net().parameters()).param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.8, 0.9))
    for option in ("weight_decay", "decoupled_weight_decay"):
        assert group[option] == fresh[option]
    level, text = said(caplog)[0]
    assert level == logging.WARNING
    assert f"it goes on with the moments and steps of {first.__name__}" in text
    assert f"weight_decay={fresh['weight_decay']} (0.3 in the checkpoint)" in text
    train(live, other)


def test_where_both_decouple_the_decay_it_is_the_checkpoints() -> None:
    module, optimizer = trained(lambda p: Adam(p, weight_decay=0.3, decoupled_weight_decay=True))
    live, other = carried(module, optimizer, AdamW, [NAMES])
    assert other.param_groups[0]["weight_decay"] == 0.3
    assert train(live, other) == train(module, optimizer)


def test_moments_of_a_third_slot_are_not_taken_for_adams() -> None:
    module, optimizer = trained(Adam)
    optimizer.state[module.a.weight]["prodigy"] = torch.zeros(1)
    with pytest.raises(StateMismatchError, match="of another kind"):
        carried(module, optimizer, AdamW, [NAMES])


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, SGD])
def test_other_kinds_are_refused(kind: Any) -> None:
    module, optimizer = trained(AdamW)
    with pytest.raises(StateMismatchError, match=f"AdamW, the live one {kind.__name__}"):
        carried(module, optimizer, kind, [NAMES])


# Implementation switches


@pytest.mark.parametrize("live_options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("saved_options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_kernels_are_the_programs_and_step_is_what_they_want(saved_options: Any, live_options: Any) -> None:
    module, optimizer = trained(lambda p: AdamW(p, **saved_options))
    live, other = carried(module, optimizer, lambda p: AdamW(p, **live_options), [NAMES])
    (group,) = other.param_groups
    assert all(group[key] == value for key, value in live_options.items())
    fresh = AdamW(Net().parameters(), **live_options)
    train(Net(), fresh, steps=0)
    step = other.state[live.a.weight]["step"]
    assert (step.dtype, step.device.type, step.item()) == (torch.float32, "cpu", 3.0)
    train(live, other)


@pytest.mark.parametrize("live_options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_a_double_step_becomes_what_the_live_kernel_has(live_options: Any) -> None:
    module, optimizer = trained(AdamW)
    for slots in optimizer.state.values():
        slots["step"] = slots["step"].double()
    live, other = carried(module, optimizer, lambda p: AdamW(p, **live_options), [NAMES])
    assert other.state[live.a.weight]["step"].dtype == torch.float32
    train(live, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("live_options", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("saved_device", ["cpu", "cuda"])
@pytest.mark.parametrize("live_device", ["cpu", "cuda"])
def test_steps_and_moments_go_to_the_live_device(saved_device: str, live_device: str, live_options: Any) -> None:
    if live_device == "cpu" and "capturable" in live_options:
        pytest.skip("torch captures no graphs on a CPU")
    module, live = Net().to(saved_device), Net(seed=5).to(live_device)
    optimizer, other, fresh = (
        AdamW(module.parameters()),
        AdamW(live.parameters(), **live_options),
        Net().to(live_device),
    )
    reference = AdamW(fresh.parameters(), **live_options)
    for one, trainee in ((module, optimizer), (fresh, reference)):
        one(torch.ones(2, 3, device=one.a.weight.device)).square().mean().backward()
        trainee.step()
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert state_of(live, other) == state_of(module, optimizer)
    for slot, value in reference.state[fresh.a.weight].items():
        carried_value = other.state[live.a.weight][slot]
        assert (carried_value.device, carried_value.dtype) == (value.device, value.dtype)


def test_a_step_that_is_a_number_becomes_a_tensor() -> None:
    # As torch before 1.12 kept it.
    module, optimizer = trained(AdamW)
    for slots in optimizer.state.values():
        slots["step"] = 3
    live, other = carried(module, optimizer, AdamW, [NAMES[::-1]])
    assert bits(other.state[live.a.weight]["step"]) == bits(torch.tensor(3.0))
    train(live, other)


def test_what_changes_the_mathematics_comes_from_the_checkpoint() -> None:
    module, optimizer = trained(lambda p: AdamW(p, maximize=True))
    _, other = carried(module, optimizer, AdamW, [NAMES])
    assert other.param_groups[0]["maximize"] is True


@pytest.mark.parametrize("now", [True, False])
def test_tensor_options_follow_the_live_kind(now: bool) -> None:
    def build(tensors: bool) -> Build:
        def make(params: Any) -> Optimizer:
            if tensors:
                betas = (torch.tensor(0.5), torch.tensor(0.75))
                return AdamW(params, lr=torch.tensor(0.25), betas=betas, foreach=False)
            return AdamW(params, lr=0.125, betas=(0.9, 0.99))

        return make

    module, optimizer = trained(build(not now))
    live = Net(seed=5)
    other = build(now)(grouped(live, [NAMES]))
    (group,) = other.param_groups
    before = group["lr"], *group["betas"]
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    (group,) = other.param_groups
    after = group["lr"], *group["betas"]
    was = optimizer.param_groups[0]
    assert [float(value) for value in after] == pytest.approx([float(was["lr"]), *map(float, was["betas"])])
    assert all(isinstance(value, torch.Tensor) == now for value in after)
    assert not now or all(one is other for one, other in zip(before, after, strict=True))
    train(live, other)


# Kinds of state


KINDS = ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Adafactor", "SGD"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_optimizer_goes_on_bit_by_bit_in_another_order(name: str) -> None:
    kind = getattr(torch.optim, name)
    module, optimizer = trained(kind)
    live, other = carried(module, optimizer, kind, [NAMES[3:][::-1], NAMES[:3]])
    assert state_of(live, other) == state_of(module, optimizer)
    assert train(live, other) == train(module, optimizer)


def test_factored_state_goes_with_its_parameter() -> None:
    module, optimizer = trained(torch.optim.Adafactor)
    live, other = carried(module, optimizer, torch.optim.Adafactor, [NAMES[4:], NAMES[1:4][::-1]])
    expected = state_of(module, optimizer)
    assert set(other.state[live.b.weight]) == {"step", "row_var", "col_var"}
    assert state_of(live, other) == {name: expected[name] for name in NAMES[1:]}
    train(live, other)


class EightBit(Optimizer):
    """Keeps its moment as bytes with a scale for every block of four, as 8-bit optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                slots, nblocks = self.state[p], -(-p.numel() // 4)
                if not slots:
                    slots["state1"] = torch.full((nblocks, 4), 128, dtype=torch.uint8)
                    slots["absmax1"] = torch.zeros(nblocks)
                    slots["step"] = 0
                moment = ((slots["state1"].float() - 128) / 127 * slots["absmax1"][:, None]).reshape(-1)[: p.numel()]
                moment = 0.9 * moment + p.grad.reshape(-1)
                blocks = torch.zeros(nblocks * 4)
                blocks[: p.numel()] = moment
                blocks = blocks.reshape(nblocks, 4)
                slots["absmax1"] = blocks.abs().amax(dim=1)
                scale = slots["absmax1"].clamp(min=1e-12)[:, None]
                slots["state1"] = (blocks / scale * 127 + 128).round().to(torch.uint8)
                slots["step"] += 1
                p.sub_(group["lr"] * moment.reshape(p.shape))


def test_eight_bit_state_stays_eight_bit() -> None:
    module, optimizer = trained(EightBit)
    live, other = carried(module, optimizer, EightBit, [NAMES[4:][::-1], NAMES[:4]])
    assert state_of(live, other) == state_of(module, optimizer)
    assert other.state[live.a.weight]["state1"].dtype == torch.uint8
    assert train(live, other) == train(module, optimizer)


def test_moments_take_the_memory_format_of_the_live_parameter() -> None:
    def build(seed: int, channels_last: bool) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        module = nn.Conv2d(3, 4, 3)
        if channels_last:
            module.to(memory_format=torch.channels_last)
        return module, AdamW(module.parameters(), amsgrad=True)

    for was in (True, False):
        module, optimizer = build(0, was)
        module(torch.ones(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        live, other = build(1, not was)
        restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
        moments = other.state[live.weight]
        for slot in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert moments[slot].stride() == live.weight.stride() != module.weight.stride()
            assert torch.equal(moments[slot], optimizer.state[module.weight][slot])


def test_complex_parameters_keep_complex_moments() -> None:
    def build() -> tuple[nn.ParameterDict, Optimizer]:
        module = nn.ParameterDict({n: nn.Parameter(torch.ones(3, dtype=torch.complex64) * 1j) for n in "ab"})
        return module, module  # type: ignore[return-value]

    module, live = build()[0], build()[0]
    optimizer = AdamW([module["a"], module["b"]])
    (module["a"].abs().sum() + 3 * module["b"].real.sum()).backward()
    optimizer.step()
    other = AdamW([live["b"], live["a"]])
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    for name in "ab":
        assert bits(other.state[live[name]]) == bits(optimizer.state[module[name]])
    assert other.state[live["a"]]["exp_avg"].dtype == torch.complex64


def test_two_optimizers_on_one_parameter_keep_their_own_state() -> None:
    module, live = Net(), Net(seed=5)
    adam, sgd = AdamW(module.parameters()), SGD(grouped(module, [NAMES[:3]]), lr=0.1, momentum=0.9)
    train(module, adam)
    train(module, sgd)
    other = AdamW(grouped(live, [NAMES[::-1]])), SGD(grouped(live, [NAMES[2::-1]]), lr=0.1, momentum=0.9)
    restored({"model": live, "a": other[0], "b": other[1]}, saved({"model": module, "a": adam, "b": sgd}))
    assert state_of(live, other[0]) == state_of(module, adam)
    assert state_of(live, other[1]) == state_of(module, sgd)


def test_flat_state_tells_which_parameters_make_the_difference() -> None:
    module = Net()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=2)
    optimizer.step(lambda: _backward(module, optimizer))
    with pytest.raises(StateMismatchError, match=r"only the checkpoint's has model/d\.bias"):
        carried_flat(module, optimizer, NAMES[:-1])


def carried_flat(module: Net, optimizer: Optimizer, names: list[str]) -> None:
    live = Net(seed=5)
    other = torch.optim.LBFGS(live.pick(names), max_iter=2)
    check_state({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))


def _backward(module: Net, optimizer: Optimizer) -> Any:
    optimizer.zero_grad()
    loss = module(torch.ones(2, 3)).square().mean()
    loss.backward()
    return loss


# Options as built


def resumed(old: dict[str, Any], new: dict[str, Any], described: Any, mode: Any) -> TrainingOptions:
    options = TrainingOptions(new, mode)
    entries = saved(old)
    options.check(described, {name: entry.tree for name, entry in entries.items()})
    restored(new, entries)
    options.take_up(described)
    return options


def program(groups: Any, kind: Any = SGD, **options: Any) -> tuple[dict[str, Any], Any]:
    module = Net()
    optimizer = kind(grouped(module, groups), **options)
    state = {"model": module, "optimizer": optimizer}
    return state, TrainingOptions(state, "keep").in_force


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(text for level, text in said(caplog) if level == logging.WARNING)


def test_changed_rates_of_split_groups_are_named_by_the_live_groups(caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES], lr=0.1)
    new, _ = program([NAMES[4:], (NAMES[:4], {"lr": 0.3})], lr=0.1)
    options = resumed(old, new, described, "keep")
    assert "learning rate of optimizer.1 (model/a.bias, …): built with 0.3" in warnings(caplog)
    assert "optimizer.0" not in warnings(caplog)
    assert [group["options"]["lr"] for group in options.in_force["optimizer"]["groups"]] == [0.1, 0.1]


def test_changed_rates_of_split_groups_are_applied(caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES], lr=0.1)
    old["optimizer"].param_groups[0]["lr"] = 0.05
    new, _ = program([NAMES[4:], (NAMES[:4], {"lr": 0.4})], lr=0.1)
    resumed(old, new, described, "apply")
    assert [group["lr"] for group in new["optimizer"].param_groups] == pytest.approx([0.05, 0.2])


@pytest.mark.parametrize("mode", ["keep", "apply"])
def test_what_has_no_counterpart_is_not_compared_and_that_is_said(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES[:4]], lr=0.1)
    new, _ = program([NAMES[:4], (NAMES[4:], {"lr": 0.7})], lr=0.1)
    resumed(old, new, described, mode)
    assert "not compared with the checkpoint's, which has no such parameters: group 1 of optimizer" in warnings(caplog)
    assert [group["lr"] for group in new["optimizer"].param_groups] == [0.1, 0.7]


@pytest.mark.parametrize("mode", ["keep", "apply"])
def test_options_that_a_scheduler_has_for_each_group_are_compared_by_the_live_groups(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    def build(groups: Any, rates: list[float]) -> tuple[dict[str, Any], Any]:
        state, _ = program(groups, lr=0.1)
        state["scheduler"] = ReduceLROnPlateau(state["optimizer"], min_lr=rates)
        return state, TrainingOptions(state, "keep").in_force

    old, described = build([NAMES[:3], NAMES[3:]], [0.01, 0.02])
    new, _ = build([NAMES[5:], NAMES[:3], NAMES[3:5]], [0.02, 0.01, 0.02])
    options = resumed(old, new, described, mode)
    assert warnings(caplog) == ""
    assert options.applied == []


def test_a_decay_that_means_another_thing_is_no_changed_option(caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES], Adam)
    new, _ = program([NAMES], AdamW)
    options = resumed(old, new, described, "keep")
    assert "stay in force" not in warnings(caplog)
    assert options.in_force["optimizer"]["groups"][0]["options"]["weight_decay"] == 0.01


def test_momentum_that_is_switched_off_takes_its_state_along(caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES], lr=0.1, momentum=0.9)
    train(old["model"], old["optimizer"])
    new, _ = program([NAMES], lr=0.1)
    resumed(old, new, described, "apply")
    assert not any(new["optimizer"].state.values())
    assert "momentum_buffer of 8 parameters of optimizer is dropped: momentum of optimizer: 0.9 -> 0" in warnings(
        caplog
    )
    train(new["model"], new["optimizer"])


def test_momentum_that_is_switched_on_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES], lr=0.1)
    train(old["model"], old["optimizer"])
    new, _ = program([NAMES], lr=0.1, momentum=0.9)
    resumed(old, new, described, "apply")
    assert "momentum_buffer of 8 parameters of optimizer is initialised" in warnings(caplog)
    train(new["model"], new["optimizer"])
    assert "momentum_buffer" in new["optimizer"].state[new["model"].a.bias]


def test_momentum_that_is_kept_goes_on_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    old, described = program([NAMES], lr=0.1, momentum=0.9)
    train(old["model"], old["optimizer"])
    new, _ = program([NAMES], lr=0.1)
    resumed(old, new, described, "keep")
    assert state_of(new["model"], new["optimizer"]) == state_of(old["model"], old["optimizer"])
    assert "momentum of optimizer: built with 0, the checkpoint was built with 0.9; kept" in warnings(caplog)
