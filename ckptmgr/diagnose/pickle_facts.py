"""What following a pickle gives, and how far it is followed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ckptmgr.diagnose.pickle_values import Storage, Symbol

__all__ = ["LIMITS", "TORCH_MAGIC", "PickleFacts", "PickleLimits"]

TORCH_MAGIC: Final = 0x1950A86A20F9469CFC6C
"""What the first pickle of a file of torch is, as it was until 1.6, and of each storage in a plain pickle."""


@dataclass(frozen=True, slots=True)
class PickleLimits:
    """How much of a pickle is followed. The defaults are far above what real checkpoints have.

    Attributes:
        max_instructions: Of one pickle.
        max_objects: Containers and objects that are made, and members that are copied.
        max_memo: Entries of the memo.
        max_text_nbytes: Of all texts together.
        max_globals: Different names.
    """

    max_instructions: int = 4_000_000
    max_objects: int = 1_000_000
    max_memo: int = 500_000
    max_text_nbytes: int = 24 << 20
    max_globals: int = 5_000


LIMITS: Final = PickleLimits()


@dataclass(slots=True, eq=False)
class PickleFacts:
    """What a pickle tells.

    Attributes:
        root: What it would build; None where its end was not reached, or where that is None.
        globals: What it would import, ``(module, qualified name)`` → a few words on how, in order of appearance.
        problems: Why it cannot be followed to its end; empty where it was.
        is_complete: ``STOP`` was reached, so that no global is left out.
        is_ambiguous: Python's readers would not agree on what follows where it was given up: there may be any global.
        protocol: Highest one that it declares; None where it declares none.
        end: Offset behind ``STOP``, or where following it ended.
        ninstructions: How many were followed.
        has_joblib_arrays: Arrays lie between the instructions, as joblib writes them.
        storages: Key → storage that it names; one with its own ``start`` lies within it.
        sources: Class → its source file, where an old file of torch recorded it.
    """

    root: Symbol = None
    globals: dict[tuple[str, str], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_complete: bool = False
    is_ambiguous: bool = False
    protocol: int | None = None
    end: int = 0
    ninstructions: int = 0
    has_joblib_arrays: bool = False
    storages: dict[str, Storage] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
