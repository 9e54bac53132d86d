"""A storage that is a dictionary: for tests that are about something else."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable

from ckptmgr.format.layout import check_key
from ckptmgr.storage.protocol import Buffer, Entry

__all__ = ["MemoryStorage"]


class MemoryStorage:
    """Objects in the memory of this process.

    Args:
        objects: Shared between several storages, it makes them views of one place, as several processes have it.

    Attributes:
        objects: What is stored, by key; a test may damage it.
    """

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = {} if objects is None else objects
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """A name for messages."""
        return "memory-fake://"

    def list(self, prefix: str = "") -> list[Entry]:
        """List every object whose key starts with ``prefix``, sorted by key."""
        with self._lock:
            return sorted(Entry(key, len(content)) for key, content in self.objects.items() if key.startswith(prefix))

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes ``[start, stop)`` of an object, clipped to its end."""
        content = self._get(key)
        return content[start : len(content) if stop is None else max(start, stop)]

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        """Fill ``buffer`` from offset ``start``."""
        content = self._get(key)[start : start + buffer.nbytes]
        if len(content) < buffer.nbytes:
            raise EOFError(f"{key!r} ends before {start + buffer.nbytes} bytes")
        buffer[:] = content

    def write(self, key: str, parts: Iterable[Buffer], *, exclusive: bool = False) -> None:
        """Store the concatenated parts; an existing object is never replaced."""
        check_key(key)
        content = b"".join(bytes(part) for part in parts)
        with self._lock:
            if key in self.objects:
                raise FileExistsError(errno.EEXIST, f"{key!r} exists already")
            self.objects[key] = content

    def delete(self, key: str) -> None:
        """Remove an object. A missing one is no error."""
        check_key(key)
        with self._lock:
            self.objects.pop(key, None)

    def _get(self, key: str) -> bytes:
        check_key(key)
        try:
            return self.objects[key]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, f"no {key!r}") from None
