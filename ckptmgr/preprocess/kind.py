"""What a kind of preprocessor can do: the one protocol of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

__all__ = ["Allow", "PreprocessorKind"]

Allow: TypeAlias = Callable[[str], Any]
"""Imports the class or function of a dotted name, or raises NotAllowedError. The only way to code that a file names."""


@runtime_checkable
class PreprocessorKind(Protocol):
    """Captures, compares, rebuilds and uses one kind of preprocessor.

    A tree is made of nested dicts, lists and tuples of plain values, tensors, NumPy arrays and `StoredFile`. The same
    state gives the same tree, in every process. Name and version are stored: the name stays the same forever, the
    version grows when the tree's form changes.

    Attributes:
        name: Stable short word, such as ``tokenizers``.
        version: Of the tree's form.
        changes_in_training: Whether the state is trained with the model, so that a checkpoint's is expected to differ
            from the live one. All others are frozen: a difference means that two different preprocessors are at work.
    """

    name: str
    version: int
    changes_in_training: bool

    def handles(self, value: object) -> bool:
        """Say whether the value is of this kind. Imports nothing, and looks at types only."""

    def capture(self, value: Any) -> Any:
        """Return the state as a tree, which may refer to the live tensors and arrays.

        Raises:
            UnsupportedStateError: A part of it has no stored form. Names the part.
        """

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make a new object, as the captured one was.

        Args:
            tree: A captured tree, perhaps from a file that nobody should trust.
            allow: Asked for every class and function that is not of a reviewed library.

        Raises:
            CorruptCheckpointError: The tree is not one of this kind.
            NotAllowedError: It names code that nobody has allowed. Nothing of it was imported.
            UsageError: The library that it needs is not installed.
        """

    def is_restorable(self, value: Any) -> bool:
        """Say whether the live object can take another state in place."""

    def restore(self, value: Any, tree: Any) -> None:
        """Put the state into the live object.

        Raises:
            StateMismatchError: The object cannot take it.
        """

    def encode(self, value: Any, raw: Any) -> Any:
        """Return what the model takes for one raw input: a batch of one as a tensor, or a dict of tensors.

        Raises:
            UsageError: This kind does not know how, or the raw input is not one for it.
        """
