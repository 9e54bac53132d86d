"""fsspec filesystems the way a checkpoint needs them: own instances, no cached listings, no swallowed errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from ckptmgr.errors import UsageError

__all__ = ["find_files", "open_filesystem"]

_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "adl", "az", "wasb", "wasbs"), "azure"),
}
# With the default cache, another writer's object is invisible and a deleted one still "exists".
_UNCACHED = {"skip_instance_cache": True, "use_listings_cache": False}


def open_filesystem(url: str, printable: str, options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """Return a filesystem of our own for a URL, and the path of the URL in it.

    Args:
        url: With credentials, if it has any.
        printable: The same, for messages.
        options: What the user gave for the filesystem.

    Raises:
        UsageError: No such protocol, its package is not installed, or the URL is chained.
    """
    protocol = url.partition("://")[0]
    if "::" in url:
        raise UsageError(
            f"{printable} is a chained URL",
            why="a layer between (a cache, an archive) would hide what other processes write",
            next="give the last URL of the chain alone",
        )
    try:
        fs, path = url_to_fs(url, **{**options, **_UNCACHED})
    except ImportError as cause:
        extra = _EXTRAS.get(protocol)
        raise UsageError(
            f"{protocol}:// needs a package that is not installed",
            why=str(cause),
            next=f"pip install 'ckptmgr[{extra}]'" if extra else "install the package that fsspec names above",
        ) from cause
    except ValueError as cause:
        raise UsageError(
            f"{printable} cannot be opened", why=str(cause), next="use a path, s3://, gs://, abfs:// or memory://"
        ) from cause
    return fs, str(path)


def find_files(fs: AbstractFileSystem, path: str) -> Sequence[Mapping[str, Any]]:
    """List everything below a path, at any depth; nothing for a path that does not exist.

    Where a filesystem has no listing at any depth of its own, fsspec walks, and its walk turns a failing directory
    into an empty one: after a refused login or a timeout a run would look as if it had no checkpoint.
    """
    if _finds_by_itself(fs):
        try:
            return [info for info in fs.find(path, detail=True).values() if info["type"] == "file"]
        except FileNotFoundError:
            return []
    files = []
    folders = [path]
    while folders:
        folder = folders.pop()
        try:
            listed = fs.ls(folder, detail=True)
        except FileNotFoundError:
            continue  # another process may delete while we look
        files += [info for info in listed if info["type"] == "file"]
        folders += [info["name"] for info in listed if info["type"] == "directory" and info["name"] != folder]
    return files


def _finds_by_itself(fs: AbstractFileSystem) -> bool:
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not AbstractFileSystem.find
