"""The system calls that durable local files need and Python does not have in this form."""

from __future__ import annotations

import ctypes
import errno
import os

from ckptmgr.storage.protocol import Buffer

__all__ = ["fsync", "link_or_rename", "write_all"]

_WRITE_NBYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_RENAME_NOREPLACE = 1
# What file systems without hard links answer; each is followed by a call that is just as strict.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}
)
_NO_RENAME_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def fsync(fd: int) -> None:
    """Bring a file's bytes, or a directory's names, to the device."""
    os.fsync(fd)


def write_all(fd: int, part: Buffer) -> None:
    """Write a whole buffer of any element type, without copying it."""
    view = memoryview(part)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    done = 0
    while done < view.nbytes:
        done += os.write(fd, view[done : done + _WRITE_NBYTES])


def link_or_rename(source: str, target: str, *, folder: int, must_be_atomic: bool) -> None:
    """Give a file its final name in the same directory, never over another file.

    Args:
        source: Present name.
        target: New name.
        folder: Descriptor of the directory of both.
        must_be_atomic: Fail where the filesystem cannot refuse an existing target in the same step.

    Raises:
        FileExistsError: The new name is taken.
        OSError: Neither a link nor a rename that refuses an existing target is possible here.
    """
    try:
        os.link(source, target, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as cause:
        if cause.errno not in _NO_LINKS:
            raise
        _rename_to_unused(source, target, folder=folder, must_be_atomic=must_be_atomic)
        return
    try:
        os.unlink(source, dir_fd=folder)
    except OSError:
        # The object is published; its second, hidden name is a leftover for the next clean-up, no reason to fail.
        return


def _rename_to_unused(source: str, target: str, *, folder: int, must_be_atomic: bool) -> None:
    try:
        rename_noreplace(source, target, folder=folder)
    except OSError as cause:
        if cause.errno not in _NO_RENAME_FLAGS:
            raise
        if must_be_atomic:
            why = "this filesystem has neither hard links nor renameat2, so no exclusive create; choose another"
            raise OSError(cause.errno, why) from cause
        try:
            os.stat(target, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(source, target, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None


def rename_noreplace(source: str, target: str, *, folder: int) -> None:
    """Rename within a directory, refusing an existing target in the same step (Linux only)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(folder, os.fsencode(source), folder, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)
