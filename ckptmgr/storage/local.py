"""Durable objects in a directory of a POSIX filesystem."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptmgr.errors import UsageError
from ckptmgr.format.layout import ATTEMPTS, CHECKPOINTS, check_key
from ckptmgr.storage.failures import failing_as, storage_error
from ckptmgr.storage.posix import fsync, link_or_rename, write_all
from ckptmgr.storage.protocol import Buffer, Entry

__all__ = ["LocalStorage"]

_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{16}", re.ASCII)
_READ_NBYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_FOLDER_RACES = 16


class LocalStorage:
    """Objects as files below one directory; every name is published whole, durable, and never over another.

    Keys are walked with directory descriptors and without following links, so nothing below the root can lead out of
    it; the root itself may be a link. A write goes to a hidden temporary name beside its target (``.tmp-<pid>-<hex>``),
    which a killed process leaves behind: `list_temporary` shows them, `delete_temporary` removes one.

    An error while the directory is synchronised, the very last step, leaves the new object in place: it is whole, and
    a reader may already rely on it.

    Args:
        root: Directory, created by the first write. ``~`` is expanded.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 - resolve() would follow links
        self._synced: set[tuple[str, ...]] = set()
        self._unsynced: dict[Path, None] = {}

    @property
    def url(self) -> str:
        """The absolute path of the root."""
        return str(self._root)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def list(self, prefix: str = "") -> list[Entry]:
        """List every object whose key starts with ``prefix``, at any depth, sorted by key."""
        return [entry for entry in self._walk(prefix) if _is_key(entry.key)]

    def list_temporary(self, prefix: str = "") -> Sequence[Entry]:
        """List what cut-off writes have left, and what running ones are writing; the name holds the writer's pid."""
        return [entry for entry in self._walk(prefix) if _TEMPORARY.fullmatch(entry.key.rpartition("/")[2])]

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes ``[start, stop)`` of an object, clipped to its end."""
        with failing_as("read", self.url, key), self._opened(key) as (fd, nbytes):
            position = min(start, nbytes)
            end = nbytes if stop is None else min(stop, nbytes)
            chunks = []
            while position < end:
                chunk = os.pread(fd, min(end - position, _READ_NBYTES), position)
                if not chunk:
                    break
                chunks.append(chunk)
                position += len(chunk)
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        """Fill ``buffer`` from offset ``start``, without a copy in between."""
        with failing_as("read", self.url, key), self._opened(key) as (fd, nbytes):
            done = 0
            while done < buffer.nbytes:
                count = os.preadv(fd, [buffer[done : done + _READ_NBYTES]], start + done)
                if count == 0:
                    raise EOFError(f"{key!r} in {self.url} has {nbytes} bytes, {start + buffer.nbytes} were wanted")
                done += count

    def write(self, key: str, parts: Iterable[Buffer], *, exclusive: bool = False) -> None:
        """Store the concatenated parts durably. An existing object is never replaced, exclusive or not."""
        *folders, name = check_key(key).split("/")
        folder, temporary, fd = self._create_temporary(key, folders)
        try:
            try:
                for part in parts:
                    with self._writing(key):
                        write_all(fd, part)
                with self._writing(key):
                    # FORMAT: the bytes before the name, or power loss may leave a name without its bytes.
                    fsync(fd)
                    self._publish(key, fd, folder, temporary, name, exclusive=exclusive)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            finally:
                os.close(fd)
            with self._writing(key):
                # FORMAT: fsync the directory, or the name may not survive power loss.
                fsync(folder)
        finally:
            os.close(folder)

    def delete(self, key: str) -> None:
        """Remove an object durably, and the directories that this leaves empty. A missing one is no error."""
        self._delete(check_key(key))

    def delete_temporary(self, key: str) -> None:
        """Remove one key that `list_temporary` has listed. Only for writers that are known to be gone.

        Raises:
            UsageError: The key does not name a temporary file.
        """
        folder, _, name = key.rpartition("/")
        if not _TEMPORARY.fullmatch(name) or (folder and not _is_key(folder)):
            raise UsageError(f"{key!r} is not the name of a temporary file")
        self._delete(key)

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            with failing_as("write", self.url, key):
                yield
        except FileNotFoundError as cause:
            why = "the directory was removed while it was written to"
            raise storage_error("write", self.url, key, cause, why=why) from cause

    def _publish(self, key: str, fd: int, folder: int, temporary: str, name: str, *, exclusive: bool) -> None:
        try:
            link_or_rename(temporary, name, folder=folder, must_be_atomic=exclusive)
        except FileExistsError:
            # A file server may repeat a request whose reply was lost, and then refuse what it has already done.
            if not _is_file_of(fd, name, folder):
                raise FileExistsError(errno.EEXIST, f"{key!r} exists already in {self.url}") from None
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)

    def _create_temporary(self, key: str, folders: Sequence[str]) -> tuple[int, str, int]:
        """Make the directories of a key, durably, and open a new file in the last: its folder, its name, itself."""
        temporary = f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._writing(key):
            for race in range(_MAX_FOLDER_RACES):
                try:
                    folder = self._make_folder(folders)
                    try:
                        # 0o666 less the umask: the team must be able to read what a job has written.
                        return folder, temporary, os.open(temporary, flags, 0o666, dir_fd=folder)
                    except BaseException:
                        os.close(folder)
                        raise
                except FileNotFoundError:
                    # A deleter has removed the directory while it was still empty.
                    self._synced.clear()
                    if race == _MAX_FOLDER_RACES - 1:
                        raise
                except FileExistsError as cause:
                    # Not what a caller takes this error for.
                    why = "a symbolic link that leads nowhere stands in place of the directory"
                    raise storage_error("write", self.url, key, cause, why=why, next="remove the link") from cause
        raise AssertionError("unreachable")

    def _make_folder(self, folders: Sequence[str]) -> int:
        folder = self._make_root()
        try:
            for depth, name in enumerate(folders, start=1):
                path = tuple(folders[:depth])
                created = False
                with suppress(FileExistsError):
                    os.mkdir(name, 0o777, dir_fd=folder)
                    created = True
                if created or path not in self._synced:
                    # Whoever made it may not have come to this: only what we have synchronised ourselves is certain.
                    fsync(folder)
                    self._synced.add(path)
                inner = self._open_folder(name, folder)
                os.close(folder)
                folder = inner
        except BaseException:
            os.close(folder)
            raise
        return folder

    def _make_root(self) -> int:
        if () in self._synced:
            try:
                return os.open(self._root, _FOLDER)
            except FileNotFoundError:
                self._synced.clear()
        path = self._root
        missing = []
        while not path.exists():
            missing.append(path)
            path = path.parent
        # Kept until it is done: after a failure in between they are there, but not for certain.
        self._unsynced.update(dict.fromkeys(reversed(missing)))
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
        for path in list(self._unsynced):
            _fsync_folder(path.parent)
            self._unsynced.pop(path, None)
        if not missing:
            # Another process may have made it just now. A parent that is closed to us cannot be that fresh.
            with suppress(PermissionError):
                _fsync_folder(self._root.parent)
        self._synced.add(())
        return os.open(self._root, _FOLDER)

    def _open_folder(self, name: str, folder: int) -> int:
        try:
            return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        except NotADirectoryError:
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, f"{name!r} is a symbolic link") from None
            raise

    @contextmanager
    def _folder(self, folders: Iterable[str]) -> Iterator[int]:
        """Open an existing directory below the root."""
        folder = os.open(self._root, _FOLDER)
        try:
            for name in folders:
                try:
                    inner = self._open_folder(name, folder)
                except NotADirectoryError as cause:
                    raise FileNotFoundError(errno.ENOENT, f"{name!r} is an object, nothing lies below it") from cause
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        """Open an object for reading: its descriptor and its size."""
        *folders, name = check_key(key).split("/")
        # Without O_NONBLOCK a FIFO under this name would hang the reader for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            with self._folder(folders) as folder:
                fd = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, f"no {key!r} in {self.url}") from None
        except OSError as cause:
            if cause.errno == errno.ELOOP:
                raise storage_error(
                    "read", self.url, key, cause, why="it is, or lies behind, a symbolic link"
                ) from cause
            raise
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise FileNotFoundError(errno.ENOENT, f"no {key!r} in {self.url}, but a directory")
            if not stat.S_ISREG(status.st_mode):
                why = "it is a device, a pipe or a socket"
                raise storage_error("read", self.url, key, OSError(errno.EINVAL, why))
            yield fd, status.st_size
        finally:
            os.close(fd)

    def _walk(self, prefix: str) -> Sequence[Entry]:
        if prefix and (not prefix.endswith("/") or not _is_key(prefix[:-1])):
            raise UsageError(
                f"{prefix!r} is not a prefix of keys", why="a prefix is empty, or names and '/', ending so"
            )
        folders = prefix.split("/")[:-1]
        with failing_as("list", self.url, None), suppress(FileNotFoundError), self._folder(folders) as folder:
            return sorted(self._found(folder, prefix))
        return []

    def _found(self, folder: int, prefix: str) -> Iterator[Entry]:
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    inner.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        yield Entry(prefix + entry.name, entry.stat(follow_symlinks=False).st_size)
                elif f"{prefix}{entry.name}/".startswith((ATTEMPTS, CHECKPOINTS)) and entry.is_dir():
                    # Not to see them would be to train from nothing, or from an older step, without a word.
                    raise OSError(
                        errno.ELOOP, f"{prefix}{entry.name} is a symbolic link; only the run itself may be one"
                    )
        for name in inner:
            # Another process may delete while we look.
            with suppress(FileNotFoundError):
                child = self._open_folder(name, folder)
                try:
                    yield from self._found(child, f"{prefix}{name}/")
                finally:
                    os.close(child)

    def _delete(self, key: str) -> None:
        *folders, name = key.split("/")
        with failing_as("delete", self.url, key), suppress(FileNotFoundError), self._folder(folders) as folder:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            # Also where the name was missing: who removed it may have died before this.
            fsync(folder)
        with failing_as("delete", self.url, key), suppress(FileNotFoundError):
            while folders:
                with self._folder(folders[:-1]) as outer:
                    try:
                        os.rmdir(folders[-1], dir_fd=outer)
                    except OSError as cause:
                        if cause.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY):
                            return
                        raise
                    self._synced.discard(tuple(folders))
                    fsync(outer)
                folders.pop()


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, _FOLDER)
    try:
        fsync(folder)
    finally:
        os.close(folder)


def _is_file_of(fd: int, name: str, folder: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except UsageError:
        return False
    return True
