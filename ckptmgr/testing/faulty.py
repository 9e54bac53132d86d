"""A storage that fails, or kills its process, at a chosen operation."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

from ckptmgr.errors import StorageError
from ckptmgr.storage.protocol import Buffer, Entry, Storage

__all__ = ["FaultyStorage", "disk_full"]


def disk_full(point: str) -> Exception:
    """Return the error of a full disk, as a storage of this package reports it."""
    cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = StorageError(f"cannot go on at {point}", why=cause.strerror, next="free some space")
    error.errno = errno.ENOSPC
    error.__cause__ = cause
    return error


class FaultyStorage:
    """Passes everything on to another storage, and counts the points at which a process may die.

    The points of ``write("k", parts)`` are ``write k: start``, ``write k: part 1`` (before part 1 is handed over) and
    so on, ``write k: publish`` (all parts are handed over, nobody sees the object) and ``write k: done`` (stored, but
    the caller was not told). Those of ``delete("k")`` are ``delete k: start`` and ``delete k: done``. Reading counts
    only with ``count_reads``, as ``read k`` and ``list p``.

    Run the work once without a fault, then once for each of ``range(1, len(points) + 1)``.

    Args:
        inner: The storage that does the work.
        fail_at: Number of the point, from 1, at which `error` is raised.
        kill_at: Number of the point, from 1, at which this process is killed with SIGKILL.
        error: Makes the exception; gets the name of the point.
        keep_failing: Fail at every later point as well, as a full disk does.
        count_reads: Reads and listings are points, too.
        on_point: Called at every point with its number and name, before any fault: a hook for other mischief.

    Attributes:
        points: Names of the points passed so far.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        fail_at: int | None = None,
        kill_at: int | None = None,
        error: Callable[[str], Exception] = disk_full,
        keep_failing: bool = False,
        count_reads: bool = False,
        on_point: Callable[[int, str], None] | None = None,
    ) -> None:
        self.inner = inner
        self.points: list[str] = []
        self._fail_at = fail_at
        self._kill_at = kill_at
        self._error = error
        self._keep_failing = keep_failing
        self._count_reads = count_reads
        self._on_point = on_point
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """That of the inner storage."""
        return self.inner.url

    def list(self, prefix: str = "") -> list[Entry]:
        """List as the inner storage does."""
        if self._count_reads:
            self._point(f"list {prefix}")
        return self.inner.list(prefix)

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Read as the inner storage does."""
        if self._count_reads:
            self._point(f"read {key}")
        return self.inner.read(key, start=start, stop=stop)

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        """Read as the inner storage does."""
        if self._count_reads:
            self._point(f"read {key}")
        self.inner.readinto(key, buffer, start=start)

    def write(self, key: str, parts: Iterable[Buffer], *, exclusive: bool = False) -> None:
        """Write as the inner storage does, unless the fault comes first."""
        self._point(f"write {key}: start")
        self.inner.write(key, self._counted(key, parts), exclusive=exclusive)
        self._point(f"write {key}: done")

    def delete(self, key: str) -> None:
        """Delete as the inner storage does, unless the fault comes first."""
        self._point(f"delete {key}: start")
        self.inner.delete(key)
        self._point(f"delete {key}: done")

    def _counted(self, key: str, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        for number, part in enumerate(parts, start=1):
            self._point(f"write {key}: part {number}")
            yield part
        self._point(f"write {key}: publish")

    def _point(self, name: str) -> None:
        with self._lock:
            self.points.append(name)
            number = len(self.points)
        if self._on_point is not None:
            self._on_point(number, name)
        if number == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fail_at is not None and (number == self._fail_at or (self._keep_failing and number > self._fail_at)):
            raise self._error(name)
