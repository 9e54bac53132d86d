"""The source of a class is found without importing it, and is the text that `inspect` finds for the class itself."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from ckptmgr.diagnose.find_code import source_texts
from ckptmgr.diagnose.recorded_code import compare_code
from ckptmgr.state.sources import class_sources, text_digest

SOURCE = '''
import functools
from torch import nn


def decorate(kind):
    return kind


@decorate
# A comment between.
class Decorated(nn.Module):
    """Of two lines,

    in a class."""

    class Block(nn.Linear):
        def forward(self, x):
            return x
        # Within the body.

    def forward(self, x):
        text = """
not indented
"""
        return x
    # At its end.

# Of nobody.

if True:
    class Conditional(nn.Module):
        pass

class Last(Decorated): x = 1
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "code_pkg"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (folder / name).write_text("")
    (folder / "inner" / "nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "code_pkg"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["Decorated", "Decorated.Block", "Conditional", "Last"])
def test_the_text_is_that_of_inspect(name: str, package: Path) -> None:
    found = source_texts(f"code_pkg.inner.nets.{name}")
    assert "code_pkg" not in sys.modules
    kind = importlib.import_module("code_pkg.inner.nets")
    for part in name.split("."):
        kind = getattr(kind, part)
    assert found == [inspect.getsource(kind)]  # type: ignore[arg-type]


def test_classes_that_changed_are_gone_or_are_as_they_were(package: Path) -> None:
    module = importlib.import_module("code_pkg.inner.nets")
    saved = class_sources(nn.Sequential(module.Last(), module.Conditional(), module.Decorated.Block(1, 1)))
    facts = compare_code(saved)
    assert set(facts.then) == {
        f"code.code_pkg.inner.nets.{name}" for name in ("Last", "Conditional", "Decorated", "Decorated.Block")
    }
    assert facts.then == facts.now
    file = package / "inner" / "nets.py"
    file.write_text(SOURCE.replace("x = 1", "x = 2").replace("class Conditional", "class Other"))
    from ckptmgr.diagnose import find_code

    find_code._names_in.cache_clear()
    facts = compare_code(saved)
    changed = {name for name in facts.now if facts.now[name] != facts.then[name]}
    assert changed == {"code.code_pkg.inner.nets.Last"}
    assert "has no class Conditional any more" in facts.reasons["code.code_pkg.inner.nets.Conditional"]
    # What is alive goes before what stands in a file.
    assert compare_code(saved, saved).now == facts.then


@pytest.mark.parametrize(
    "name",
    ["", "Net", "..", "code_pkg", "code_pkg.inner", "code_pkg.../etc/passwd", "code_pkg.inner.nets.x\0y", "/etc.passwd",
     "os.path.join", "a" * 5000 + ".b", ".".join("abcdefgh" * 50), "../code_pkg.inner.nets.Last"],
)  # fmt: skip
def test_names_that_nobody_wrote_find_nothing(name: str, package: Path) -> None:
    assert source_texts(name) == []
    assert compare_code({name: "0" * 32}).now == {}


def test_a_class_in_the_current_directory_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lone_script.py").write_text("class Net:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    (text,) = source_texts("lone_script.Net")
    assert text_digest(text) == text_digest("class Net:\n    pass")


def test_what_cannot_be_compared_is_left_out() -> None:
    facts = compare_code({"a.b.<locals>.C": "0" * 32, "__main__.C": "0" * 32, "notebook.C": None})
    assert (facts.then, facts.now, facts.reasons) == ({}, {}, {})
