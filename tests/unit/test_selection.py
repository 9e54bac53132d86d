"""What a selection restores, what it leaves as the program has built it, and what it refuses unchanged."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer, CorruptCheckpointError, Selection, StateMismatchError, UsageError
from ckptmgr.loading import load_checkpoint
from ckptmgr.loop_state import LoopObjects
from ckptmgr.run.reference import Reference
from ckptmgr.state.capture import capture_state
from ckptmgr.state.selected import select_state


class Net(nn.Module):
    def __init__(self, nclasses: int = 3, body: str = "body") -> None:
        super().__init__()
        self.add_module(body, nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)))
        self.head = nn.Linear(4, nclasses)
        self.parts = (body, "head")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("head")(self.get_submodule(self.parts[0])(x))


class Program:
    """A loop over 12 samples; its objects and a Checkpointer that has trained it, if it was asked to."""

    def __init__(
        self, net: nn.Module | None = None, *, seed: int = 0, lr: float = 0.1, optimizer: Any = torch.optim.Adam
    ) -> None:
        torch.manual_seed(seed)
        self.model = net or Net()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_()
        self.optimizer = optimizer(self.model.parameters(), lr=lr)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.state = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        x = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
        dtype = next(self.model.parameters()).dtype
        self.loader = DataLoader(TensorDataset(x.to(dtype)), batch_size=3, shuffle=True)
        self.loop = LoopObjects(self.state, "keep")

    def train_one(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    def saved(self, run_dir: Path, nsteps: int = 3) -> Program:
        with Checkpointer(run_dir, self.state, every_n_steps=1) as ckpt:
            step = ckpt.resume()
            for (x,) in ckpt.batches(self.loader, epochs=5):
                self.train_one(x)
                step += 1
                ckpt.step(step, metrics={"loss": 0.5})
                if step == nsteps:
                    break
        return self

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def snapshot(self) -> Any:
        return copy.deepcopy([item.state_dict() for item in (self.model, self.optimizer, self.scheduler)])


def moments(program: Program, name: str) -> torch.Tensor | None:
    slots = program.optimizer.state.get(program.model.get_parameter(name), {})
    return slots.get("exp_avg")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def left_out(program: Program) -> list[str]:
    assert program.loop.report is not None
    return [item.path for item in program.loop.report.not_restored]


@pytest.fixture
def trained(tmp_path: Path) -> Program:
    return Program().saved(tmp_path / "run")


@pytest.fixture
def run(tmp_path: Path, trained: Program) -> str:
    return str(tmp_path / "run")


def restore(program: Program, run: str, selection: Selection) -> int:
    return program.loop.restore_alone(Reference(run, "latest"), None, selection)


def test_only_the_model_leaves_everything_else_as_it_was_built(trained: Program, run: str, caplog: Any) -> None:
    live = Program(seed=5, lr=0.3)
    before = copy.deepcopy([live.optimizer.state_dict(), live.scheduler.state_dict()])
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    caplog.set_level(logging.WARNING, "ckptmgr")
    restored = live.loop.restore(load_checkpoint(run), Selection.only("model"))
    assert same(live.model.state_dict(), trained.model.state_dict())
    assert same([live.optimizer.state_dict(), live.scheduler.state_dict()], before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (restored.step, restored.metrics, restored.position, restored.starts_anew) == (0, {}, None, True)
    assert left_out(live) == ["optimizer", "scheduler", "data", "rng", "progress"]
    (message,) = caplog.messages
    assert message.startswith(f"not restored from {run}@0000000003-000001-")
    assert message.endswith(
        ": optimizer; scheduler; data (epochs are counted from 0); rng (the random number generators stay as they "
        "are); progress (steps are counted from 0)"
    )


def test_a_selection_of_everything_restores_everything_and_says_nothing(
    trained: Program, run: str, caplog: Any
) -> None:
    live = Program(seed=5)
    caplog.set_level(logging.WARNING, "ckptmgr")
    restored = live.loop.restore(load_checkpoint(run), Selection())
    assert same(live.snapshot(), trained.snapshot())
    assert (restored.step, restored.starts_anew) == (3, False)
    assert restored.position is not None
    assert left_out(live) == []
    assert caplog.messages == []


def test_moments_are_carried_while_the_learning_rate_is_the_programs(trained: Program, run: str, caplog: Any) -> None:
    live = Program(seed=5, lr=0.3)
    caplog.set_level(logging.WARNING, "ckptmgr")
    loaded = load_checkpoint(run)
    live.loop.restore(loaded, Selection.without("optimizer/options/lr", "scheduler"))
    assert same(moments(live, "head.weight"), moments(trained, "head.weight"))
    assert live.lr == 0.3
    assert live.optimizer.param_groups[0]["initial_lr"] == 0.3
    assert left_out(live) == ["optimizer/options/lr", "scheduler"]
    # Nothing says that the checkpoint's learning rate was kept, for it was not.
    assert not [message for message in caplog.messages if "stay in force" in message]
    # What is stored with the next checkpoint is what this program trains with.
    (group,) = live.loop.options.in_force["optimizer"]["groups"]
    assert group["options"]["lr"] == 0.3
    assert live.loop.options.in_force["scheduler"]["options"]["gamma"] == 0.5
    for (x,) in live.loader:
        live.train_one(x)
    assert live.lr == pytest.approx(0.3 * 0.25)


def test_all_options_can_stay_and_other_differences_are_still_told(trained: Program, run: str, caplog: Any) -> None:
    def with_decay(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=0.5)

    caplog.set_level(logging.WARNING, "ckptmgr")
    live = Program(seed=5, lr=0.3, optimizer=with_decay)
    restore(live, run, Selection.without("optimizer/options", "scheduler"))
    assert (live.lr, live.optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.5)
    assert same(moments(live, "head.weight"), moments(trained, "head.weight"))
    caplog.clear()
    other = Program(seed=5, lr=0.3, optimizer=with_decay)
    restore(other, run, Selection.without("optimizer/options/lr", "scheduler"))
    assert (other.lr, other.optimizer.param_groups[0]["weight_decay"]) == (0.3, 0)
    told = [message for message in caplog.messages if "stay in force" in message]
    assert len(told) == 1
    assert "weight decay" in told[0]
    assert "learning rate" not in told[0]


def test_a_schedule_is_not_restored_over_a_learning_rate_that_stays(trained: Program, run: str) -> None:
    live = Program(seed=5, lr=0.3)
    before = live.snapshot()
    for selection in (Selection.without("optimizer/options/lr"), Selection.only("model", "scheduler")):
        with pytest.raises(UsageError, match="'optimizer/options/lr' is left out and 'scheduler'") as caught:
            restore(live, run, selection)
        assert "on_changed_options='apply'" in str(caught.value)
    assert same(live.snapshot(), before)


def test_a_schedule_that_begins_anew_from_the_restored_rate_is_said(trained: Program, run: str, caplog: Any) -> None:
    live = Program(seed=5)
    caplog.set_level(logging.WARNING, "ckptmgr")
    restore(live, run, Selection.without("scheduler"))
    assert live.lr == trained.lr == 0.05
    assert live.scheduler.last_epoch == 0
    assert any(message.startswith("scheduler begins anew") for message in caplog.messages)


def test_fine_tuning_takes_the_body_and_trains_a_new_head(trained: Program, run: str, tmp_path: Path) -> None:
    live = Program(Net(nclasses=5), seed=5)
    head = copy.deepcopy(live.model.head.state_dict())
    assert restore(live, run, Selection.without("model/head.*", "progress")) == 0
    assert same(live.model.body.state_dict(), trained.model.body.state_dict())
    assert same(live.model.head.state_dict(), head)
    # A moment of the old head would be none of the new one's.
    assert same(moments(live, "body.0.weight"), moments(trained, "body.0.weight"))
    assert moments(live, "head.weight") is None
    assert left_out(live) == ["model/head.*", "optimizer/state/model/head.*", "data", "rng", "progress"]
    assert live.loop.report is not None
    assert str(live.loop.report.not_restored[0]) == "model/head.* (2: model/head.weight, model/head.bias)"
    live.saved(tmp_path / "tuned", nsteps=4)
    assert moments(live, "head.weight") is not None
    # And what was trained so resumes as any other run.
    again = Program(Net(nclasses=5), seed=8)
    again.loop.restore(load_checkpoint(str(tmp_path / "tuned")))
    assert same(again.snapshot(), live.snapshot())


def test_a_new_layer_and_a_removed_one_are_left_out_by_name(trained: Program, run: str) -> None:
    net = Net()
    net.head = nn.Identity()
    net.extra = nn.Linear(4, 1)
    live = Program(net, seed=5)
    extra = copy.deepcopy(net.extra.state_dict())
    with pytest.raises(StateMismatchError, match=r"extra\.weight"):
        restore(live, run, Selection.only("model"))
    restore(live, run, Selection(include=["model"], exclude=["model/head.*", "model/extra.*"]))
    assert same(net.body.state_dict(), trained.model.body.state_dict())
    assert same(net.extra.state_dict(), extra)


def test_only_a_part_of_a_module_is_included(trained: Program, run: str) -> None:
    live = Program(seed=5)
    head = copy.deepcopy(live.model.head.state_dict())
    restore(live, run, Selection.only("model/body.*"))
    assert same(live.model.body.state_dict(), trained.model.body.state_dict())
    assert same(live.model.head.state_dict(), head)
    assert left_out(live)[0] == "model/*"


def test_an_optimizer_without_its_module_still_finds_its_parameters(trained: Program, run: str) -> None:
    live = Program(seed=5)
    weights = copy.deepcopy(live.model.state_dict())
    restore(live, run, Selection.only("optimizer", "scheduler"))
    assert same(live.model.state_dict(), weights)
    assert same(live.optimizer.state_dict(), trained.optimizer.state_dict())
    assert left_out(live) == ["model", "data", "rng", "progress"]


def test_state_of_some_parameters_stays_as_the_live_optimizer_has_it(trained: Program, run: str) -> None:
    live = Program(seed=5)
    for (x,) in live.loader:
        live.train_one(x)
    own, old = copy.deepcopy(moments(live, "head.bias")), moments(trained, "body.0.bias")
    restore(live, run, Selection.without("optimizer/state/model/head.*"))
    assert same(moments(live, "head.bias"), own)
    assert same(moments(live, "body.0.bias"), old)
    assert same(live.model.state_dict(), trained.model.state_dict())


def test_state_that_stays_is_dropped_where_the_restored_options_need_more_of_it() -> None:
    def with_amsgrad(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, amsgrad=True)

    old, live = Program(optimizer=with_amsgrad), Program(seed=5)
    for program in (old, live):
        for (x,) in program.loader:
            program.train_one(x)
    entries = {entry.name: entry for entry in capture_state(old.state)}
    select_state(live.state, entries, Selection.without("optimizer/state/model/head.*")).restore()
    assert moments(live, "head.bias") is None
    # A step would look for the maximum of what it has not kept.
    for (x,) in live.loader:
        live.train_one(x)


class Counting(torch.optim.Adam):
    """Keeps a number that belongs to no parameter."""

    ncalls = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ncalls": self.ncalls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "ncalls"})
        self.ncalls = state_dict["ncalls"]


def test_state_of_no_parameter_goes_with_the_state_of_all() -> None:
    old, live = Program(optimizer=Counting), Program(seed=5, optimizer=Counting)
    old.optimizer.ncalls, live.optimizer.ncalls = 7, 5
    entries = {entry.name: entry for entry in capture_state(old.state)}
    select_state(live.state, entries, Selection.without("optimizer/state")).restore()
    assert live.optimizer.ncalls == 5
    select_state(live.state, entries, Selection.without("optimizer/state/model/head.*")).restore()
    assert live.optimizer.ncalls == 7


def test_the_count_of_steps_is_never_rounded_to_the_dtype_of_a_parameter() -> None:
    old, live = Program(optimizer=Counting), Program(Net().bfloat16(), seed=5, optimizer=Counting)
    for (x,) in old.loader:
        old.train_one(x)
    entries = {entry.name: entry for entry in capture_state(old.state)}
    select_state(live.state, entries, Selection(dtype="live")).restore()
    slots = live.optimizer.state[live.model.head.weight]
    assert (slots["step"].dtype, slots["exp_avg"].dtype) == (torch.float32, torch.bfloat16)


def test_state_that_belongs_to_all_parameters_together_is_taken_as_a_whole() -> None:
    def program(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(2, 1)
        return {"model": model, "optimizer": torch.optim.LBFGS(model.parameters(), max_iter=3)}

    def trained_by(state: dict[str, Any]) -> dict[str, Any]:
        x = torch.ones(4, 2)

        def closure() -> torch.Tensor:
            state["optimizer"].zero_grad()
            loss = (state["model"](x) - 1).square().sum()
            loss.backward()
            return loss

        state["optimizer"].step(closure)
        return state

    entries = {entry.name: entry for entry in capture_state(trained_by(program(0)))}
    live = program(1)
    with pytest.raises(UsageError, match="1 of 2 parameters"):
        select_state(live, entries, Selection.without("optimizer/state/model/bias"))
    selected = select_state(live, entries, Selection.without("optimizer/state"))
    selected.restore()
    assert live["optimizer"].state_dict()["state"] == {}
    assert torch.equal(live["model"].weight, entries["model"].tree["tensors"]["weight"])


def test_without_data_epochs_begin_anew_and_with_it_they_go_on(trained: Program, run: str, caplog: Any) -> None:
    def batches(selection: Selection | None) -> list[int]:
        live = Program(seed=5)
        restored = live.loop.restore(load_checkpoint(run), selection)
        data, _ = live.loop.position_in(
            live.loader, restored.position, epochs=1, on_resume="auto", on_epoch_end=lambda epoch: None
        )
        return [len(x) for (x,) in data]

    assert batches(None) == [3]
    caplog.set_level(logging.WARNING, "ckptmgr")
    assert batches(Selection.without("data")) == [3, 3, 3, 3]
    assert [message.partition(": ")[2] for message in caplog.messages] == ["data (epochs are counted from 0)"]


def test_without_rng_the_live_generators_go_on_also_at_a_position_in_the_data(trained: Program, run: str) -> None:
    live = Program(seed=5)
    torch.manual_seed(77)
    restored = live.loop.restore(load_checkpoint(run), Selection.without("rng"))
    data, _ = live.loop.position_in(
        live.loader, restored.position, epochs=1, on_resume="auto", on_epoch_end=lambda epoch: None
    )
    assert len(list(data)) == 1
    drawn = torch.rand(3)
    torch.manual_seed(77)
    assert torch.equal(drawn, torch.rand(3))


def test_an_entry_of_the_users_goes_before_a_word_of_the_loop(tmp_path: Path) -> None:
    def loop(value: int) -> tuple[dict[str, Any], LoopObjects]:
        state: dict[str, Any] = {"model": nn.Linear(1, 1), "progress": {"seen": value}}
        return state, LoopObjects(state, "keep")

    state, _ = loop(7)
    with Checkpointer(tmp_path, state, every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    live, objects = loop(1)
    restored = objects.restore(load_checkpoint(str(tmp_path)), Selection.without("progress"))
    assert (live["progress"]["seen"], restored.step) == (1, 1)
    assert objects.report is not None
    assert list(map(str, objects.report.not_restored)) == ["progress"]
    restored = objects.restore(load_checkpoint(str(tmp_path)), Selection.without("ckptmgr_progress"))
    assert (live["progress"]["seen"], restored.step) == (7, 0)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("modle", "'model'"),
        ("model/head", "'model/head.*'"),
        ("model/haed.weight", "'model/head.weight'"),
        ("optimizer/options/lrr", "'optimizer/options/lr'"),
        ("Model", "'model'"),
        ("scheduler/last_epoch", "'scheduler' has no parts"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest_path(
    trained: Program, run: str, pattern: str, nearest: str
) -> None:
    live = Program(seed=5)
    before = live.snapshot()
    for selection in (Selection.without(pattern), Selection.only("model", pattern)):
        with pytest.raises(UsageError) as caught:
            live.loop.restore(load_checkpoint(run), selection)
        assert f"the pattern {pattern!r} of the selection matches nothing" in str(caught.value)
        assert nearest in str(caught.value)
    assert same(live.snapshot(), before)


def test_what_leaves_nothing_to_restore_is_refused(trained: Program, run: str) -> None:
    with pytest.raises(UsageError, match="leaves nothing"):
        restore(Program(), run, Selection.without("*"))
    with pytest.raises(UsageError, match="select one of the entries: model, optimizer, scheduler"):
        restore(Program(), run, Selection.only("data"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "half"}, "dtype='half'"),
        ({"include": ()}, "selects nothing"),
        ({"include": 3}, "include=3"),
        ({"exclude": ["model", None]}, "the pattern None"),
        ({"rename": {"model/a.*": "model/b"}}, "model/b"),
        ({"rename": {"model/*.a": "model/*.b"}}, r"model/\*\.a"),
        ({"rename": {"*": "*"}}, "rename has"),
        ({"rename": ["model"]}, "rename="),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused_when_it_is_made(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Selection(**arguments)


def test_one_pattern_may_be_given_as_text() -> None:
    assert Selection(exclude="scheduler") == Selection.without("scheduler")


def test_renamed_parameters_take_their_moments_along(trained: Program, run: str) -> None:
    live = Program(Net(body="encoder"), seed=5)
    with pytest.raises(StateMismatchError):
        live.loop.restore(load_checkpoint(run))
    selection = Selection(rename={"model/body.*": "model/encoder.*"})
    live.loop.restore(load_checkpoint(run), selection)
    assert same(live.model.encoder.state_dict(), trained.model.body.state_dict())
    assert same(moments(live, "encoder.0.weight"), moments(trained, "body.0.weight"))
    assert same(live.optimizer.state_dict(), trained.optimizer.state_dict())
    assert live.loop.report is not None
    assert live.loop.report.renamed["model/body.0.weight"] == "model/encoder.0.weight"
    # Groups are found again under the new names, so a changed option is told still.
    assert live.loop.options.in_force["optimizer"]["groups"][0]["of"] == "model/encoder.0.bias"


def test_of_several_rules_for_a_name_the_longest_holds(trained: Program, run: str) -> None:
    net = Net(body="encoder")
    loop = LoopObjects({"net": net}, "keep")
    rules = {"model/*": "net/*", "model/body.*": "net/encoder.*"}
    loop.restore_alone(Reference(run, "latest"), None, Selection(rename=rules))
    assert same(net.encoder.state_dict(), trained.model.body.state_dict())
    assert same(net.head.state_dict(), trained.model.head.state_dict())


def test_moments_of_a_renamed_parameter_must_have_its_shape() -> None:
    def optimizer(name: str, width: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.ModuleDict({name: nn.Linear(2, width)}).named_parameters(), lr=0.1, momentum=0.9)

    entries = {entry.name: entry for entry in capture_state({"o": optimizer("a", 3)})}
    selection = Selection(rename={"a.*": "b.*"})
    with pytest.raises(StateMismatchError, match=r"'b.weight' was float32 \(3, 2\)"):
        select_state({"o": optimizer("b", 4)}, entries, selection).restore()
    select_state({"o": optimizer("b", 3)}, entries, selection).restore()


def test_exact_names_and_endings_can_be_renamed() -> None:
    source = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    entries = {entry.name: entry for entry in capture_state({"model": source})}
    live = nn.ModuleDict({"x": nn.Linear(1, 1), "y": nn.Linear(1, 1)})
    rules = {"model/a.*": "model/x.*", "model/b.weight": "model/y.weight", "*/b.bias": "*/y.bias"}
    select_state({"model": live}, entries, Selection(rename=rules)).restore()
    assert same(live["x"].state_dict(), source["a"].state_dict())
    assert same(live["y"].state_dict(), source["b"].state_dict())


def test_a_part_of_a_module_becomes_a_module_of_its_own(trained: Program, run: str) -> None:
    encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    loop = LoopObjects({"encoder": encoder}, "keep")
    selection = Selection(rename={"model/body.*": "encoder/*"})
    assert loop.restore_alone(Reference(run, "latest"), None, selection) == 3
    assert same(encoder.state_dict(), trained.model.body.state_dict())
    assert loop.report is not None
    told = [str(item) for item in loop.report.not_restored]
    assert told[:3] == ["model/* (2: model/head.weight, model/head.bias)", "optimizer", "scheduler"]


def test_entries_can_be_renamed_as_a_whole(trained: Program, run: str) -> None:
    live = Program(seed=5)
    state = {"net": live.model, "opt": live.optimizer}
    loop = LoopObjects(state, "keep")
    selection = Selection(rename={"model": "net", "optimizer": "opt"})
    loop.restore_alone(Reference(run, "latest"), None, selection)
    assert same(live.model.state_dict(), trained.model.state_dict())
    assert same(live.optimizer.state_dict(), trained.optimizer.state_dict())
    assert loop.options.in_force["opt"]["groups"][0]["of"] == "net/body.0.bias"
    assert loop.report is not None
    assert [item.path for item in loop.report.not_restored] == ["scheduler", "data", "rng"]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"model/body.0.weight": "model/head.weight"}, "would both be called 'model/head.weight'"),
        ({"model/boddy.*": "model/encoder.*"}, "the rule 'model/boddy.*' renames nothing"),
        ({"model/head.*": "head.*"}, "is no name of a tensor"),
    ],
)
def test_rules_that_lose_something_or_rename_nothing_are_refused(
    trained: Program, run: str, rename: dict[str, str], message: str
) -> None:
    live = Program(seed=5)
    before = live.snapshot()
    with pytest.raises(UsageError) as caught:
        live.loop.restore(load_checkpoint(run), Selection(rename=rename))
    assert message in str(caught.value)
    assert same(live.snapshot(), before)


def test_another_dtype_is_refused_unless_a_policy_is_chosen(trained: Program, run: str) -> None:
    live = Program(Net().double(), seed=5)
    before = live.snapshot()
    with pytest.raises(StateMismatchError, match="dtype of"):
        live.loop.restore(load_checkpoint(run), Selection())
    assert same(live.snapshot(), before)


def test_saved_values_are_cast_to_the_live_dtype_and_named(trained: Program, run: str, caplog: Any) -> None:
    live = Program(Net().bfloat16(), seed=5)
    caplog.set_level(logging.WARNING, "ckptmgr")
    live.loop.restore(load_checkpoint(run), Selection(dtype="live"))
    weight = live.model.head.weight
    assert torch.equal(weight, trained.model.head.weight.bfloat16())
    assert live.model.body[1].num_batches_tracked.dtype == torch.int64
    old = moments(trained, "head.weight")
    assert old is not None
    assert same(moments(live, "head.weight"), old.bfloat16())
    assert live.optimizer.state[weight]["step"].dtype == torch.float32
    (told,) = [message for message in caplog.messages if " cast from " in message]
    assert told.startswith("values of the checkpoint cast from float32 to bfloat16: 14 (model/body.0.weight, ")
    live.train_one(torch.ones(3, 2, dtype=torch.bfloat16))


def test_live_tensors_take_the_saved_dtype_and_stay_the_same_objects(trained: Program, run: str) -> None:
    live = Program(Net().double(), seed=5)
    weight = live.model.head.weight
    weight.grad = torch.full_like(weight, 2.0)
    live.loop.restore(load_checkpoint(run), Selection(dtype="saved"))
    assert live.model.head.weight is weight
    assert same(weight.grad, torch.full((3, 4), 2.0))
    assert same(live.snapshot(), trained.snapshot())
    assert live.loop.report is not None
    assert live.loop.report.cast["model/head.weight"] == ("float64", "float32")
    x = torch.ones(3, 2)
    live.train_one(x)
    trained.train_one(x)
    assert same(live.snapshot(), trained.snapshot())


def test_floats_do_not_become_whole_numbers() -> None:
    source, live = nn.Module(), nn.Module()
    source.register_buffer("table", torch.ones(2))
    live.register_buffer("table", torch.ones(2, dtype=torch.int64))
    entries = {entry.name: entry for entry in capture_state({"model": source})}
    for dtype in ("live", "saved"):
        selected = select_state({"model": live}, entries, Selection(dtype=dtype))  # type: ignore[arg-type]
        with pytest.raises(StateMismatchError, match="dtype of 'table'"):
            selected.restore()
    assert live.table.dtype == torch.int64


class Touchy:
    """An object that refuses its state when it is restored."""

    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise RuntimeError("not today")


@pytest.mark.parametrize("dtype", ["live", "saved"])
def test_a_restore_that_fails_at_the_last_moment_changes_nothing(dtype: Any) -> None:
    old = Program()
    old.train_one(torch.ones(3, 2))
    entries = {entry.name: entry for entry in capture_state({**old.state, "touchy": Touchy()})}
    live = Program(Net().double(), seed=5)
    live.train_one(torch.ones(3, 2, dtype=torch.float64))
    before, gradient = live.snapshot(), copy.deepcopy(live.model.head.weight.grad)
    selected = select_state({**live.state, "touchy": Touchy()}, entries, Selection(dtype=dtype))
    with pytest.raises(StateMismatchError, match="not today"):
        selected.restore()
    assert same(live.snapshot(), before)
    assert same(live.model.head.weight.grad, gradient)


def test_what_does_not_fit_is_found_before_anything_changes(trained: Program, run: str) -> None:
    live = Program(Net(nclasses=5), seed=5)
    before = live.snapshot()
    with pytest.raises(StateMismatchError, match=r"head\.bias"):
        live.loop.check(load_checkpoint(run), Selection.without("model/head.weight", "scheduler"))
    with pytest.raises(StateMismatchError, match=r"head\.bias"):
        live.loop.restore(load_checkpoint(run), Selection.without("model/head.weight", "scheduler"))
    assert same(live.snapshot(), before)


def test_one_name_of_a_tied_tensor_is_not_left_out_alone() -> None:
    def tied() -> nn.Module:
        module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        module["b"].weight = module["a"].weight
        return module

    entries = {entry.name: entry for entry in capture_state({"model": tied()})}
    live = tied()
    with pytest.raises(UsageError, match="one tensor in the live module"):
        select_state({"model": live}, entries, Selection.without("model/b.*"))


def test_tensors_that_are_one_stay_one_when_they_are_cast() -> None:
    def tied(dtype: torch.dtype) -> nn.Module:
        module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        module["b"].weight = module["a"].weight
        return module.to(dtype)

    for dtype in ("live", "saved"):
        source, live = tied(torch.float32), tied(torch.float64)
        entries = {entry.name: entry for entry in capture_state({"model": source})}
        select_state({"model": live}, entries, Selection(dtype=dtype)).restore()  # type: ignore[arg-type]
        assert live["a"].weight is live["b"].weight
        assert torch.equal(live["b"].weight.float(), source["a"].weight)


def test_a_wrapped_model_does_not_take_another_dtype() -> None:
    class DistributedDataParallel(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    entries = {entry.name: entry for entry in capture_state({"model": nn.Linear(2, 2)})}
    live = DistributedDataParallel(nn.Linear(2, 2).double())
    with pytest.raises(UsageError, match="'model' cannot take the dtype of the checkpoint for 2 tensors"):
        select_state({"model": live}, entries, Selection(dtype="saved"))
    assert live.module.weight.dtype == torch.float64


class Hooked(Net):
    """Loads through code of its own, and keeps something that is no tensor."""

    def __init__(self, nclasses: int = 3, body: str = "body", note: str = "") -> None:
        super().__init__(nclasses, body)
        self.note = note
        self.register_load_state_dict_pre_hook(lambda *args: None)

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


def test_a_module_that_loads_in_its_own_way_is_restored_in_parts_and_under_new_names() -> None:
    source = Hooked(note="old")
    source.body[1].num_batches_tracked.fill_(7)
    entries = {entry.name: entry for entry in capture_state({"model": source})}
    live = Hooked(nclasses=5, body="encoder", note="new")
    selection = Selection.without("model/head.*", "model/_extra_state", rename={"model/body.*": "model/encoder.*"})
    select_state({"model": live}, entries, selection).restore()
    assert same(live.encoder.state_dict(), source.body.state_dict())
    assert live.note == "new"
    part = Hooked(note="new")
    part.body[1].num_batches_tracked.fill_(5)
    select_state({"model": part}, entries, Selection.only("model/head.*", "model/_extra_state")).restore()
    assert part.body[1].num_batches_tracked == 5
    assert part.note == "old"


class Versioned(nn.Module):
    """Once counted in halves: what has no version is doubled when it is loaded."""

    _version = 2

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_neither_what_stays_nor_what_is_renamed_loses_the_version_of_its_state() -> None:
    entries = {entry.name: entry for entry in capture_state({"m": nn.ModuleDict({"a": Versioned(3.0)})})}
    live = nn.ModuleDict({"b": Versioned(1.0), "new": Versioned(5.0)})
    select_state({"m": live}, entries, Selection.without("m/new.*", rename={"m/a.*": "m/b.*"})).restore()
    assert (live["b"].weight, live["new"].weight) == (3.0, 5.0)


@pytest.mark.parametrize(("dtype", "of_second_moments"), [("live", torch.float32), ("saved", torch.bfloat16)])
def test_moments_that_were_kept_in_a_dtype_of_their_own_keep_it(dtype: Any, of_second_moments: torch.dtype) -> None:
    def state(of: torch.dtype) -> dict[str, Any]:
        model = nn.Linear(2, 2).to(of)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    source, live = state(torch.bfloat16), state(torch.float32)
    source["model"](torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    source["optimizer"].step()
    slots = source["optimizer"].state[source["model"].weight]
    slots["exp_avg"] = slots["exp_avg"].float() + 1e-6
    entries = {entry.name: entry for entry in capture_state(source)}
    select_state(live, entries, Selection(dtype=dtype)).restore()
    restored = live["optimizer"].state[live["model"].weight]
    assert same(restored["exp_avg"], slots["exp_avg"])
    assert restored["exp_avg_sq"].dtype == of_second_moments


def test_a_group_whose_parameters_are_all_left_out_keeps_its_place_in_the_schedule() -> None:
    def state(nclasses: int, lr: float) -> dict[str, Any]:
        model = Net(nclasses)
        groups = [{"params": model.body.parameters(), "lr": lr}, {"params": model.head.parameters(), "lr": 10 * lr}]
        optimizer = torch.optim.AdamW(groups)
        return {"m": model, "o": optimizer, "s": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)}

    def train(state: dict[str, Any]) -> None:
        state["o"].zero_grad()
        state["m"](torch.ones(3, 2)).sum().backward()
        state["o"].step()
        state["s"].step()

    source, live = state(3, 0.1), state(5, 0.2)
    train(source)
    entries = {entry.name: entry for entry in copy.deepcopy(capture_state(source))}
    select_state(live, entries, Selection.without("m/head.*")).restore()
    rates = [[group["lr"] for group in it["o"].param_groups] for it in (live, source)]
    assert rates[0] == rates[1]
    train(source)
    train(live)
    rates = [[group["lr"] for group in it["o"].param_groups] for it in (live, source)]
    assert rates[0] == rates[1]


def test_an_optimizer_whose_parameters_have_positions_only_is_restored_in_parts() -> None:
    def state(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net()
        return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    (source, old), (live, new) = state(0.1), state(0.2)
    source(torch.ones(3, 2)).sum().backward()
    old.step()
    entries = {entry.name: entry for entry in capture_state({"o": old})}
    select_state({"o": new}, entries, Selection.without("o/state/0/1", "o/options/lr")).restore()
    first, second, *_ = live.parameters()
    assert same(new.state[first]["momentum_buffer"], old.state[next(source.parameters())]["momentum_buffer"])
    assert "momentum_buffer" not in new.state[second]
    assert new.param_groups[0]["lr"] == 0.2


def test_prefix_rules_still_hold_before_a_selection() -> None:
    source = nn.ModuleDict({"model": Net()})
    entries = {entry.name: entry for entry in capture_state({"model": source})}
    live = Net()
    head = copy.deepcopy(live.head.state_dict())
    select_state({"model": live}, entries, Selection.without("model/head.*")).restore()
    assert same(live.body.state_dict(), source["model"].body.state_dict())
    assert same(live.head.state_dict(), head)


def test_entries_that_cannot_be_selected_are_not_read(trained: Program, run: str) -> None:
    # The optimizer's file is damaged: who wants the model alone is not in need of it.
    manifest = load_checkpoint(run).manifest
    of_model, of_optimizer = (
        {tensor.file for tensor in manifest.tensors if tensor.entry == entry} for entry in ("model", "optimizer")
    )
    for index in of_optimizer - of_model:
        path = Path(run) / manifest.files[index].path
        path.write_bytes(bytes(path.stat().st_size))
    reference = Reference(run, manifest.checkpoint)
    live = Program(seed=5)
    with pytest.raises(CorruptCheckpointError):
        live.loop.restore_alone(reference, None)
    live.loop.restore_alone(reference, None, Selection.only("model"))
    assert same(live.model.state_dict(), trained.model.state_dict())
