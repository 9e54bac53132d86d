"""Bytes of a file, read in small pieces: local, behind a URL, in memory, or a part of another source."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ckptmgr.errors import CheckpointNotFoundError, StorageError
from ckptmgr.storage.failures import storage_error
from ckptmgr.storage.filesystem import open_filesystem
from ckptmgr.storage.redact import Redactor, printable_url

__all__ = ["ByteSource", "Bytes", "LocalFile", "Part", "RemoteFile", "Window", "remote_failure"]

_CHUNK_NBYTES = 1 << 18
_MAX_CHUNKS = 16


class ByteSource(Protocol):
    """A sequence of bytes of a known length."""

    @property
    def nbytes(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, nbytes: int) -> bytes:
        """Return the bytes from ``start`` on, at most ``nbytes`` of them; fewer only at the end.

        Raises:
            StorageError: They cannot be read.
        """
        ...


class Bytes:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def read(self, start: int, nbytes: int) -> bytes:
        """Return a slice."""
        return self._data[max(0, start) : max(0, start) + max(0, nbytes)]


class Part:
    """A span of another source: a record of an archive, or what follows a header.

    Args:
        whole: What it is a part of.
        start: Its first byte.
        nbytes: Its length; clipped to the end of the whole.
    """

    def __init__(self, whole: ByteSource, start: int, nbytes: int | None = None) -> None:
        self._whole = whole
        self._start = start
        rest = max(0, whole.nbytes - start)
        self.nbytes = rest if nbytes is None else max(0, min(nbytes, rest))

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the part."""
        start = max(0, start)
        wanted = min(nbytes, self.nbytes - start)
        return self._whole.read(self._start + start, wanted) if wanted > 0 else b""


class LocalFile:
    """A regular file, open for reading. A pipe or a device is refused: it would block, or never end.

    Raises:
        CheckpointNotFoundError: There is none.
        StorageError: It cannot be opened, or is no regular file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as cause:
            raise CheckpointNotFoundError(f"nothing is at {path}", next="check how the place is spelled") from cause
        except (OSError, ValueError) as cause:
            raise storage_error("read", path, None, cause) from cause
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise StorageError(f"{path} is not a regular file", why="it is a pipe, a socket or a device")
        self.nbytes = status.st_size
        self.is_sparse = status.st_size >= 1 << 16 and status.st_blocks * 512 < status.st_size // 2

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the file."""
        pieces: list[bytes] = []
        missing = min(nbytes, self.nbytes - max(0, start))
        start = max(0, start)
        while missing > 0:
            try:
                piece = os.pread(self._fd, missing, start)
            except OSError as cause:
                raise storage_error("read", self.path, None, cause) from cause
            if not piece:
                break
            pieces.append(piece)
            start += len(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close it. A second time does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def remote_failure(url: str, cause: BaseException, redact: Callable[[str], str]) -> StorageError | FileNotFoundError:
    """Return the error to raise for what a filesystem raised: without credentials."""
    place = printable_url(url)
    if isinstance(cause, FileNotFoundError):
        return CheckpointNotFoundError(f"nothing is at {place}", next="check how the place is spelled")
    return StorageError(f"cannot read {place}", why=redact(f"{type(cause).__name__}: {cause}".rstrip(": ")))


class RemoteFile:
    """A file behind an fsspec URL, read by ranged requests; the last chunks are kept.

    Attributes:
        is_file: Whether it is one, and no directory.

    Raises:
        CheckpointNotFoundError: There is none.
        StorageError: It cannot be reached.
        UsageError: No such protocol.
    """

    is_sparse = False

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        options = dict(storage_options or {})
        self._redact = Redactor(url, options)
        self._url = url
        self._chunks: dict[int, bytes] = {}
        self._fs, self._path = open_filesystem(url, printable_url(url), options)
        try:
            info = self._fs.info(self._path)
            self.nbytes = int(info["size"] or 0)
            self.is_file = info["type"] == "file"
        except Exception as cause:
            raise remote_failure(url, cause, self._redact) from cause

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the file."""
        start = max(0, start)
        stop = min(self.nbytes, start + nbytes)
        if stop <= start:
            return b""
        if stop - start > _CHUNK_NBYTES:
            return self._fetch(start, stop)
        first, last = start // _CHUNK_NBYTES, (stop - 1) // _CHUNK_NBYTES
        data = b"".join(self._chunk(number) for number in range(first, last + 1))
        return data[start - first * _CHUNK_NBYTES : stop - first * _CHUNK_NBYTES]

    def _chunk(self, number: int) -> bytes:
        # Many small reads lie near each other: headers, names, versions.
        if number not in self._chunks:
            start = number * _CHUNK_NBYTES
            fetched = self._fetch(start, min(self.nbytes, start + _CHUNK_NBYTES))
            if len(self._chunks) >= _MAX_CHUNKS:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[number] = fetched
        return self._chunks[number]

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._path, start=start, end=stop))
        except Exception as cause:
            raise remote_failure(self._url, cause, self._redact) from cause

    def close(self) -> None:
        """Nothing is held open."""


class Window:
    """A position in a source, with a buffer of 256 KiB behind it: small reads cost no call each.

    Attributes:
        position: Of the next byte that is read.
    """

    def __init__(self, source: ByteSource, start: int = 0) -> None:
        self._source = source
        self._buffer = b""
        self._first = start
        self.position = start

    @property
    def remaining(self) -> int:
        """How many bytes follow."""
        return self._source.nbytes - self.position

    def read(self, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes.

        Raises:
            EOFError: The source ends before.
        """
        offset = self.position - self._first
        stop = offset + nbytes
        if offset < 0 or stop > len(self._buffer):
            if nbytes > self.remaining:
                raise EOFError(f"{nbytes} bytes are wanted at {self.position}, {max(0, self.remaining)} are there")
            self._buffer = self._source.read(self.position, max(nbytes, _CHUNK_NBYTES))
            self._first, offset, stop = self.position, 0, nbytes
            if len(self._buffer) < nbytes:
                raise EOFError(f"the file became shorter while it was read, at {self.position}")
        self.position += nbytes
        return self._buffer[offset:stop]

    def peek(self, nbytes: int) -> bytes:
        """Return the next bytes, fewer at the end, and stay before them."""
        position = self.position
        found = self.read(min(nbytes, max(0, self.remaining)))
        self.position = position
        return found

    def skip(self, nbytes: int) -> None:
        """Go on without reading.

        Raises:
            EOFError: The source ends before.
        """
        if nbytes < 0 or nbytes > self.remaining:
            raise EOFError(f"{nbytes} bytes are wanted at {self.position}, {max(0, self.remaining)} are there")
        self.position += nbytes

    def read_line(self, limit: int) -> bytes:
        """Return the bytes before the next newline, and pass it.

        Raises:
            EOFError: No newline follows.
            ValueError: The line is longer than ``limit`` bytes.
        """
        nbytes = _CHUNK_NBYTES
        while True:
            offset = self.position - self._first
            if not 0 <= offset < len(self._buffer):
                self.peek(1)
                offset = self.position - self._first
            end = self._buffer.find(b"\n", offset, offset + limit + 1)
            if end >= 0:
                self.position += end + 1 - offset
                return self._buffer[offset:end]
            if len(self._buffer) - offset > limit:
                raise ValueError(f"a line of more than {limit} bytes")
            if len(self._buffer) - offset >= self.remaining:
                raise EOFError("the file ends within a line")
            # From here on, and twice as much each time: a long line costs as much as a short one per byte.
            nbytes *= 2
            self._buffer = self._source.read(self.position, nbytes)
            self._first = self.position

    def uint(self, nbytes: int) -> int:
        """Return an unsigned integer, little-endian."""
        return int.from_bytes(self.read(nbytes), "little")
