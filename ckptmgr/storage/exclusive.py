"""Finds out whether a storage keeps two exclusive creates of one name apart."""

from __future__ import annotations

import errno
import logging
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from ckptmgr.storage.transient import is_transient

__all__ = ["creates_exclusively"]

_log = logging.getLogger("ckptmgr.storage")
_RACERS = 4
_NOT_UNDERSTOOD = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def creates_exclusively(fs: AbstractFileSystem, root: str) -> bool:
    """Create one name twice, then race for another; both are removed again.

    One after the other shows a storage that ignores the condition; at once shows one that looks first and then
    writes. Up to 6 small writes.

    Raises:
        Exception: Whatever the filesystem raises when it cannot be written to at all.
    """
    if not isinstance(fs, AsyncFileSystem) and type(fs).pipe_file is AbstractFileSystem.pipe_file:
        return False  # fsspec's own default looks, then writes
    nonce = secrets.token_hex(8)
    first, second = (f"{root}/.ckptmgr-probe-{nonce}-{number}" for number in (1, 2))
    try:
        try:
            fs.pipe_file(first, b"first", mode="create")
        except Exception as error:
            if isinstance(error, (TypeError, NotImplementedError)) or getattr(error, "errno", None) in _NOT_UNDERSTOOD:
                return False
            raise
        if _creates(fs, first, b"again") or fs.cat_file(first) != b"first":
            return False
        return _one_wins(fs, second)
    finally:
        for path in (first, second):
            _remove(fs, path)


def _one_wins(fs: AbstractFileSystem, path: str) -> bool:
    start = threading.Barrier(_RACERS)

    def race(content: bytes) -> bytes | None:
        start.wait(timeout=30)
        return content if _creates(fs, path, content) else None

    with ThreadPoolExecutor(_RACERS) as pool:
        winners = [won for won in pool.map(race, (b"%d" % racer for racer in range(_RACERS))) if won is not None]
    # None: all replies were lost, or the store asked everybody to come again. Two would be the end of us.
    return not winners or (len(winners) == 1 and fs.cat_file(path) == winners[0])


def _creates(fs: AbstractFileSystem, path: str, content: bytes) -> bool:
    try:
        fs.pipe_file(path, content, mode="create")
    except Exception as error:
        if is_transient(error):
            _log.debug("exclusive create of a probe failed", exc_info=True)
        return False
    return True


def _remove(fs: AbstractFileSystem, path: str) -> None:
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        pass
    except Exception as error:
        _log.warning("could not remove the probe %s: %s", path.rpartition("/")[2], type(error).__name__)
