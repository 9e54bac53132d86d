"""What an import has found in a source, before it becomes a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptmgr.state.entry import CapturedEntry

__all__ = ["Contents"]


@dataclass(frozen=True, slots=True)
class Contents:
    """The state in a source.

    Attributes:
        entries: As a manager would have captured them.
        step: Optimizer updates completed, where the source says so.
        epoch: The epoch that they end in.
        notes: One sentence for each thing that was chosen, guessed or left out.
        versions: What wrote the source, as far as it says so: tool → version.
    """

    entries: tuple[CapturedEntry, ...]
    step: int = 0
    epoch: int | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
