"""Schedulers, scalers, generators, stateful objects and plain values; the registry; verify, then mutate."""

import copy
import random
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from saved_state import bits, reader_of, restored, saved
from torch import nn
from torch.optim import lr_scheduler as schedules

from ckptmgr.errors import StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.state.capture import capture_state, check_state, dry_check, restore_state
from ckptmgr.state.handlers import HandlerRegistry
from ckptmgr.state.read_entries import load_entries
from ckptmgr.state.snapshot import SnapshotBuffers


class Warmup:
    """A callable object with state, which torch saves; functions it does not."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / (1 + epoch)


def sequential(optimizer):
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=3), schedules.ExponentialLR(optimizer, 0.9)]
    return schedules.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 4]),
    "LambdaLR function": lambda o: schedules.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "LambdaLR object": lambda o: schedules.LambdaLR(o, Warmup()),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=20),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.1, 0.5, step_size_up=3),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 5),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 3), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


def rates(optimizer, scheduler, steps: int) -> list[float]:
    seen = []
    for step in range(steps):
        optimizer.step()
        scheduler.step(*([1.0 + step] if isinstance(scheduler, schedules.ReduceLROnPlateau) else []))
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_schedule_goes_on_where_it_was(name):
    def build():
        module = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
        return {"model": module, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer)}

    first, second = build(), build()
    rates(first["optimizer"], first["scheduler"], 4)
    restored(second, saved(first))
    assert rates(second["optimizer"], second["scheduler"], 6) == rates(first["optimizer"], first["scheduler"], 6)


def test_another_kind_of_schedule_is_refused_by_name():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(StateMismatchError, match=r"is SequentialLR\(LinearLR, ExponentialLR\), the live one StepLR"):
        check_state({"s": schedules.StepLR(optimizer, 1)}, saved({"s": sequential(optimizer)}))


def test_a_gradient_scaler_keeps_its_scale_and_an_enabled_one_wants_a_scale():
    scaler, live = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
    restored({"scaler": live}, saved({"scaler": scaler}))
    assert live.state_dict() == scaler.state_dict()
    with pytest.raises(StateMismatchError, match="holds no scale"):
        check_state({"scaler": live}, saved({"scaler": torch.amp.GradScaler("cpu", enabled=False)}))


@pytest.mark.parametrize(
    ("build", "draw"),
    [
        (lambda seed: torch.Generator().manual_seed(seed), lambda g: torch.rand(3, generator=g).tolist()),
        (np.random.default_rng, lambda g: g.random(3).tolist()),
        (random.Random, lambda g: g.random()),
    ],
)
def test_a_generator_draws_on(build, draw):
    first, second = build(0), build(1)
    draw(first)
    restored({"rng": second}, saved({"rng": first}))
    assert draw(second) == draw(first)


def test_plain_values_are_restored_into_the_objects_that_are_there(caplog):
    def build(fill: float) -> dict[str, Any]:
        return {
            "ema": torch.full((2, 3), fill),
            "nested": {"array": np.full(600, fill), "small": np.full(2, fill, dtype=np.int8)},
            "list": [torch.full((1,), fill), (torch.full((), fill), fill)],
            "history": deque([fill], maxlen=4),
            7: {"best": float("nan") if fill else 0.0},
        }

    source, live = build(2.0), build(0.0)
    source["history"].append(3)
    source["list"].append("new")
    live["gone"] = 1
    ema, array, nested, first = live["ema"], live["nested"]["array"], live["nested"], live["list"][0]
    restored({"extra": live}, saved({"extra": source}))
    assert "removed from the restored dict: 'gone'" in caplog.text
    assert live["ema"] is ema
    assert bits(ema) == bits(source["ema"])
    assert live["nested"] is nested
    assert live["nested"]["array"] is array
    assert (array == 2).all()
    assert nested["small"].dtype == np.int8
    assert live["history"] == deque([2.0, 3], maxlen=4)
    # A list that has grown is replaced as a whole, one of the same length keeps its tensors.
    assert live["list"][2] == "new"
    assert live["list"][0] is not first
    assert np.isnan(live[7]["best"])
    assert "gone" not in live


@pytest.mark.parametrize(
    "pair",
    [
        (torch.zeros(3), torch.ones(3)),
        (np.zeros(3), np.ones(3)),
        ([1, 2], [3, 4]),
        (OrderedDict(a=1), OrderedDict(b=(1, 2))),
        ({1, 2}, {3}),
    ],
)
def test_values_that_stand_alone_are_restored_in_place(pair):
    live, source = copy.deepcopy(pair)
    restored({"value": live}, saved({"value": source}))
    assert bits(live) == bits(source) if not isinstance(live, np.ndarray) else (live == source).all()


def test_a_tensor_in_a_dict_that_changed_shape_is_refused_and_nothing_is_touched():
    live = {"a": {"ema": torch.zeros(2), "n": 0}}
    with pytest.raises(
        StateMismatchError, match=r"shape of 'a/ema' is float32 \(3,\) in the checkpoint, float32 \(2,\) n"
    ):
        restored({"extra": live}, saved({"extra": {"a": {"ema": torch.ones(3), "n": 1}}}))
    assert live["a"]["n"] == 0


class Counter:
    def __init__(self, count: int = 0, *, fails: bool = False) -> None:
        self.count, self.weights, self.fails = count, torch.full((2,), float(count)), fails

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state.pop("count")
        if self.fails and self.count == 5:
            raise ValueError("five is right out")
        self.weights = state.pop("weights")


def test_any_stateful_object_is_captured():
    live = Counter()
    restored({"counter": live}, saved({"counter": Counter(3)}))
    assert (live.count, live.weights.tolist()) == (3, [3.0, 3.0])


def test_a_restore_that_fails_halfway_leaves_everything_as_it_was():
    def build(count: int, *, fails: bool = False) -> dict[str, Any]:
        torch.manual_seed(count)
        module = nn.Linear(2, 2)
        return {
            "model": module,
            "optimizer": torch.optim.SGD(module.parameters(), lr=0.1 + count),
            "first": Counter(count),
            "second": Counter(count, fails=fails),
            "values": {"count": count},
        }

    def seen(state: dict[str, Any]) -> Any:
        counters = [(state[name].count, state[name].weights.tolist()) for name in ("first", "second")]
        return bits([state["model"].state_dict(), state["optimizer"].state_dict(), counters, state["values"]])

    live = build(1, fails=True)
    before = seen(live)
    with pytest.raises(StateMismatchError, match="'second' refused its state") as caught:
        restored(live, saved(build(5)))
    assert "five is right out" in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    assert seen(live) == before


def test_entries_that_only_one_side_has_are_named():
    with pytest.raises(StateMismatchError) as caught:
        check_state({"a": {}, "c": {}}, saved({"a": {}, "b": {}}))
    assert "the checkpoint has no 'c'" in str(caught.value)
    assert "the live state has no 'b'" in str(caught.value)


def test_every_entry_that_does_not_fit_is_in_the_one_error():
    live = {"a": {"x": torch.zeros(1)}, "b": nn.Linear(1, 1)}
    with pytest.raises(StateMismatchError, match="2 parts") as caught:
        check_state(live, saved({"a": {"x": torch.zeros(2)}, "b": nn.Linear(1, 2)}))
    assert "'x'" in str(caught.value)
    assert "'weight'" in str(caught.value)


def test_another_kind_of_object_under_the_same_name_is_refused():
    with pytest.raises(StateMismatchError, match="captured by the handler 'values', and is a Linear now"):
        check_state({"a": nn.Linear(1, 1)}, saved({"a": {"weight": 1}}))


@pytest.mark.parametrize("value", [3, 1.5, "text", None, True, (1, 2)])
def test_values_that_cannot_change_in_place_are_refused_with_a_hint(value):
    with pytest.raises(UnsupportedStateError, match=r"state\['epoch'\].*\n.*\n  next: put it into a dict"):
        capture_state({"epoch": value}, registry=HandlerRegistry())


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"fn": {"inner": len}}, "extra/fn/inner is a builtins.builtin_function_or_method"),
        ({"net": nn.Linear(1, 1)}, "extra/net is a torch.nn.modules.linear.Linear inside of plain values"),
        ([1, object()], "extra/1 is a builtins.object"),
    ],
)
def test_what_nobody_can_store_fails_at_the_first_capture_with_its_path(value, path):
    entries = capture_state({"extra": value}, registry=HandlerRegistry())
    with pytest.raises(UnsupportedStateError, match=path):
        dry_check(entries)


def test_an_object_that_nobody_handles_says_how_to_register_a_handler():
    with pytest.raises(UnsupportedStateError, match=r"ckptmgr.register_handler") as caught:
        capture_state({"thing": object()}, registry=HandlerRegistry())
    assert "state['thing'] is a builtins.object" in str(caught.value)


class Box:
    def __init__(self, content: int) -> None:
        self.content = content


class BoxHandler:
    name = "test-box"
    version = 1

    def handles(self, value):
        return isinstance(value, Box)

    def capture(self, value, names):
        return {"content": value.content}

    def check(self, value, tree, names):
        if not isinstance(tree["content"], int):
            raise StateMismatchError("no number")

    def restore(self, value, tree, names):
        value.content = tree["content"]


def test_a_registered_handler_is_asked_first_and_recorded():
    registry = HandlerRegistry()
    registry.register(BoxHandler())
    live = Box(0)
    reader = reader_of({"box": Box(5)}, registry=registry)
    assert reader.manifest.entries[0].handler == "test-box"
    restore_state({"box": live}, load_entries(reader), registry=registry)
    assert live.content == 5


def test_a_checkpoint_of_another_handler_version_is_refused():
    registry = HandlerRegistry()
    handler = BoxHandler()
    registry.register(handler)
    entries = saved({"box": Box(5)}, registry=registry)
    handler.version = 2
    with pytest.raises(StateMismatchError, match="captured by version 1 of the handler 'test-box'"):
        check_state({"box": Box(0)}, entries, registry=registry)


def test_the_first_capture_closes_the_registry():
    registry = HandlerRegistry()
    known = BoxHandler()
    registry.register(known)
    capture_state({"a": {}}, registry=registry)
    registry.register(known)
    with pytest.raises(UsageError, match="too late"):
        registry.register(BoxHandler())


def test_installed_packages_may_bring_handlers_and_the_program_overrides_them(monkeypatch):
    class Installed(BoxHandler):
        name = "installed-box"

    point = SimpleNamespace(name="boxes", load=lambda: Installed)
    monkeypatch.setattr("ckptmgr.state.handlers.entry_points", lambda *, group: [point])
    registry = HandlerRegistry()
    assert registry.find("box", Box(1)).name == "installed-box"
    registry.register(BoxHandler())
    assert registry.find("box", Box(1)).name == "test-box"


@pytest.mark.parametrize("name", ["module", "test-box"])
def test_a_handlers_name_is_taken_once(name):
    registry = HandlerRegistry()
    registry.register(BoxHandler())
    second = BoxHandler()
    second.name = name
    with pytest.raises(UsageError, match="is taken"):
        registry.register(second)
    with pytest.raises(UsageError, match="is not a state handler"):
        registry.register(object())


def test_only_the_named_entries_are_read():
    reader = reader_of({"a": {"x": torch.zeros(2)}, "b": {"y": torch.ones(2)}})
    assert set(load_entries(reader, ["b", "unknown"])) == {"b"}


def test_the_dry_check_copies_nothing_and_finds_what_would_change():
    class Text(str):
        __slots__ = ()

    with pytest.raises(UnsupportedStateError, match="a/t"):
        dry_check(capture_state({"a": {"t": Text("x")}}, registry=HandlerRegistry()))
    assert SnapshotBuffers().nbytes == 0
