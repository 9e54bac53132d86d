"""A file's tensors as they would be after the proposals that have been made so far: what is left is looked at next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Pair, Proposal

__all__ = ["MAX_NAME", "Draft", "is_proposable"]

MAX_NAME = 512
"""Longer names are compared as they are, and nothing is proposed for them. In characters."""


def is_proposable(name: str) -> bool:
    """Say whether anything can be proposed for a name; a star of its own could not be told from a wildcard."""
    return len(name) <= MAX_NAME and "*" not in name


class Draft:
    """What a state dict would hold after each proposal.

    Args:
        saved: The file's tensors.
        live: The model's.

    Attributes:
        current: The file's tensors, by the names that they have by now.
        live: The model's, by name.
        origin: Name in ``current`` → the names that it had in the file.
        proposals: Those that were made.
        is_in_order: Whether both list their tensors in an order of their own: a sorted one tells nothing.
    """

    def __init__(self, saved: Iterable[TensorFacts], live: Iterable[TensorFacts]) -> None:
        self.current = {tensor.name: tensor for tensor in saved}
        self.live = {tensor.name: tensor for tensor in live}
        self.origin: dict[str, tuple[str, ...]] = {name: (name,) for name in self.current}
        self.proposals: list[Proposal] = []
        orders = list(self.current), list(self.live)
        self.is_in_order = all(names != sorted(names) for names in orders)

    def missing(self) -> list[TensorFacts]:
        """Return what the model has and nothing is there for, as far as anything can be proposed for it."""
        return [it for name, it in self.live.items() if name not in self.current and is_proposable(name)]

    def unexpected(self) -> list[TensorFacts]:
        """Return what is left over, as far as anything can be proposed for it."""
        return [it for name, it in self.current.items() if name not in self.live and is_proposable(name)]

    def differing(self) -> list[tuple[TensorFacts, TensorFacts]]:
        """Return what is in both with different shapes, the file's first."""
        both = ((it, self.live[name]) for name, it in self.current.items() if name in self.live)
        return [(saved, live) for saved, live in both if saved.shape != live.shape and is_proposable(saved.name)]

    def pairs(self, names: Mapping[str, str | None] | Iterable[tuple[str, str | None]]) -> tuple[Pair, ...]:
        """Return the names in the file and in the model for names of now, and what they become."""
        items = names.items() if isinstance(names, Mapping) else names
        return tuple((old, new) for name, new in items for old in self.origin.get(name, (name,)))

    def propose(self, proposal: Proposal) -> None:
        """Note a proposal. What it does is said by the other methods."""
        self.proposals.append(proposal)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names, all at once."""
        self.current = {
            names.get(name, name): replace(it, name=names.get(name, name)) for name, it in self.current.items()
        }
        self.origin = {names.get(name, name): old for name, old in self.origin.items()}

    def put(self, tensor: TensorFacts, taken: Sequence[str]) -> None:
        """Put a tensor that is made of others, which go away unless they keep their names."""
        origin = tuple(old for name in taken for old in self.origin.get(name, (name,)))
        for name in taken:
            if name != tensor.name:
                self.drop(name)
        self.current[tensor.name], self.origin[tensor.name] = tensor, origin

    def copy_from(self, tensor: TensorFacts, source: str | None) -> None:
        """Fill a name from another tensor, which stays, or from the model itself."""
        self.current[tensor.name] = tensor
        self.origin[tensor.name] = self.origin.get(source, ()) if source is not None else ()

    def drop(self, name: str) -> None:
        """Take a tensor out."""
        self.current.pop(name, None)
        self.origin.pop(name, None)
