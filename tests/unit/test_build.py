"""Objects from configuration: checked as a whole, then built; and every way in which that can go wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from target_samples import install_package, of, refusal
from torch import nn

from ckptmgr.errors import (
    CheckpointNotFoundError,
    ConfigError,
    NotAllowedError,
    Preempted,
)
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.build import build, check_build, load_target
from ckptmgr.instantiate.targets import Target


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from install_package(tmp_path, monkeypatch)


@pytest.fixture
def allow(package: Path) -> AllowList:
    return AllowList.gather(cwd=package.parent)


def test_an_object_is_built_with_its_arguments(allow: AllowList) -> None:
    net = build(of("Net", 3, dropout=0.5), key="model", allow=allow)
    assert net.named == {"hidden": 3, "depth": 2, "dropout": 0.5}


def test_inner_objects_are_built_first_and_data_stay_data(allow: AllowList) -> None:
    tree = of("Many", of("Net", 1), [of("Net", 2), None, "torch.nn.ReLU"], options={"x": [1], "net": of("Net", 3)})
    many = build(tree, key="model", allow=allow)
    inner, listed = many.named["parts"]
    assert inner.named["hidden"] == 1
    assert [type(listed[0]).__name__, *listed[1:]] == ["Net", None, "torch.nn.ReLU"]
    assert many.named["options"]["x"] == [1]
    assert many.named["options"]["net"].named["hidden"] == 3
    assert sys.modules["my_pkg.models"].made[-1] is many


def test_the_configuration_is_left_as_it_was(allow: AllowList) -> None:
    data = {"x": [1]}
    tree = of("Many", data=data)
    build(tree, key="model", allow=allow).named["data"]["x"].append(2)
    assert tree == of("Many", data={"x": [1]})


def test_what_has_no_target_is_built_within(allow: AllowList) -> None:
    loaders = build({"train": of("Net", 1), "batch": 3}, key="loaders", allow=allow)
    assert loaders["train"].named["hidden"] == 1
    assert loaders["batch"] == 3


def test_a_partial_leaves_the_call_to_others(allow: AllowList) -> None:
    made = build(of("Net", depth=7, _partial_=True), key="model", allow=allow)
    assert isinstance(made, functools.partial)
    assert made(3).named == {"hidden": 3, "depth": 7, "dropout": 0.0}


def test_the_callers_arguments_come_before_those_of_the_configuration(allow: AllowList) -> None:
    tree = of("First", 0.1)
    made = build(tree, key="optimizer", allow=allow, args=(["p"],), extra={"momentum": 0.9})
    assert made.named == {"params": ["p"], "lr": 0.1, "momentum": 0.9}


def test_torch_objects_are_built(allow: AllowList) -> None:
    tree = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear", "_args_": [2, 3]}]}
    model = build(tree, key="model", allow=allow, base=nn.Module)
    optimizer = build(
        {"_target_": "torch.optim.AdamW", "lr": 0.5},
        key="optimizer",
        allow=allow,
        base=torch.optim.Optimizer,
        args=(model.parameters(),),
    )
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(model[0], nn.Linear)


def test_the_wrong_kind_is_refused_before_it_is_built(allow: AllowList) -> None:
    options: dict[str, Any] = {"base": torch.optim.Optimizer, "base_name": "torch.optim.Optimizer", "key": "optimizer"}
    error = refusal(of("Net", 1), allow, **options)
    assert error.what == "optimizer must be a torch.optim.Optimizer; my_pkg.models.Net is not"
    assert refusal(of("Net", 1), allow, base=nn.Module).what.startswith("model must be a Module of torch; ")


def test_what_a_function_makes_is_checked_when_it_is_made(allow: AllowList) -> None:
    error = refusal(of("make_text"), allow, base=nn.Module, base_name="torch.nn.Module")
    assert error.what == "model must be a torch.nn.Module; my_pkg.models.make_text has made an object of type str"


def test_a_list_is_built_and_checked_one_by_one(allow: AllowList) -> None:
    nets = [of("Net", 1), of("Heir", 2)]
    base = load_target(Target("x", "my_pkg.models.Net"), allow)
    assert len(build(nets, key="callbacks", allow=allow, base=base)) == 2
    sys.modules["my_pkg.models"].made.clear()
    error = refusal([*nets, of("Many")], allow, key="callbacks", base=base, base_name="Net")
    assert error.what.startswith("callbacks.2 must be a Net")


@pytest.mark.parametrize("tree", [None, 3, "my_pkg.models.Net", {"hidden": 3}, [[]]])
def test_where_an_object_is_wanted_there_must_be_a_target(allow: AllowList, tree: object) -> None:
    assert "nothing to build" in refusal(tree, allow, base=nn.Module).what


def test_the_manager_is_a_callback_although_its_class_is_not(allow: AllowList, tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    tree = {"_target_": "ckptmgr.CheckpointManager", "run_dir": str(tmp_path / "run")}
    assert isinstance(build(tree, key="checkpoint", allow=allow, base=Callback), Callback)
    tree["every_n_train_stps"] = "3"
    error = refusal(tree, allow, key="checkpoint", base=Callback)
    assert "every_n_train_stps -> every_n_train_steps" in (error.next or "")


def test_a_misspelled_argument_gets_a_suggestion(allow: AllowList) -> None:
    error = refusal(of("Net", hiden=3, depth=1), allow)
    assert error.what == "model.hiden: my_pkg.models.Net takes no argument 'hiden'"
    assert error.why == "it takes hidden, depth=2, dropout=0.0"
    assert error.next == "did you mean hiden -> hidden? Otherwise leave it out: ~model.hiden"


def test_arguments_that_a_class_no_longer_takes_are_named_at_once(allow: AllowList) -> None:
    error = refusal(of("Net", hidden=3, attention="flash", window=4), allow)
    assert error.what == "model.attention: my_pkg.models.Net takes no argument 'attention' and 'window'"
    assert error.next == "leave it out: ~model.attention ~model.window"


def test_a_missing_argument_is_named(allow: AllowList) -> None:
    error = refusal(of("Net", depth=3), allow)
    assert error.what == "model: my_pkg.models.Net needs 'hidden'"
    assert error.next == "give it: +model.hidden=…"
    build(of("Net", depth=3, _partial_=True), key="model", allow=allow)


def test_a_missing_optimizer_argument_may_be_left_to_the_model(allow: AllowList) -> None:
    tree = {"_target_": "torch.optim.Adam", "lr": 0.1}
    error = refusal(of("Net", hidden=tree), allow)
    assert error.next == "give it: +model.hidden.params=…, or let the model call it: +model.hidden._partial_=true"


def test_what_must_be_an_object_is_not_left_to_others(allow: AllowList) -> None:
    with pytest.raises(ConfigError) as caught:
        build(of("Net", depth=3, _partial_=True), key="model", allow=allow, base=torch.nn.Module)
    assert caught.value.next == "leave it out: ~model._partial_"


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (of("Net", 1, 2, 3), "has room for 2 there, and gets 3"),
        (of("Net", 1, hidden=2), "'hidden' twice"),
        (of("First", 1, lr=2), "takes 'lr' by its position only"),
        (of("First", 1), "needs 'lr'"),
        (of("Forwards", wdth=1), "did you mean wdth -> width?"),
        (of("Forwards"), "needs 'width'"),
        (of("Net.Block", 1), "has room for 0 there"),
        (of("Net.large", hiden=1), "did you mean hiden -> hidden?"),
        (of("make", 1, 2), "has room for 1 there"),
        (of("Net", hidden=1, _partial_="yes"), "neither true nor false"),
        ({**of("Net"), "_args_": "abc"}, "model._args_ is not a list"),
        (of("Net", hidden=1, _parital_=True), "did you mean _partial_?"),
        (of("Net", hidden=1, _recursive_=False), "Hydra's switch"),
        (of("Net", hidden=1, _other_=False), "model._other_: there is no such key"),
        ({**of("Net", hidden=1), 3: 4}, "3 cannot be the name of an argument"),
        ({"_targt_": "my_pkg.models.Net"}, "did you mean _target_?"),
        ({"x": {"_args_": [1]}}, "model.x._args_: there is no _target_ beside it"),
        (of("Many", x=of("Net", hiden=1)), "model.x.hiden: "),
        (of("Many", of("Net", 1), of("Net")), "model._args_.1: my_pkg.models.Net needs 'hidden'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_built(
    allow: AllowList, tree: object, says: str
) -> None:
    error = refusal(tree, allow)
    assert says in str(error)
    assert error.what.startswith("model")
    assert error.next


def test_what_the_caller_gives_cannot_be_given_again(allow: AllowList) -> None:
    assert "given by ckptmgr" in (refusal(of("Net", hidden=1), allow, args=(3,)).why or "")
    assert "given by ckptmgr" in (refusal(of("Net", hidden=1), allow, extra={"hidden": 3}).why or "")


def test_what_the_class_does_not_take_from_the_caller_is_named(allow: AllowList) -> None:
    error = refusal(of("Net", hidden=1), allow, extra={"logger": 3})
    assert error.what == "model: my_pkg.models.Net does not take 'logger', which ckptmgr gives it"


def test_hydras_harmless_switches_are_accepted(allow: AllowList) -> None:
    assert build(of("Net", hidden=1, _convert_="all", _recursive_=True), key="model", allow=allow).named["hidden"] == 1


def test_checking_builds_nothing(allow: AllowList) -> None:
    check_build(of("First", 0.1, momentum=of("Net", 1)), key="optimizer", allow=allow, n_args=1)
    assert sys.modules["my_pkg.models"].made == []
    with pytest.raises(ConfigError, match="needs 'lr'"):
        check_build(of("First"), key="optimizer", allow=allow, n_args=1)


def test_a_denied_name_anywhere_means_that_nothing_is_imported(allow: AllowList) -> None:
    with pytest.raises(NotAllowedError, match=r"model\.x: 'other\.Thing'"):
        build(of("Many", x={"_target_": "other.Thing"}), key="model", allow=allow)
    assert "my_pkg" not in sys.modules


def test_an_exception_in_a_constructor_is_chained_and_placed(allow: AllowList) -> None:
    error = refusal(of("Raises"), allow)
    assert error.what == "building model (my_pkg.models.Raises) failed"
    assert (error.why or "").startswith("ValueError: of no use (my_pkg/models.py, line ")
    assert isinstance(error.__cause__, ValueError)
    assert "MemoryError" in (refusal(of("Raises", "memory"), allow).why or "")
    assert "SystemExit: 3" in (refusal(of("Raises", "exit"), allow).why or "")


def test_errors_of_ckptmgr_keep_their_meaning(allow: AllowList) -> None:
    error = refusal(of("Raises", "usage"), allow, key="checkpoint")
    assert error.what == "building checkpoint (my_pkg.models.Raises) failed: no such mode"
    assert (error.why, error.next) == ("typo", "use max")
    for how, kind in (("missing", CheckpointNotFoundError), ("preempted", Preempted), ("interrupt", KeyboardInterrupt)):
        with pytest.raises(kind):
            build(of("Raises", how), key="model", allow=allow)


def test_a_refusal_of_the_call_itself_gets_a_suggestion_too(allow: AllowList) -> None:
    assert refusal(of("Picky", mod="max"), allow).next == "did you mean mod -> mode?"


def test_a_class_that_does_not_tell_what_it_takes_is_simply_called(allow: AllowList) -> None:
    assert build({"_target_": "torch.tensor", "_args_": [[1, 2]]}, key="x", allow=allow).tolist() == [1, 2]
    assert "building x (torch.tensor) failed" in refusal({"_target_": "torch.tensor", "y": 1}, allow, key="x").what
