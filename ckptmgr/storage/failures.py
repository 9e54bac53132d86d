"""Turns what a storage raised into a `StorageError` that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ckptmgr.errors import StorageError

__all__ = ["failing_as", "storage_error"]

_NEXT = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota, or ask for more",
    errno.EFBIG: "the file is larger than this filesystem or the process limit (ulimit -f) allows",
    errno.EROFS: "the filesystem is mounted read-only: choose another location, or remount it",
    errno.EACCES: "check the owner and the mode of the directory, or choose another location",
    errno.EPERM: "check the owner and the mode of the directory, or choose another location",
    errno.ESTALE: "the file server lost it, or another host removed it: check the mount, then try again",
    errno.ENOTDIR: "a file stands where a directory is needed: move it away, or choose another location",
    errno.EISDIR: "a directory stands where a file is needed: move it away",
    errno.ELOOP: "replace the symbolic link by what it points to; only the run directory itself may be a link",
    errno.EIO: "the device failed: look at the system log before you trust this disk again",
    errno.EMFILE: "the process has too many open files: raise `ulimit -n`, or use fewer loader workers",
    errno.ENFILE: "the system has too many open files",
    errno.ENAMETOOLONG: "choose a shorter location",
}


def storage_error(
    action: str, url: str, key: str | None, cause: BaseException, *, why: str | None = None, next: str | None = None
) -> StorageError:
    """Build the error for one failed operation; the caller raises it ``from`` the cause.

    Args:
        action: What was tried, as an infinitive: ``"write"``.
        url: Root of the storage, without credentials.
        key: The object, or None when the whole root is concerned.
        cause: What was raised.
        why: Text for the reason where that of the cause does not do.
        next: Advice where that for the error number does not do.
    """
    code = getattr(cause, "errno", None)
    what = f"cannot {action} {url}" if key is None else f"cannot {action} {key!r} in {url}"
    reason = why or getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}".rstrip(": ")
    error = StorageError(what, why=str(reason), next=next or (_NEXT.get(code) if isinstance(code, int) else None))
    if isinstance(code, int):
        error.errno = code
    return error


@contextmanager
def failing_as(action: str, url: str, key: str | None) -> Iterator[None]:
    """Raise a `StorageError` for any other `OSError` of the block.

    Those that the protocol names (missing, exists) pass as they are.
    """
    try:
        yield
    except (StorageError, FileNotFoundError, FileExistsError):
        raise
    except OSError as cause:
        raise storage_error(action, url, key, cause) from cause
