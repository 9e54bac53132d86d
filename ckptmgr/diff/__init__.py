"""What changed between two checkpoints: configuration, code, versions, state and weights. Imports no torch."""

from __future__ import annotations

from ckptmgr.diff.comparison import compare
from ckptmgr.diff.records import Diff, EntryChange, FactChange, Side, TensorDiff, TensorForm

__all__ = ["Diff", "EntryChange", "FactChange", "Side", "TensorDiff", "TensorForm", "compare"]
