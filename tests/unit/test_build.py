"""Objects from configuration: checked as a whole, then built; and every way in which that can go wrong, in words."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.errors import (
    CheckpointNotFoundError,
    CkptmgrError,
    ConfigError,
    NotAllowedError,
    Preempted,
)
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.build import build, check_build, load_target
from ckptmgr.instantiate.targets import Target

MODELS = """
import abc, functools, sys
import ckptmgr
from ckptmgr.errors import CheckpointNotFoundError, Preempted, UsageError

made = []

class Base:
    def __init__(self, **named):
        made.append(self)
        self.named = named

class Net(Base):
    def __init__(self, hidden, depth=2, *, dropout=0.0):
        super().__init__(hidden=hidden, depth=depth, dropout=dropout)
    class Block(Base):
        pass
    @classmethod
    def small(cls):
        return cls(1)
    @classmethod
    @ckptmgr.factory
    def large(cls, hidden=100):
        return cls(hidden)

class Heir(Net):
    pass

class First(Base):
    def __init__(self, params, lr, /, momentum=0):
        super().__init__(params=params, lr=lr, momentum=momentum)

class Many(Base):
    def __init__(self, *parts, **named):
        super().__init__(parts=parts, **named)

class Forwards(Base):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)
    def __init__(self, width):
        super().__init__(width=width)

class Open(abc.ABC):
    @abc.abstractmethod
    def forward(self): ...

class Raises:
    def __init__(self, how="value"):
        raise {"value": ValueError("of no\\n\\n use"), "usage": UsageError("no such mode", why="typo", next="use max"),
               "missing": CheckpointNotFoundError("no checkpoint in runs/x"), "exit": SystemExit(3),
               "preempted": Preempted(), "interrupt": KeyboardInterrupt(), "memory": MemoryError()}[how]

class Picky:
    def __init__(self, mode="min", **others):
        if others:
            raise TypeError(f"Picky() got an unexpected keyword argument '{next(iter(others))}'")

@ckptmgr.factory
def make(hidden=1):
    return Net(hidden)

@ckptmgr.factory
def make_text():
    return "text"

@functools.lru_cache
@ckptmgr.factory
def cached():
    return Net(5)

def undeclared():
    return Net(1)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "my_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("from my_pkg.models import Net\nfrom my_pkg._inner import Hidden, net\n")
    (folder / "models.py").write_text(MODELS)
    (folder / "_inner.py").write_text("class Hidden: pass\nclass net: pass\n")
    (folder / "net.py").write_text("class Other: pass\n")
    (tmp_path / "pyproject.toml").write_text('[tool.ckptmgr]\nallow = ["my_pkg.*"]\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


@pytest.fixture
def allow(package: Path) -> AllowList:
    return AllowList.gather(cwd=package.parent)


def of(name: str, *args: object, **named: object) -> dict[str, Any]:
    return {"_target_": f"my_pkg.models.{name}", **({"_args_": list(args)} if args else {}), **named}


def refusal(tree: object, allow: AllowList, **options: Any) -> ConfigError:
    """Return the error of a configuration of which nothing may be built."""
    with pytest.raises(ConfigError) as caught:
        build(tree, key=options.pop("key", "model"), allow=allow, **options)
    assert getattr(sys.modules.get("my_pkg.models"), "made", []) == []
    return caught.value


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


@pytest.mark.parametrize(
    "name",
    ["my_pkg.Net", "my_pkg.models.Net", "my_pkg.Hidden", "my_pkg.net", "my_pkg.net.Other", "my_pkg.models.Net.Block"],
)
def test_a_class_is_found_under_each_of_its_names(allow: AllowList, name: str) -> None:
    assert isinstance(load_target(Target("model", name), allow), type)


def test_a_module_that_is_held_under_another_name_of_the_package_leads_on(package: Path) -> None:
    (package / "__init__.py").write_text("from my_pkg import models as zoo\nfrom torch import nn\n")
    allow = AllowList.gather(cwd=package.parent)
    assert load_target(Target("model", "my_pkg.zoo.Net"), allow).__name__ == "Net"
    assert load_target(Target("model", "my_pkg.nn.Linear"), allow) is nn.Linear


def test_what_another_allowed_package_gave_is_allowed(package: Path) -> None:
    (package / "__init__.py").write_text("from torch.utils.data import DataLoader\nfrom ckptmgr import KeepLast\n")
    allow = AllowList.gather(cwd=package.parent)
    assert load_target(Target("x", "my_pkg.DataLoader"), allow) is torch.utils.data.DataLoader
    assert build({"_target_": "my_pkg.KeepLast", "_args_": [3]}, key="x", allow=allow).k == 3


def test_what_a_package_took_from_elsewhere_is_not_its_own(package: Path) -> None:
    (package / "__init__.py").write_text("from subprocess import Popen\nfrom torch.nn.init import constant_\n")
    allow = AllowList.gather(cwd=package.parent)
    with pytest.raises(NotAllowedError, match=r"it is subprocess\.Popen, defined elsewhere"):
        load_target(Target("x", "my_pkg.Popen"), allow)
    with pytest.raises(NotAllowedError, match=r"'my_pkg.constant_' is not allowed"):
        load_target(Target("x", "my_pkg.constant_"), allow)


def test_declared_functions_may_be_called_and_others_not(allow: AllowList) -> None:
    assert build(of("make", hidden=4), key="model", allow=allow).named["hidden"] == 4
    assert build(of("Net.large"), key="model", allow=allow).named["hidden"] == 100
    assert build(of("cached"), key="model", allow=allow).named["hidden"] == 5
    for name in ("undeclared", "Net.small"):
        with pytest.raises(NotAllowedError, match=r"not declared") as caught:
            build(of(name), key="model", allow=allow)
        assert "@ckptmgr.factory" in (caught.value.next or "")


def test_an_exact_name_allows_a_function(package: Path) -> None:
    allow = AllowList.gather(cwd=package.parent, extra=["my_pkg.models.undeclared", "my_pkg.models.Net.small"])
    assert build(of("undeclared"), key="model", allow=allow).named["hidden"] == 1
    assert build(of("Net.small"), key="model", allow=allow).named["hidden"] == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_pkg.models", "is a module"),
        ("my_pkg.models.made", "an object of type list"),
        ("my_pkg.models.made.append", "of type list, and a name leads"),
        ("my_pkg.models.sys.path", "which nobody has allowed"),
        ("my_pkg.models.Open", "is abstract"),
    ],
)
def test_what_cannot_be_built_with_says_what_it_is(allow: AllowList, name: str, says: str) -> None:
    with pytest.raises(CkptmgrError) as caught:
        build({"_target_": name}, key="model", allow=allow)
    assert says in str(caught.value)
    assert caught.value.what.startswith("model: ")


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


def test_a_module_that_is_not_there_says_where_it_was_sought(allow: AllowList) -> None:
    error = refusal({"_target_": "my_pkg.modles.Net"}, allow)
    assert error.what == "model: there is no 'modles' in the module my_pkg"
    assert error.next == "did you mean my_pkg.models?"
    error = refusal({"_target_": "my_pkg.models.Nett"}, allow)
    assert (error.why or "").startswith("its classes are Base, First, Forwards, Heir, ")
    assert error.next == "did you mean my_pkg.models.Net?"


def test_a_package_that_is_not_there_says_so(package: Path) -> None:
    allow = AllowList.gather(cwd=package.parent, extra=["my_pgk.*"])
    error = refusal({"_target_": "my_pgk.models.Net"}, allow)
    assert error.what == "model: 'my_pgk.models.Net' is not importable"
    assert str(package.parent) in (error.why or "")
    assert "did you mean my_pkg?" in (error.next or "")


@pytest.mark.parametrize(
    ("text", "why", "advice"),
    [
        (
            "import not_there\n",
            "ModuleNotFoundError: No module named 'not_there' (my_pkg/broken.py, line 1)",
            "install",
        ),
        ("from my_pkg.models import Nett\n", "ImportError: cannot import name 'Nett'", "correct it"),
        ("x = 1\nclass (\n", "SyntaxError: invalid syntax (my_pkg/broken.py, line 2)", "correct the file"),
        ("x = 1\ny = z\n", "NameError: name 'z' is not defined (my_pkg/broken.py, line 2)", "correct it"),
        ("import sys\nsys.exit(4)\n", "ends the process when it is imported (exit code 4)", "__main__"),
        ("x = '\\ud800'.encode()\n", "UnicodeEncodeError", "correct it"),
    ],
)
def test_a_module_that_fails_says_what_failed_and_where(
    package: Path, allow: AllowList, text: str, why: str, advice: str
) -> None:
    (package / "broken.py").write_text(text)
    error = refusal({"_target_": "my_pkg.broken.Net"}, allow)
    assert error.what == "model: importing my_pkg.broken failed"
    assert why in (error.why or "")
    assert advice in (error.next or "")
    assert error.__cause__ is not None


def test_an_interrupt_while_importing_is_an_interrupt(package: Path, allow: AllowList) -> None:
    (package / "broken.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        build({"_target_": "my_pkg.broken.Net"}, key="model", allow=allow)


def test_an_error_of_ckptmgr_while_importing_stays_what_it_is(package: Path, allow: AllowList) -> None:
    (package / "broken.py").write_text("import ckptmgr\nckptmgr.allow_targets('*')\n")
    with pytest.raises(CkptmgrError, match=r"^allow_targets"):
        build({"_target_": "my_pkg.broken.Net"}, key="model", allow=allow)


def test_code_in_a_run_directory_is_not_imported(package: Path, allow: AllowList, tmp_path: Path) -> None:
    (tmp_path / RUN_MARKER).write_text("{}")
    with pytest.raises(NotAllowedError, match=r"lies in the run directory"):
        build(of("Net", 1), key="model", allow=allow)
    assert "my_pkg" not in sys.modules


def test_a_package_that_is_put_together_from_a_run_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "one"
    (run / "spread_pkg").mkdir(parents=True)
    (run / RUN_MARKER).write_text("{}")
    (run / "spread_pkg" / "net.py").write_text("class Net: pass\n")
    monkeypatch.syspath_prepend(run)
    allow = AllowList.gather(cwd=tmp_path, extra=["spread_pkg.*"])
    with pytest.raises(NotAllowedError, match=r"lies in the run directory"):
        build({"_target_": "spread_pkg.net.Net"}, key="model", allow=allow)
    assert "spread_pkg" not in sys.modules
