"""What capturing one entry of the state gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CapturedEntry"]


@dataclass(frozen=True, slots=True)
class CapturedEntry:
    """One entry of the state as a tree.

    Attributes:
        name: Key in the state, such as ``model``.
        handler: Name of the handler that captured it.
        version: That handler's version.
        tree: Nested dicts, lists and tuples of tensors, NumPy arrays and plain values. A capture refers to the live
            tensors; a loaded entry owns its tensors and hands them over when it is restored, so it is restored once.
    """

    name: str
    handler: str
    version: int
    tree: Any
