"""What a storage must do. Four verbs are enough; everything else is built from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

__all__ = ["Buffer", "CopiesFrom", "Entry", "HoldsTemporary", "Storage"]

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One stored object: its key relative to the root, and its size in bytes."""

    key: str
    nbytes: int


@runtime_checkable
class Storage(Protocol):
    """Named, write-once objects under one root.

    Keys are relative, use ``/``, and match the grammar of ``format.layout``. No operation overwrites or renames an
    object that a reader could see. Every method raises `StorageError` where the storage fails for a reason of its own.
    """

    @property
    def url(self) -> str:
        """Where the root is, fit for printing: it holds no credentials."""
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """List every object whose key starts with ``prefix`` (empty, or ending in ``/``), at any depth, sorted by key.

        Objects whose write is under way, or was cut off, are not listed. A missing root is an empty list.
        """
        ...

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes ``[start, stop)`` of an object, clipped to its end.

        Raises:
            FileNotFoundError: No such object.
        """
        ...

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        """Fill ``buffer`` (writable, one-dimensional bytes) from offset ``start``.

        Raises:
            FileNotFoundError: No such object.
            EOFError: The object ends before the buffer is full.
        """
        ...

    def write(self, key: str, parts: Iterable[Buffer], *, exclusive: bool = False) -> None:
        """Store the concatenated parts. When this returns, the object is durable; until then nobody sees it.

        ``parts`` is consumed in order, one part held at a time. A storage that retries iterates it again, so only what
        can be iterated again (a list, not a generator) is ever retried. If it raises, nothing is stored.

        Args:
            key: Name of the object. Without ``exclusive`` the caller guarantees that it is unused.
            parts: Buffers of any size.
            exclusive: Of several writers of one key exactly one succeeds. For small records.

        Raises:
            FileExistsError: ``exclusive``, and the key is taken. What is stored there is unchanged.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object durably. A missing one is no error."""
        ...


@runtime_checkable
class HoldsTemporary(Protocol):
    """A storage in which a write that was cut off leaves a temporary object behind."""

    def list_temporary(self, prefix: str = "") -> Sequence[Entry]:
        """List the temporary objects: what cut-off writes have left, and what running ones are writing."""
        ...

    def delete_temporary(self, key: str) -> None:
        """Remove one of them. Only for writers that are known to be gone, or fenced."""
        ...


@runtime_checkable
class CopiesFrom(Protocol):
    """A storage that can have an object copied by the server, so that its bytes do not pass through this process."""

    def copy_from(self, source: Storage, source_key: str, key: str) -> bool:
        """Copy an object of another storage under an unused key, durably and as a whole.

        The bytes are not looked at: whoever needs to know that they are right compares digests when they are read.

        Returns:
            Whether it was copied; False where the server cannot, because the other storage is not its own.

        Raises:
            FileNotFoundError: No such object.
        """
        ...
