"""How the weights of a file differ from those of a model, and what would make them fit: as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ckptmgr.diagnose.artifact import Certainty, TensorFacts

__all__ = ["Candidate", "Change", "Difference", "Pair", "Proposal", "ProposalKind", "SelectionPart", "selection_code"]

Pair: TypeAlias = tuple[str | None, str | None]
"""A tensor's name in the file and its name in the model; None where it has none there."""

ProposalKind: TypeAlias = Literal[
    "prefix", "rename", "fuse", "split", "transpose", "resize", "skip", "tied", "cast", "harmless", "build"
]


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that both have, and that is not the same kind of tensor.

    Attributes:
        name: In both.
        saved: As the file has it.
        live: As the model has it.
    """

    name: str
    saved: TensorFacts
    live: TensorFacts


@dataclass(frozen=True, slots=True)
class SelectionPart:
    """What a `ckptmgr.Selection` has to say to apply a proposal to one of our own checkpoints.

    Attributes:
        rename: Old names and new ones, without the entry in front.
        exclude: Names that stay as the program has built them.
        resize: Name → ``slice`` or ``grow``.
        dtype: The policy for dtypes; None where nothing has to be said about it.
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    resize: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several things that an unknown difference could be.

    Attributes:
        summary: What it would be, in a few words.
        code: Lines that do it, as those of a proposal; they come after those of the proposals that are not unknown.
        selection: The same for a checkpoint of ours.
    """

    summary: str
    code: tuple[str, ...] = ()
    selection: SelectionPart | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Something that would make a part of the difference go away.

    Attributes:
        kind: Of what kind it is.
        certainty: How sure that is. What is ``unknown`` has to be decided by somebody who knows the model: its
            ``candidates`` are listed, and nothing is applied for it.
        summary: What to do, in a few words.
        reason: Why it is thought so.
        covers: The tensors that it is about.
        code: Lines of Python that apply it to ``state``, the tensors of the file by name, for the module ``model``
            with ``live = model.state_dict()``. They use ``torch`` and ``re``. Empty where nothing can be applied.
            Those of several proposals are run in their order.
        selection: The same for a checkpoint of ours; None where a `Selection` cannot do it.
        candidates: What it could be, where it is unknown.
    """

    kind: ProposalKind
    certainty: Certainty
    summary: str
    reason: str
    covers: tuple[Pair, ...]
    code: tuple[str, ...] = ()
    selection: SelectionPart | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def is_applied(self) -> bool:
        """Whether the code for everything together holds it."""
        return self.certainty != "unknown"


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything that differs between the tensors of a file and those of a model, by name.

    Each tensor of the file is in one of ``matched``, ``shape``, ``dtype`` and ``unexpected``; each of the model in one
    of ``matched``, ``shape``, ``dtype`` and ``missing``.

    Attributes:
        matched: Names of tensors with the same shape and dtype in both.
        shape: Those whose shapes differ, and maybe their dtypes too.
        dtype: Those whose dtypes alone differ.
        missing: What the model has and the file has not.
        unexpected: What the file has and the model has not.
        proposals: In the order in which they are applied; those that are unknown come last.
        missing_after: Names in the model that nothing is there for, with all proposals applied that are not unknown.
        unexpected_after: Names that are left over then.
        shape_after: Names whose shapes differ then.
    """

    matched: tuple[str, ...] = ()
    shape: tuple[Change, ...] = ()
    dtype: tuple[Change, ...] = ()
    missing: tuple[TensorFacts, ...] = ()
    unexpected: tuple[TensorFacts, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    missing_after: tuple[str, ...] = ()
    unexpected_after: tuple[str, ...] = ()
    shape_after: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the file loads into the model as it is, strictly."""
        return not (self.shape or self.dtype or self.missing or self.unexpected)

    @property
    def fits_after(self) -> bool:
        """Whether it does with all proposals applied that are not unknown."""
        return not (self.missing_after or self.unexpected_after or self.shape_after)

    def code(self) -> tuple[str, ...]:
        """Return the lines that apply all proposals that are not unknown, and load the result.

        They begin with ``state``, the tensors of the file by name, and with the module ``model``.
        """
        lines = [line for proposal in self.proposals if proposal.is_applied for line in proposal.code]
        if not lines:
            return ()
        used = [name for name in ("re", "torch") if any(f"{name}." in line for line in lines)]
        imports = [f"import {name}" for name in used]
        # The state dict of a module that is on the meta device would have no elements to keep.
        begin = ["live = model.state_dict()"] if any("live[" in line or "live:" in line for line in lines) else []
        strict = "" if self.fits_after else ", strict=False"
        left = len(self.missing_after) + len(self.unexpected_after)
        note = "" if self.fits_after else f"  # {left} names are left: look at what is returned"
        if self.shape_after:
            note += f"; {len(self.shape_after)} shapes still differ, and it will refuse them"
        return (*imports, *begin, *lines, f"model.load_state_dict(state{strict}){note}")


def selection_code(proposals: tuple[Proposal, ...], *, entry: str = "model") -> str | None:
    """Return the `Selection` that applies proposals to a checkpoint of ours.

    Args:
        proposals: Those that are unknown are left out.
        entry: The entry of the model.

    Returns:
        An expression; None where there is nothing to say, or one of them is beyond a selection.
    """
    applied = [proposal for proposal in proposals if proposal.is_applied]
    parts = [proposal.selection for proposal in applied]
    if not applied or any(part is None for part in parts):
        return None
    arguments: dict[str, Any] = {}
    for part in parts:
        assert part is not None
        for old, new in part.rename.items():
            arguments.setdefault("rename", {})[f"{entry}/{old}"] = f"{entry}/{new}"
        if part.exclude:
            arguments.setdefault("exclude", []).extend(f"{entry}/{name}" for name in part.exclude)
        for name, policy in part.resize.items():
            arguments.setdefault("resize", {})[f"{entry}/{name}"] = policy
        if part.dtype is not None:
            arguments["dtype"] = part.dtype
    if not arguments:
        return None
    return f"Selection({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
