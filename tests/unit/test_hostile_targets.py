"""What nobody has allowed is neither imported nor run nor opened: seen by an audit hook in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_targets import BY_NAME, BY_WHAT_IT_IS

WATCH = """
import json, os, sys
from pathlib import Path

sys.path[:0] = [os.getcwd(), sys.argv[1]]
import hostile_targets
from ckptmgr.errors import ConfigError, NotAllowedError
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.build import build

table = getattr(hostile_targets, sys.argv[2])
if sys.argv[2] == "BY_WHAT_IT_IS":
    import my_pkg.models, torch.nn.parallel.distributed

allow = AllowList.gather(cwd=Path.cwd(), extra=["my_pkg.*"])
WATCHED = ("import", "exec", "compile", "pickle.", "marshal.", "os.", "subprocess.", "socket.", "urllib.", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
events = []

def hook(event, args):
    writes = event == "open" and (set(args[1] or "") & set("wax+") or (args[2] or 0) & WRITES)
    if writes:
        events.append(f"open {args[0]!r}")
    elif event.startswith(WATCHED) and event not in HARMLESS:
        events.append(f"{event} {args[0]!r}" if args else event)

sys.addaudithook(hook)

def seen(tree):
    before = set(sys.modules)
    events.clear()
    try:
        made = repr(build(tree, key="model", allow=allow))
    except (ConfigError, NotAllowedError) as error:
        made = error.code
        message = str(error)
    else:
        message = ""
    return {"made": made, "events": list(events), "modules": sorted(set(sys.modules) - before), "message": message}

report = {name: seen(tree) for name, tree in table.items()}
report["an allowed one"] = seen({"_target_": "my_pkg.later.Thing"})
print(json.dumps(report))
"""
PACKAGE = """
import functools, os, subprocess
import pathlib
import pickle as loader
from os import system
from subprocess import Popen
from types import FunctionType
from builtins import eval as run_text

class Holder:
    Path = pathlib.Path
    shell = os
    def go(self): open("owned", "w")
    @classmethod
    def make(cls): open("owned", "w")

def helper(): open("owned", "w")

holder = Holder()
prepared = functools.partial(system, "touch owned")
"""


def watch(table: str, folder: Path) -> dict[str, dict[str, Any]]:
    for name in ("my_pkg", "my_pkg_evil", "other_pkg"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(PACKAGE)
    (folder / "my_pkg" / "models.py").write_text("import os, os.path\n")
    (folder / "my_pkg" / "later.py").write_text("class Thing: pass\n")
    (folder / "my_pkg" / "_private.py").write_text("class Thing: pass\n")
    (folder / "pyproject.toml").write_text("")
    command = [sys.executable, "-c", WATCH, str(Path(__file__).parent), table]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("table", ["BY_NAME", "BY_WHAT_IT_IS"])
def test_what_is_denied_leaves_no_trace(table: str, tmp_path: Path) -> None:
    report = watch(table, tmp_path)
    control = report.pop("an allowed one")
    assert any(event.startswith("exec ") for event in control["events"])  # the hook sees what happens
    assert "my_pkg.later" in control["modules"]
    assert "Thing object" in control["made"]
    assert len(report) == len(BY_NAME if table == "BY_NAME" else BY_WHAT_IT_IS)
    for name, seen in report.items():
        assert seen["made"] in ("not-allowed", "config"), name
        assert (seen["events"], seen["modules"]) == ([], []), name
        assert "model" in seen["message"].splitlines()[0], seen["message"]
    assert not (tmp_path / "owned").exists()


def test_there_are_enough_of_them() -> None:
    assert len(BY_NAME) >= 80
    assert len(BY_WHAT_IT_IS) >= 25
