"""The model that a user names: built without memory where that works, and told well where it fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.live_model import build_model, facts_of_module, model_arguments, model_facts
from ckptmgr.errors import UsageError

CODE = """
import torch
from torch import nn

BUILT = []

class Net(nn.Module):
    def __init__(self, width=4, *, tied=False):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width, bias=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        if tied:
            self.b.weight = self.a.weight
        BUILT.append(self.a.weight.device.type)

class Outer:
    class Inner(Net):
        pass

class Computes(Net):
    def __init__(self):
        super().__init__()
        if self.a.weight.sum().item() > 1e9:
            raise ValueError

def huge():
    return nn.Linear(10**6, 10**6)

def fails():
    raise RuntimeError("no such size")

def gives_a_dict():
    return {}

def leaves():
    raise SystemExit(3)

ready = nn.Linear(2, 2)
lazy = nn.LazyLinear(3)
number = 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_net.py").write_text(CODE)
    (tmp_path / "broken_net.py").write_text("import own_net\n\nimport not_installed_anywhere\n")
    (tmp_path / "unread_net.py").write_text("def broken(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_net", "broken_net", "unread_net"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("project")
def test_parameters_and_persistent_buffers_are_listed_in_order_with_their_ties() -> None:
    assert model_facts("own_net:Net", {"width": 2, "tied": True}) == (
        TensorFacts("steps", "int64", ()),
        TensorFacts("a.weight", "float32", (2, 2)),
        TensorFacts("a.bias", "float32", (2,)),
        TensorFacts("b.weight", "float32", (2, 2), tied_to="a.weight"),
    )


@pytest.mark.usefixtures("project")
def test_a_model_that_no_memory_would_hold_is_described() -> None:
    assert model_facts("own_net:huge")[0].shape == (10**6, 10**6)


@pytest.mark.usefixtures("project")
def test_a_model_that_computes_while_it_is_built_is_built_for_real() -> None:
    build_model("own_net:Computes")
    import own_net  # type: ignore[import-not-found]

    assert own_net.BUILT == ["meta", "cpu"]


@pytest.mark.usefixtures("project")
def test_a_module_and_a_nested_class_can_be_named() -> None:
    assert [it.name for it in model_facts("own_net:ready")] == ["weight", "bias"]
    assert len(model_facts("own_net:Outer.Inner")) == 4


def test_wrappers_leave_no_prefix() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    assert [it.name for it in facts_of_module(nn.DataParallel(inner))] == ["0.weight", "0.bias"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("factory", "what", "why"),
    [
        ("own_net:fails", "'own_net:fails' failed", r"RuntimeError: no such size \(own_net.py:32\)"),
        ("own_net:Nat", "there is no 'Nat' in own_net", "it has Net"),
        ("own_net:gives_a_dict", "returned no module", "builtins.dict"),
        ("own_net:leaves", "ended the process", "SystemExit: 3"),
        ("own_net:number", "is no model", "of type int"),
        ("own_net:lazy", "is not initialised", "lazy"),
        ("own_net", "--model 'own_net'", "MODULE:NAME"),
        ("own_net:Net()", "--model", "MODULE:NAME"),
        ("no_such_net:Net", "there is no module 'no_such_net'", "it was looked for in"),
        ("broken_net:Net", "importing broken_net failed", r"not_installed_anywhere.*\(broken_net.py:3\)"),
        ("unread_net:Net", "importing unread_net failed", r"SyntaxError.*\(unread_net.py:1\)"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(factory: str, what: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        model_facts(factory)
    assert what in caught.value.what
    assert re.search(why, caught.value.why or "")


@pytest.mark.usefixtures("project")
def test_an_argument_that_it_does_not_take_is_told() -> None:
    with pytest.raises(UsageError) as caught:
        model_facts("own_net:Net", {"depth": 3})
    assert "unexpected keyword argument 'depth'" in (caught.value.why or "")


def test_arguments_are_json_where_they_can_be_and_text_otherwise() -> None:
    assert model_arguments(["a=1", "b=true", "c=relu", 'd=[1, "x"]', 'e="1"', "f=a=b", '{"g": {"h": null}}']) == {
        "a": 1,
        "b": True,
        "c": "relu",
        "d": [1, "x"],
        "e": "1",
        "f": "a=b",
        "g": {"h": None},
    }


@pytest.mark.parametrize("given", [["width"], ["=3"], ["a b=1"], ["{1}"], ["a=1", '{"a": 2}'], ["a=1", "a=1"]])
def test_arguments_that_cannot_be_meant_are_refused(given: list[str]) -> None:
    with pytest.raises(UsageError, match="--model-arg"):
        model_arguments(given)
