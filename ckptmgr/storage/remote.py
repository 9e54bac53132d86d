"""Objects behind any fsspec URL: object stores, and memory for tests."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TypeAlias, TypeVar

from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ckptmgr.errors import StorageError, UsageError
from ckptmgr.format.layout import check_key
from ckptmgr.storage.exclusive import creates_exclusively
from ckptmgr.storage.failures import storage_error
from ckptmgr.storage.filesystem import find_files, open_filesystem
from ckptmgr.storage.protocol import Buffer, Entry, Storage
from ckptmgr.storage.redact import Redactor, printable_url
from ckptmgr.storage.transient import retrying

__all__ = ["FsspecStorage"]

_log = logging.getLogger("ckptmgr.storage")
_T = TypeVar("_T")
_Span: TypeAlias = tuple[int, int]

_SMALL_NBYTES = 16 << 20  # one request, sent again as a whole if it fails
_BLOCK_NBYTES = 64 << 20  # S3 takes 10,000 parts: files up to 640 GB
_EXCLUSIVE_NBYTES = 64 << 20
_READ_NBYTES = 16 << 20
_READS_AT_ONCE = 4

_proven: set[str] = set()
_proving = threading.Lock()
# MemoryFileSystem looks and then stores; between threads that is two steps.
_memory_lock = threading.Lock()


class FsspecStorage:
    """Objects below one URL of an fsspec filesystem.

    Nothing is renamed, no listing is cached, and no fsspec transaction is used. Small objects are one request each,
    repeated while the failure is transient. Larger ones are streamed in parts of 64 MiB; the filesystem repeats a
    part, and nothing is published before the last one. (That holds for object stores. A filesystem that shows a file
    while it is written, such as SFTP, shows a torn one after a kill; sizes and digests tell.)

    Before its first exclusive create a process proves by a few small objects that the root keeps exclusive creates
    apart; without that two runs could both own an attempt.

    Args:
        url: URL of the root; credentials in it are used, and never shown.
        storage_options: Passed to the filesystem, never shown.
        single_writer: Where the storage has no exclusive create, look and then write, with a warning.

    Raises:
        UsageError: No such protocol, or its package is not installed.
    """

    def __init__(
        self, url: str, *, storage_options: Mapping[str, Any] | None = None, single_writer: bool = False
    ) -> None:
        self._given = url
        self._options = dict(storage_options or {})
        self._url = printable_url(url)
        self._redact = Redactor(url, self._options)
        self._single_writer = single_writer
        self._pid = -1
        self._filesystem()

    @property
    def url(self) -> str:
        """The URL of the root, without credentials and query."""
        return self._url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def __reduce__(self) -> tuple[object, ...]:
        # A pickle would carry the credentials to wherever it is kept.
        raise TypeError(f"{self!r} is not pickled, because it holds credentials: open it again in the other process")

    def list(self, prefix: str = "") -> list[Entry]:
        """List every object whose key starts with ``prefix``, at any depth, sorted by key."""
        if prefix and not prefix.endswith("/"):
            raise UsageError(f"{prefix!r} is not a prefix of keys", why="a prefix is empty or ends in '/'")
        if prefix:
            check_key(prefix[:-1])
        fs = self._filesystem()
        path = f"{self._root}/{prefix}".rstrip("/")
        base = f"{self._root}/"
        entries = []
        for info in self._run("list", None, lambda: find_files(fs, path)):
            name = info["name"]
            key = name.removeprefix(base)
            if name.startswith(base) and key.startswith(prefix) and _is_key(key):
                entries.append(Entry(key, int(info["size"] or 0)))
        return sorted(entries)

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes ``[start, stop)`` of an object, clipped to its end."""
        path = self._path(key)
        if start == 0 and stop is None:
            fs = self._filesystem()
            return bytes(self._run("read", key, lambda: fs.cat_file(path)))
        if stop is None or stop <= start:
            stop = self._nbytes(key) if stop is None else start
        return self._read_spans(key, [(start, stop)])[0]

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        """Fill ``buffer`` from offset ``start``, by a few requests at once."""
        stop = start + buffer.nbytes
        spans = [(first, min(first + _READ_NBYTES, stop)) for first in range(start, stop, _READ_NBYTES)]
        if not spans:
            self._nbytes(key)
        for index in range(0, len(spans), _READS_AT_ONCE):
            window = spans[index : index + _READS_AT_ONCE]
            for (first, last), chunk in zip(window, self._read_spans(key, window), strict=True):
                if len(chunk) != last - first:
                    raise EOFError(f"{key!r} in {self.url} has {self._nbytes(key)} bytes, {stop} were wanted")
                buffer[first - start : last - start] = chunk

    def write(self, key: str, parts: Iterable[Buffer], *, exclusive: bool = False) -> None:
        """Store the concatenated parts; at most 64 MiB with ``exclusive``, without limit otherwise."""
        path = self._path(key)
        fs = self._filesystem()
        if exclusive:
            self._create(key, _gather(key, parts))
            return
        gathered = bytearray()
        remaining = iter(parts)
        for part in remaining:
            view = memoryview(part).cast("B") if len(memoryview(part)) else memoryview(b"")
            if len(gathered) + view.nbytes > _SMALL_NBYTES and not isinstance(fs, MemoryFileSystem):
                self._stream(key, chain((gathered, view), remaining))
                return
            gathered += view
        content = bytes(gathered)
        with self._writing(key):
            self._run("write", key, lambda: fs.pipe_file(path, content))

    def copy_from(self, source: Storage, source_key: str, key: str) -> bool:
        """Let the server copy an object; False where the other storage is not reached in the very same way."""
        if not isinstance(source, FsspecStorage):
            return False
        old, new = source._path(source_key), self._path(key)
        fs, others = self._filesystem(), source._filesystem()
        if type(fs) is not type(others) or fs.storage_options != others.storage_options:
            return False
        try:
            self._run("copy", key, lambda: fs.cp_file(old, new))
        except StorageError as error:
            if isinstance(error.__cause__, NotImplementedError):
                return False
            raise
        return True

    def delete(self, key: str) -> None:
        """Remove an object. A missing one is no error."""
        path = self._path(key)
        fs = self._filesystem()
        with suppress(FileNotFoundError):
            self._run("delete", key, lambda: fs.rm_file(path))

    def _filesystem(self) -> AbstractFileSystem:
        # The event loop and the connections of a parent process do not survive a fork.
        if self._pid != os.getpid():
            self._fs, root = open_filesystem(self._given, self._url, self._options)
            self._root = root.rstrip("/")
            self._pid = os.getpid()
        return self._fs

    def _path(self, key: str) -> str:
        check_key(key)
        self._filesystem()
        return f"{self._root}/{key}"

    def _run(self, action: str, key: str | None, call: Callable[[], _T]) -> _T:
        try:
            what = f"{action} {key or ''} in {self.url}"
            return retrying(what, call, describe=lambda error: self._redact(f"{type(error).__name__}: {error}"))
        except (FileNotFoundError, FileExistsError, StorageError):
            raise
        except Exception as cause:
            raise self._failure(action, key, cause) from cause

    def _failure(self, action: str, key: str | None, cause: BaseException) -> StorageError:
        advice = None
        if isinstance(cause, PermissionError) or "Credential" in type(cause).__name__:
            advice = "check the credentials, and what they may do there"
        elif isinstance(cause, (TimeoutError, ConnectionError)) or "Connect" in type(cause).__name__:
            advice = "check the network and the endpoint; what was committed is untouched"
        why = self._redact(f"{type(cause).__name__}: {cause}".rstrip(": "))
        return storage_error(action, self.url, key, cause, why=why, next=advice)

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError) as cause:
            why = self._redact(f"the bucket or directory does not exist, or is a file ({cause})")
            raise storage_error("write", self.url, key, cause, why=why, next="create it first") from cause

    def _nbytes(self, key: str) -> int:
        path = self._path(key)
        fs = self._filesystem()
        info = self._run("read", key, lambda: fs.info(path))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, f"no {key!r} in {self.url}")
        return int(info["size"])

    def _read_spans(self, key: str, spans: Sequence[_Span]) -> Sequence[bytes]:
        """Read ``[start, stop)`` ranges, each clipped to the end of the object."""
        path = self._path(key)
        fs = self._filesystem()

        def fetch(wanted: Sequence[_Span]) -> Sequence[bytes]:
            starts, stops = [start for start, _ in wanted], [stop for _, stop in wanted]
            if not wanted:
                return []
            return [bytes(chunk) for chunk in fs.cat_ranges([path] * len(wanted), starts, stops, on_error="raise")]

        if all(start < stop for start, stop in spans):
            try:
                return self._run("read", key, lambda: fetch(spans))
            except StorageError:
                # A range that begins behind the end is an error (416) on object stores.
                nbytes = self._nbytes(key)
                if all(stop <= nbytes for _, stop in spans):
                    raise
        else:
            nbytes = self._nbytes(key)
        clipped = [(start, min(stop, nbytes)) for start, stop in spans]
        chunks = iter(self._run("read", key, lambda: fetch([span for span in clipped if span[0] < span[1]])))
        return [next(chunks) if start < stop else b"" for start, stop in clipped]

    def _stream(self, key: str, parts: Iterable[Buffer]) -> None:
        path = self._path(key)
        fs = self._filesystem()

        def attempt(call: Callable[[], _T]) -> _T:
            # Once: the parts are gone, so that only the filesystem, part by part, can try again.
            try:
                return call()
            except Exception as cause:
                raise self._failure("write", key, cause) from cause

        file = attempt(lambda: fs.open(path, "wb", block_size=_BLOCK_NBYTES))
        try:
            for part in parts:
                view = memoryview(part)
                view = view.cast("B") if view.nbytes else memoryview(b"")
                for first in range(0, view.nbytes, _BLOCK_NBYTES):
                    chunk = view[first : first + _BLOCK_NBYTES]
                    attempt(lambda chunk=chunk: file.write(chunk))  # type: ignore[misc]
            attempt(file.close)
        except BaseException:
            self._abort(file, path)
            raise

    def _abort(self, file: Any, path: str) -> None:
        """Leave nothing of a file that was not closed: neither the object nor its uploaded parts."""
        fs = self._filesystem()
        try:
            if isinstance(file, AbstractBufferedFile):
                file.discard()
                # Its finalizer would close it, and closing publishes what has come so far.
                file.closed = True
            else:
                file.close()
            # The caller's name is unused, so whatever is there by now is a part of this write.
            if fs.exists(path):
                fs.rm_file(path)
        except Exception as error:
            _log.warning("could not clear away a cut-off write in %s: %s", self.url, self._redact(str(error)))

    def _create(self, key: str, content: bytes) -> None:
        path = self._path(key)
        fs = self._filesystem()
        guarded = self._can_create_exclusively()
        try:
            if isinstance(fs, MemoryFileSystem):
                with _memory_lock:
                    fs.pipe_file(path, content, mode="create")
            elif guarded:
                self._run("write", key, lambda: fs.pipe_file(path, content, mode="create"))
            else:
                if self._run("write", key, lambda: fs.exists(path)):
                    raise FileExistsError(errno.EEXIST, f"{key!r} exists already in {self.url}")
                self._run("write", key, lambda: fs.pipe_file(path, content))
        except Exception as cause:
            # The refusal may come from a repeated request whose first reply was lost: what is stored decides. Stores
            # also disagree on the error (SeaweedFS: OSError 22).
            stored = self._stored(key)
            if stored == content:
                return
            if stored is not None:
                raise FileExistsError(errno.EEXIST, f"{key!r} exists already in {self.url}") from cause
            if isinstance(cause, StorageError):
                raise
            raise self._failure("write", key, cause) from cause

    def _stored(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except (FileNotFoundError, StorageError):
            return None

    def _can_create_exclusively(self) -> bool:
        fs = self._filesystem()
        if isinstance(fs, MemoryFileSystem):
            return True
        # Same URL, other endpoint: another storage. The token is a digest of the options, and stays in memory.
        place = f"{fs._fs_token} {self._root}"
        with _proving:
            if place in _proven:
                return True
            with self._writing(".ckptmgr-probe"):
                proven = self._run("write", ".ckptmgr-probe", lambda: creates_exclusively(fs, self._root))
            if proven:
                _proven.add(place)
                return True
        if not self._single_writer:
            raise StorageError(
                f"{self.url} cannot hold a run that several processes might write",
                why="two exclusive creates of one name both succeeded, or were not understood",
                next="choose another location, or pass single_writer=True and make sure that only one process writes",
            )
        _log.warning("%s has no exclusive create: a second writer would not be noticed (single_writer=True)", self.url)
        return False


def _gather(key: str, parts: Iterable[Buffer]) -> bytes:
    gathered = bytearray()
    for part in parts:
        view = memoryview(part)
        if view.nbytes:
            gathered += view.cast("B")
        if len(gathered) > _EXCLUSIVE_NBYTES:
            raise UsageError(f"{key!r} is too large for an exclusive create", why="only one request can be exclusive")
    return bytes(gathered)


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except UsageError:
        return False
    return True
