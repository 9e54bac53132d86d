"""The difference between a checkpoint and the live objects, told completely in one error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.sharding import SavedPart

__all__ = ["Differences", "describe", "dtype_and_shape", "tensor_difference"]


def dtype_and_shape(tensor: torch.Tensor) -> list[Any]:
    """Return dtype and shape as plain values, to be kept in a tree."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def describe(value: Any) -> str:
    """Say what a value is, in the words of a mismatch: dtype and shape, or the type."""
    if isinstance(value, (torch.Tensor, SavedPart)):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"NumPy {value.dtype} {value.shape}"
    return f"a {type(value).__name__}"


def tensor_difference(path: str, live: torch.Tensor | np.ndarray[Any, Any], saved: Any) -> str | None:
    """Compare shape and dtype; return one line about the difference, or None."""
    is_same_kind = isinstance(saved, (torch.Tensor, SavedPart) if isinstance(live, torch.Tensor) else np.ndarray)
    if not is_same_kind:
        what = "type"
    elif tuple(saved.shape) != tuple(live.shape):
        what = "shape"
    elif saved.dtype != live.dtype:
        what = "dtype"
    elif isinstance(live, torch.Tensor) and saved.layout != live.layout:
        return f"layout of {path!r} is {saved.layout} in the checkpoint, {live.layout} now"
    else:
        return None
    return f"{what} of {path!r} is {describe(saved)} in the checkpoint, {describe(live)} now"


class Differences:
    """Collects differences of one entry and raises them as one error.

    Args:
        what: The entry, such as ``'model'``.
        next: What the reader can do.
    """

    def __init__(self, what: str, *, next: str) -> None:
        self._what = what
        self._next = next
        self._lines: list[str] = []

    def add(self, line: str | None) -> None:
        """Note one difference; None is none."""
        if line is not None:
            self._lines.append(line)

    def add_names(self, label: str, names: Iterable[str]) -> None:
        """Note names that share a difference, such as those missing in the checkpoint."""
        if listed := [repr(name) for name in names]:
            self._lines.append(f"{label}: {', '.join(listed)}")

    def raise_if_any(self) -> None:
        """Raise everything that was noted.

        Raises:
            StateMismatchError: Anything was noted.
        """
        if self._lines:
            raise StateMismatchError(
                f"{self._what} of the checkpoint does not fit the live one",
                why="\n        ".join(self._lines),
                next=self._next,
            )
