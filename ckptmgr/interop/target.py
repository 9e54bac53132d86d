"""Where an export writes: a file or a directory that appears whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ckptmgr.errors import UsageError
from ckptmgr.storage.failures import failing_as
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.posix import fsync, link_or_rename
from ckptmgr.storage.protocol import Storage
from ckptmgr.storage.redact import printable_url

__all__ = ["Target", "open_target"]

_COPY_NBYTES = 16 * 1024 * 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Target(Protocol):
    """Takes the files of one export, in the order in which they become visible."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a new file for writing."""
        ...


def open_target(
    place: str,
    *,
    is_folder: bool,
    force: bool = False,
    is_stale: Callable[[str], bool] = lambda name: False,
    storage_options: dict[str, Any] | None = None,
) -> AbstractContextManager[Target]:
    """Return what an export writes into. Its files are there when the block ends without an exception.

    Local files are written under hidden names, synchronised, and renamed: a directory that is new appears in one step,
    with all its files. What fails leaves nothing behind. On an object store each file is whole or absent.

    Args:
        place: Path or URL of the file, or of the directory.
        is_folder: Which of the two is meant.
        force: Write over what is there. A directory keeps the files that the export has nothing to do with.
        is_stale: Says which files of an earlier export in the directory would be taken for files of this one.
        storage_options: For a URL; never recorded.

    Raises:
        UsageError: Something is there already, and ``force`` was not given; or it is of the other kind.
        StorageError: It cannot be written: no space, no permission.
    """
    scheme, separator, rest = place.partition("://")
    if separator and scheme not in ("file", "local"):
        return _remote(place, is_folder=is_folder, force=force, is_stale=is_stale, storage_options=storage_options)
    path = Path(os.path.abspath(Path(rest if separator else place).expanduser()))  # noqa: PTH100 - keeps links
    return _local_folder(path, force, is_stale) if is_folder else _local_file(path, force)


def _refuse_existing(place: str) -> UsageError:
    return UsageError(
        f"{place} exists already",
        why="an export never writes over what is there unless it is told to",
        next="give another target, or --force",
    )


@contextmanager
def _local_file(path: Path, force: bool) -> Iterator[Target]:
    if path.is_dir():
        raise UsageError(f"{path} is a directory", why="this format is one file", next=f"give {path / 'model.ckpt'}")
    if not force and os.path.lexists(path):
        raise _refuse_existing(str(path))
    with failing_as("write", str(path), None), _made_folders(path.parent), _descriptor(path.parent) as folder:
        temporary = _temporary_name()
        try:
            yield _OneFile(path.parent, temporary)
            _publish(temporary, path.name, folder, force=force)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        # The name must survive power loss, too.
        fsync(folder)


@contextmanager
def _local_folder(path: Path, force: bool, is_stale: Callable[[str], bool]) -> Iterator[Target]:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file", why="this format is a directory", next="give another target")
    if path.is_dir():
        path = path.resolve()
        if not force and any(path.iterdir()):
            raise _refuse_existing(str(path))
    with failing_as("write", str(path), None), _made_folders(path.parent), _descriptor(path.parent) as outer:
        temporary = path.parent / _temporary_name()
        temporary.mkdir()
        try:
            files = _NewFolder(temporary)
            yield files
            with _descriptor(temporary) as folder:
                fsync(folder)
            if path.is_dir() and any(path.iterdir()):
                _move_into(temporary, path, files.names, is_stale)
            else:
                # POSIX: takes the place of an empty directory, in one step.
                temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(outer)


def _move_into(temporary: Path, path: Path, names: list[str], is_stale: Callable[[str], bool]) -> None:
    with _descriptor(path) as folder:
        for stale in sorted(entry.name for entry in path.iterdir() if is_stale(entry.name)):
            if stale not in names:
                (path / stale).unlink()
        for name in names:
            (temporary / name).replace(path / name)
        fsync(folder)
    temporary.rmdir()


@contextmanager
def _made_folders(path: Path) -> Iterator[None]:
    """Make a directory and its parents; take away again what was made if the block fails."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    folder = os.open(path, _FOLDER)
    try:
        yield folder
    finally:
        os.close(folder)


def _temporary_name() -> str:
    return f".tmp-{os.getpid()}-{secrets.token_hex(8)}"


def _publish(temporary: str, name: str, folder: int, *, force: bool) -> None:
    if force:
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        return
    try:
        link_or_rename(temporary, name, folder=folder, must_be_atomic=False)
    except FileExistsError as error:
        raise _refuse_existing(name) from error


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    # 0o666 less the umask: the team must be able to read what was exported.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(fd, "wb") as file:
        yield file
        file.flush()
        fsync(file.fileno())


class _OneFile:
    def __init__(self, folder: Path, temporary: str) -> None:
        self._path = folder / temporary

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        return _new_file(self._path)


class _NewFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: list[str] = []

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is no file name")
        self.names.append(name)
        return _new_file(self._folder / name)


@contextmanager
def _remote(
    place: str,
    *,
    is_folder: bool,
    force: bool,
    is_stale: Callable[[str], bool],
    storage_options: dict[str, Any] | None,
) -> Iterator[Target]:
    root, _, name = place.rstrip("/").rpartition("/")
    if not is_folder and (not name or root.endswith(("/", ":"))):
        raise UsageError(f"{printable_url(place)} names no file", next="give a URL such as s3://bucket/model.ckpt")
    storage = open_storage(place if is_folder else root, storage_options=storage_options)
    there = {entry.key for entry in storage.list()}
    if not force and (there if is_folder else name in there):
        raise _refuse_existing(printable_url(place))
    files = _Uploads(storage, None if is_folder else name, there)
    try:
        yield files
    except BaseException:
        for key in files.written:
            with suppress(Exception):
                storage.delete(key)
        raise
    for key in sorted(there - set(files.written)):
        if is_folder and is_stale(key):
            storage.delete(key)


class _Uploads:
    """Writes each file here first, for an upload knows its size; then under its name there."""

    def __init__(self, storage: Storage, name: str | None, there: set[str]) -> None:
        self._storage = storage
        self._name = name
        self._there = there
        self.written: list[str] = []

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        key = self._name or name
        with ExitStack() as stack:
            with failing_as("write", tempfile.gettempdir(), None):
                file = stack.enter_context(tempfile.TemporaryFile())
                yield file
                file.flush()
            if key in self._there:
                self._storage.delete(key)
            self.written.append(key)
            self._storage.write(key, _Chunks(file))


class _Chunks:
    """The bytes of a file, as often as they are asked for: a storage that retries begins anew."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        while chunk := self._file.read(_COPY_NBYTES):
            yield chunk
