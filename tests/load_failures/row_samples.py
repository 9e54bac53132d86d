"""Builders for the rows: a project whose code changes after it has saved, and what is asked of the command line."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.cli.main import run

FOREIGN = Path(__file__).parent.parent / "foreign" / "files"

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, nclasses=5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, nclasses)

    def forward(self, x):
        return self.head(self.body(x))
"""

SAVE_ALL = """
import pickle, torch
from shop.models import Net

torch.manual_seed(1)
net = Net()
optimizer = torch.optim.Adam(net.parameters())
torch.save(net, "whole.pt")
torch.save(net, "whole_old.pt", _use_new_zipfile_serialization=False)
with open("whole.pkl", "wb") as file:
    pickle.dump(net, file)
torch.save(net.state_dict(), "weights.pt")
torch.save({"epoch": 3, "net": net, "optimizer": optimizer.state_dict()}, "trainer_whole.pt")
"""

WHOLE = ("whole.pt", "whole_old.pt", "whole.pkl")
"""Files of ``save_all`` that hold the module itself."""


class Net(nn.Module):
    """Batch norm and dropout, so that modes and buffers count."""

    def __init__(self, nclasses: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, nclasses)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def save_all(folder: Path) -> dict[str, torch.Tensor]:
    """Let another process save a model of a package ``shop`` in several ways; return its tensors."""
    write_package(folder, {"__init__.py": "", "models.py": MODELS})
    in_python(folder, SAVE_ALL)
    state: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return state


def write_package(folder: Path, files: Mapping[str, str | None], name: str = "shop") -> Path:
    """Write files of a package, or take them away where they are None; forget what was imported of it."""
    package = folder / name
    package.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        if text is None:
            (package / file).unlink()
        else:
            (package / file).write_text(text)
    forget(name)
    return package


def forget(name: str) -> None:
    for module in [it for it in sys.modules if it.partition(".")[0] == name]:
        del sys.modules[module]
    importlib.invalidate_caches()


def in_python(folder: Path, code: str) -> str:
    """Run a program in a process of its own, in a folder that it can import from; return what it printed."""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def doctor(capsys: pytest.CaptureFixture[str], place: Path | str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code of ``ckptmgr doctor`` and its document; the text that it prints is its ``text``."""
    capsys.readouterr()
    status = run(["doctor", str(place), *arguments, "--json"])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    document: dict[str, Any] = json.loads(printed.out)
    assert run(["doctor", str(place), *arguments]) == status
    document["text"] = capsys.readouterr().out
    return status, document


def read_record(path: Path) -> Any:
    """Return what a record of a run says, without its digest."""
    return json.loads(path.read_text())["record"]


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def restored(run_dir: Path, model: nn.Module, **options: Any) -> nn.Module:
    """Put a run's weights into a model, with a Checkpointer that has nothing else."""
    Checkpointer(run_dir.parent / "next", {"model": model}).restore(str(run_dir), **options)
    return model


def saved(run_dir: Path, state: Mapping[str, Any], *, nsteps: int = 1, **options: Any) -> Path:
    """A run that saved a state at each step; nothing changes from one to the next."""
    with Checkpointer(run_dir, dict(state), every_n_steps=1, background=False, **options) as ckpt:
        for step in range(ckpt.resume() + 1, nsteps + 1):
            ckpt.step(step)
    return run_dir


def train_one(model: nn.Module, *optimizers: torch.optim.Optimizer, seed: int = 0) -> None:
    """One step on random data, the same for each seed."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    for optimizer in optimizers:
        optimizer.zero_grad()
    dtype = next(iter(model.parameters())).dtype
    model(x.to(dtype)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
