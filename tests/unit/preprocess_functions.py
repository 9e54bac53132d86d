"""Functions and classes that stand for a program's own, importable by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from torch import nn


def halved(row: Any) -> Any:
    """Return half of an array."""
    return np.asarray(row) / 2


def scaled(row: Any, factor: float, *, shift: float = 0.0) -> Any:
    """Return a scaled array."""
    return np.asarray(row, dtype=np.float64) * factor + shift


class Clip(TransformerMixin, BaseEstimator):
    """An estimator of the program's own."""

    def __init__(self, low: float = 0.0) -> None:
        self.low = low

    def fit(self, rows: Any, y: Any = None) -> Clip:
        self.high_ = float(np.max(rows))
        return self

    def transform(self, rows: Any) -> Any:
        return np.clip(rows, self.low, self.high_)


@dataclass(frozen=True)
class Window:
    """Settings of the program's own."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.25)
    names: dict[str, int] = field(default_factory=dict)
    made: int = field(default=3, init=False)

    def __call__(self, raw: Any) -> Any:
        return np.asarray(raw, dtype=np.float32)[: self.size] - self.mean[0]


@dataclass
class Mutable:
    """Settings that can change."""

    size: int


class Words:
    """A vocabulary with to_json and from_json."""

    def __init__(self, words: list[str] | None = None) -> None:
        self.words = list(words or ())

    def to_json(self) -> str:
        return "\n".join(self.words)

    @classmethod
    def from_json(cls, text: str) -> Words:
        return cls(text.split("\n"))

    def encode(self, raw: list[str]) -> Any:
        return np.array([[self.words.index(word) for word in raw]])


class Table:
    """Statistics with to_dict and from_dict."""

    def __init__(self, mean: float) -> None:
        self.mean = mean

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    @staticmethod
    def from_dict(state: dict[str, Any]) -> Table:
        return Table(**state)


class Running:
    """A mean that is updated in training, with state_dict and load_state_dict."""

    def __init__(self) -> None:
        self.mean = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]

    def __call__(self, raw: float) -> Any:
        return np.float32(raw - self.mean)


class Standardize(nn.Module):
    """A layer of the program's own, with a buffer, an attribute and nothing to train."""

    def __init__(self, mean: list[float], eps: float = 1e-6) -> None:
        super().__init__()
        import torch

        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.eps = eps

    def forward(self, x: Any) -> Any:
        return x - self.mean + self.eps * self.scratch.sum()
