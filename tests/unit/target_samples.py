"""A package of the user's, as configurations name it: models that can be built, and that cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import ConfigError
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.build import build

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

prepared = functools.partial(Net, 1)
"""


def install_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make ``my_pkg`` importable from a project that allows it; yield its folder, and forget it afterwards."""
    package = folder / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from my_pkg.models import Net\nfrom my_pkg._inner import Hidden, net\n")
    (package / "models.py").write_text(MODELS)
    (package / "_inner.py").write_text("class Hidden: pass\nclass net: pass\n")
    (package / "net.py").write_text("class Other: pass\n")
    (folder / "pyproject.toml").write_text('[tool.ckptmgr]\nallow = ["my_pkg.*"]\n')
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def of(name: str, *args: object, **named: object) -> dict[str, Any]:
    return {"_target_": f"my_pkg.models.{name}", **({"_args_": list(args)} if args else {}), **named}


def refusal(tree: object, allow: AllowList, **options: Any) -> ConfigError:
    """Return the error of a configuration of which nothing may be built."""
    with pytest.raises(ConfigError) as caught:
        build(tree, key=options.pop("key", "model"), allow=allow, **options)
    assert getattr(sys.modules.get("my_pkg.models"), "made", []) == []
    return caught.value
