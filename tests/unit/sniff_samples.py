"""Things that tests save and then have recognised."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.sniff import KINDS, sniff

FOREIGN = Path(__file__).parent.parent / "foreign" / "files"


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any] = os.system, *arguments: Any) -> None:
        self.call = (function, arguments or ("true",))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def look(place: Path | str, **options: Any) -> Artifact:
    """Recognise, and check what holds for every artifact."""
    artifact = sniff(place, **options)
    assert artifact.kind in KINDS
    texts = [artifact.title, *artifact.problems, *artifact.advice, *artifact.contents, *artifact.contents.values()]
    texts += [fact.name for fact in artifact.tensors or ()] + [use.name for use in artifact.globals]
    assert all(text.isprintable() for text in texts)
    assert all(len(text) < 5000 for text in texts)
    return artifact


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def shapes(artifact: Artifact) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {fact.name: (fact.dtype, fact.shape) for fact in artifact.tensors or ()}


def expected(state: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in state.items()}


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer
