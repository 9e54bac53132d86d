"""What a comparison of two checkpoints tells, as frozen records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptmgr.diff.documents import ValueChange
from ckptmgr.diff.measure import Measured

__all__ = ["Diff", "EntryChange", "FactChange", "Side", "TensorDiff", "TensorForm", "Verdict"]

Verdict: TypeAlias = Literal[
    "only in a",
    "only in b",
    "other shape",
    "other dtype",
    "different",
    "other bits",
    "not compared",
    "equal bits",
    "equal",
]
"""How two tensors of one name compare.

``equal``: in every bit, and every number is equal to its like, so that no NaN is among them. ``equal bits``: in every
bit, and the numbers were not looked at, or a NaN is among them, which is equal to nothing. ``other bits``: every number
is equal to its like, and not every bit: a zero has changed its sign. ``not compared``: their form is the same, and
nothing more is known.
"""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared.

    Attributes:
        label: As it was named, fit for printing.
        place: The run or the file.
        checkpoint: Id of the checkpoint; None for weights without one.
        step: Its step; likewise.
        created_at: When it was committed, in RFC 3339; likewise.
        ntensors: How many tensors it has.
        nbytes: Size of their elements.
    """

    label: str
    place: str
    checkpoint: str | None
    step: int | None
    created_at: str | None
    ntensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FactChange:
    """One thing that is recorded of both checkpoints and differs.

    Attributes:
        about: ``progress`` (step, epoch, metrics), ``topology``, ``environment`` (versions), ``code`` (git),
            ``command`` (how the process was started) or ``configuration`` (by dotted key).
        name: What it is.
        a: In the first, as text; None where it is not there.
        b: In the second, likewise.
    """

    about: Literal["progress", "topology", "environment", "code", "command", "configuration"]
    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class EntryChange:
    """An entry that one side lacks, or that another handler has captured.

    Attributes:
        name: Its name; of a pair of entries with different names that of the first side.
        a: Handler and version, such as ``module v1``; None where the side has no such entry.
        b: The same of the second side.
        renamed: Its name on the second side, where that is another one.
    """

    name: str
    a: str | None
    b: str | None
    renamed: str | None = None


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor without its elements: dtype in torch's words, shape in elements, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """Two tensors of one name.

    Attributes:
        entry: Their entry, as the first side calls it.
        name: Their name in it.
        rank: The rank that has them for itself; None for what all have together.
        a: The first; None where there is none.
        b: The second; likewise.
        is_same_bits: Whether dtype, shape and every bit agree; None where that is not known.
        measured: How far apart the elements are; None where they were not read.
        aliases: Further names of the pair.
    """

    entry: str
    name: str
    rank: int | None
    a: TensorForm | None
    b: TensorForm | None
    is_same_bits: bool | None = None
    measured: Measured | None = None
    aliases: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Entry and name, and the rank where it matters."""
        return f"{self.entry}/{self.name}" + ("" if self.rank is None else f" (rank {self.rank})")

    @property
    def verdict(self) -> Verdict:
        """How they compare."""
        if self.a is None:
            return "only in b"
        if self.b is None:
            return "only in a"
        if self.a.shape != self.b.shape:
            return "other shape"
        if self.a.dtype != self.b.dtype:
            return "other dtype"
        if self.measured is not None and self.measured.ndifferent == 0:
            return "equal" if self.is_same_bits else "other bits"
        if self.is_same_bits:
            return "equal bits"
        return "not compared" if self.is_same_bits is None else "different"

    @property
    def is_change(self) -> bool:
        """Whether it counts as a difference: everything but equal numbers and equal bits."""
        return self.verdict not in ("equal", "equal bits", "not compared")

    @property
    def order(self) -> tuple[object, ...]:
        """What to sort by for the largest change first: the form, NaN and infinities, then the relative change."""
        measured = self.measured
        is_form = self.verdict in ("only in a", "only in b", "other shape")
        if measured is None:
            return not is_form, True, 0.0, 0.0, self.path
        relative, largest = measured.relative or 0.0, float(measured.max_abs or 0)
        is_broken = measured.nnan[0] != measured.nnan[1] or measured.ninf[0] != measured.ninf[1]
        is_finite = not (is_broken or math.isinf(largest))
        return not is_form, is_finite, -relative, -largest, self.path


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed from one checkpoint to another.

    Attributes:
        a: The first, from which changes are told.
        b: The second.
        facts: What is recorded of them and differs.
        entries: Entries that one side lacks, or that were captured otherwise.
        values: Places of the state, other than tensors, that differ; only so many of them are kept.
        nvalues: How many there are.
        tensors: Every pair of tensors, the largest change first.
        notes: What could not be compared, and why.
    """

    a: Side
    b: Side
    facts: tuple[FactChange, ...]
    entries: tuple[EntryChange, ...]
    values: tuple[ValueChange, ...]
    nvalues: int
    tensors: tuple[TensorDiff, ...]
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[TensorDiff, ...]:
        """The tensors that differ, the largest change first."""
        return tuple(tensor for tensor in self.tensors if tensor.is_change)

    @property
    def is_same(self) -> bool:
        """Whether no difference was found.

        Another command is none by itself, since it names the run; nor are tensors that were not compared.
        """
        facts = [fact for fact in self.facts if fact.about != "command"]
        return not (facts or self.entries or self.nvalues or self.changed)
