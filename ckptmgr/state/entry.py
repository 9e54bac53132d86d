"""What capturing one entry of the state gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = ["CapturedEntry", "EntryScope", "TensorScope"]

EntryScope: TypeAlias = Literal["replicated", "per-rank"]
TensorScope: TypeAlias = Literal["rank-0", "per-rank", "compared"]
"""What else a tensor of a replicated entry can be than the same on all ranks.

``rank-0``: it differs between ranks, and rank 0's is the one that counts. ``per-rank``: each rank's is its own.
``compared``: per-rank if the ranks' differ at the save, else replicated.
"""


@dataclass(frozen=True, slots=True)
class CapturedEntry:
    """One entry of the state as a tree.

    Attributes:
        name: Key in the state, such as ``model``.
        handler: Name of the handler that captured it.
        version: That handler's version.
        tree: Nested dicts, lists and tuples of tensors, NumPy arrays and plain values. A capture refers to the live
            tensors; a loaded entry owns its tensors and hands them over when it is restored, so it is restored once.
        scope: Whether it is the same on every rank of the job, or each rank has its own.
        tensor_scopes: Names of tensors (as they stand in the entry's file) of a replicated entry for which that does
            not hold.
        fingerprint: Digest of what a preprocessor does; None for other entries.
        classes: Code that a module is made of: class → digest of its source, or None.
    """

    name: str
    handler: str
    version: int
    tree: Any
    scope: EntryScope = "replicated"
    tensor_scopes: Mapping[str, TensorScope] = field(default_factory=dict)
    fingerprint: str | None = None
    classes: Mapping[str, str | None] = field(default_factory=dict)
