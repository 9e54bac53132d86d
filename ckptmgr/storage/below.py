"""A folder of a storage, read as a storage of its own, from a listing that was made before."""

from __future__ import annotations

import builtins
import errno
from collections.abc import Iterable

from ckptmgr.storage.failures import storage_error
from ckptmgr.storage.protocol import Buffer, Entry, Storage

__all__ = ["FolderView"]


class FolderView:
    """One folder below a storage's root, read-only.

    Args:
        storage: The whole.
        prefix: The folder, ending in ``/``; empty for the root itself.
        entries: What a listing of the whole showed in it. It is not listed again.
    """

    def __init__(self, storage: Storage, prefix: str, entries: Iterable[Entry]) -> None:
        self._storage = storage
        self._prefix = prefix
        self._entries = [Entry(entry.key.removeprefix(prefix), entry.nbytes) for entry in entries]

    @property
    def url(self) -> str:
        """Where the folder is."""
        return f"{self._storage.url}/{self._prefix}".rstrip("/")

    def list(self, prefix: str = "") -> builtins.list[Entry]:
        """List what was there when the whole was listed."""
        return [entry for entry in self._entries if entry.key.startswith(prefix)]

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes of an object."""
        return self._storage.read(self._prefix + key, start=start, stop=stop)

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        """Fill a buffer from an object."""
        self._storage.readinto(self._prefix + key, buffer, start=start)

    def write(self, key: str, parts: Iterable[Buffer], *, exclusive: bool = False) -> None:
        """Refuse: what was listed would not be what is there."""
        raise storage_error("write", self.url, key, OSError(errno.EROFS, "it is open for reading alone"))

    def delete(self, key: str) -> None:
        """Refuse, for the same reason."""
        raise storage_error("delete", self.url, key, OSError(errno.EROFS, "it is open for reading alone"))
