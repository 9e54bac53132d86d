"""A directory to look into: its files by relative name, from one bounded listing. Links that leave it are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ckptmgr.diagnose.byte_source import ByteSource, LocalFile, RemoteFile, remote_failure
from ckptmgr.diagnose.plain_words import clean
from ckptmgr.diagnose.small_json import bounded_json
from ckptmgr.errors import StorageError
from ckptmgr.storage.failures import storage_error
from ckptmgr.storage.filesystem import open_filesystem
from ckptmgr.storage.redact import Redactor, printable_url

__all__ = ["Folder", "LocalFolder", "RemoteFolder", "is_inside"]

MAX_FILES = 20_000
_MAX_DEPTH = 6
_MAX_LINKS = 20
_MAX_TEXT_NBYTES = 16 << 20


def is_inside(name: str) -> bool:
    """Say whether a relative name, out of an index for example, stays in the directory."""
    path = PurePosixPath(name)
    unsafe = "\\" in name or "\0" in name or "://" in name or ".." in path.parts
    return bool(name) and not path.is_absolute() and not unsafe


class Folder:
    """Files of a directory.

    Attributes:
        place: As it was named, without credentials.
        name: Its last part.
        files: Relative name with slashes → size in bytes.
        problems: Links that were not followed, folders that could not be read.
        is_partial: It holds more than is listed.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.name = place.rstrip("/").rpartition("/")[2]
        self.files: dict[str, int] = {}
        self.problems: list[str] = []
        self.is_partial = False

    @property
    def nbytes(self) -> int:
        """Size of all files that are listed."""
        return sum(self.files.values())

    def top(self) -> list[str]:
        """Return the names of the files that lie directly in it."""
        return [name for name in self.files if "/" not in name]

    def open(self, name: str) -> ByteSource:
        """Return one of its files.

        Raises:
            StorageError, CheckpointNotFoundError: It cannot be read.
        """
        raise NotImplementedError

    def place_of(self, name: str) -> str:
        """Return where one of its files is."""
        return f"{self.place.rstrip('/')}/{name}"

    def data(self, name: str, *, limit: int = _MAX_TEXT_NBYTES) -> bytes | None:
        """Return a small file's content; None where it is missing, larger than ``limit``, or cannot be read."""
        if name not in self.files or self.files[name] > limit:
            return None
        try:
            source = self.open(name)
            try:
                return source.read(0, source.nbytes) if source.nbytes <= limit else None
            finally:
                getattr(source, "close", lambda: None)()
        except (StorageError, FileNotFoundError):
            return None

    def json(self, name: str) -> Any:
        """Return a small JSON file's value; None where there is none that can be read."""
        data = self.data(name)
        if data is None:
            return None
        try:
            return bounded_json(data)
        except ValueError:
            return None


class LocalFolder(Folder):
    """A local directory.

    Args:
        path: Of the directory; it may itself be a link.
        place: As it was named.

    Raises:
        StorageError: It cannot be listed.
    """

    def __init__(self, path: str, place: str) -> None:
        super().__init__(place)
        self._path = path
        self._root = os.path.realpath(path)
        self.name = Path(self._root).name
        try:
            with os.scandir(path):
                pass
        except OSError as cause:
            raise storage_error("list", place, None, cause) from cause
        self._list()

    def _list(self) -> None:
        pending = [("", 0)]
        while pending:
            folder, depth = pending.pop()
            try:
                with os.scandir(Path(self._path, folder)) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                self.problems.append(f"{clean(folder)} cannot be read: {error.strerror}")
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if len(self.files) >= MAX_FILES:
                    self.is_partial = True
                    return
                if entry.is_symlink():
                    self._link(name, entry)
                elif entry.is_dir(follow_symlinks=False):
                    if depth < _MAX_DEPTH and entry.name not in (".git", "__pycache__"):
                        pending.append((name, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    self._file(name, entry)

    def _file(self, name: str, entry: os.DirEntry[str]) -> None:
        try:
            self.files[name] = entry.stat().st_size
        except OSError as error:
            self.problems.append(f"{clean(name)} cannot be read: {error.strerror}")

    def _link(self, name: str, entry: os.DirEntry[str]) -> None:
        target = os.path.realpath(entry.path)
        if not Path(target).exists():
            is_annex = "annex/objects/" in target
            self._tell(f"{clean(name)} is a link whose target is not here" + (" (git annex get)" if is_annex else ""))
        elif self._may_follow(target):
            if Path(target).is_file():
                self._file(name, entry)
        else:
            self._tell(f"{clean(name)} is a link that leaves the directory: it was not followed")

    def _tell(self, problem: str) -> None:
        if len(self.problems) < _MAX_LINKS:
            self.problems.append(problem)

    def _may_follow(self, target: str) -> bool:
        """Say whether a link stays in the directory, or is one of Hugging Face's cache into its own blobs."""
        if target.startswith(self._root + os.sep):
            return True
        parent = Path(self._root).parent
        return parent.name == "snapshots" and target.startswith(f"{parent.parent / 'blobs'}{os.sep}")

    def open(self, name: str) -> LocalFile:
        """Return one of the files that are listed."""
        if name not in self.files:
            raise StorageError(f"{clean(name)} is not in {self.place}")
        return LocalFile(str(Path(self._path, name)))


class RemoteFolder(Folder):
    """A directory behind an fsspec URL."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        super().__init__(printable_url(url))
        self._options = dict(storage_options or {})
        self._redact = Redactor(url, self._options)
        self._url = url
        self._fs, self._root = open_filesystem(url, self.place, self._options)
        self._paths: dict[str, str] = {}
        pending = [(self._root.rstrip("/"), 0)]
        while pending and len(self.files) < MAX_FILES:
            folder, depth = pending.pop()
            try:
                entries = self._fs.ls(folder, detail=True)
            except Exception as cause:
                raise remote_failure(url, cause, self._redact) from cause
            for entry in entries[:MAX_FILES]:
                name = str(entry["name"]).rstrip("/")
                relative = name.removeprefix(self._root.rstrip("/")).strip("/")
                if entry["type"] == "directory" and depth < _MAX_DEPTH and relative and name != folder:
                    pending.append((name, depth + 1))
                elif entry["type"] == "file" and relative and is_inside(relative):
                    self.files[relative] = int(entry["size"] or 0)
        self.is_partial = bool(pending)

    def open(self, name: str) -> RemoteFile:
        """Return one of the files that are listed."""
        if name not in self.files:
            raise StorageError(f"{clean(name)} is not in {self.place}")
        base, query, rest = self._url.partition("?")
        return RemoteFile(f"{base.rstrip('/')}/{name}{query}{rest}", self._options)
