"""Weights without a checkpoint around them: a safetensors file, or a directory with ``model.safetensors`` in it.

Whoever wrote them may have written anything: headers are read within bounds, no link is followed, and an index names
files of its own directory alone.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ckptmgr.diff.elements import Array, dtype_word
from ckptmgr.diff.tensors import Piece, WholeTensor
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckptmgr.format.safetensors_header import SafetensorsTensor, read_header
from ckptmgr.storage.failures import failing_as, storage_error

__all__ = ["INDEX_ENDING", "WEIGHTS_ENDING", "find_weights", "tensors_of_files"]

WEIGHTS_ENDING = ".safetensors"
INDEX_ENDING = ".safetensors.index.json"
_IN_DIRECTORY = ("model.safetensors", "model.safetensors.index.json")
_MAX_INDEX_NBYTES = 64 * 1024 * 1024


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def find_weights(place: str) -> Path | None:
    """Return the file that a place names as weights, or the one in a directory that is no run; None if it names none.

    Raises:
        CheckpointNotFoundError: It is called as a file of weights is, and is not there.
    """
    if "://" in place:
        return None
    path = Path(place).expanduser()
    if path.is_dir():
        if (path / "ckptmgr.json").exists() or (path / "checkpoints").is_dir():
            return None
        # A link is found here and refused where it is opened: it must not look as if nothing were there.
        return next((path / name for name in _IN_DIRECTORY if os.path.lexists(path / name)), None)
    if not place.endswith((WEIGHTS_ENDING, INDEX_ENDING)):
        return None
    if not path.exists():
        raise CheckpointNotFoundError(f"no {place}", why="no such file", next="give a file that is there, or a run")
    # A file that the user names may be a link; what a directory or an index leads to may not.
    return path if place.endswith(INDEX_ENDING) else path.resolve()


def tensors_of_files(path: Path, entry: str) -> list[WholeTensor]:
    """Return the tensors of a safetensors file, or of all files that an index names.

    Args:
        path: The file, or the index.
        entry: What to call the entry that they belong to.

    Raises:
        CorruptCheckpointError: A header is damaged, a file is missing, or index and files contradict each other.
        StorageError: A file cannot be read, or is a link, a pipe or a device.
    """
    if not path.name.endswith(INDEX_ENDING):
        return [_tensor(_File(path.parent, path.name), found, entry) for found in _header(path.parent, path.name)]
    index = _read_index(path)
    tensors: dict[str, WholeTensor] = {}
    for name in dict.fromkeys(index.values()):
        file = _File(path.parent, name)
        for found in _header(path.parent, name):
            if found.name in tensors:
                raise _contradiction(path, f"{found.name!r} stands in {name} and in a file before it")
            if index.get(found.name, name) != name:
                raise _contradiction(path, f"{found.name!r} stands in {name}, and not where the index says")
            tensors[found.name] = _tensor(file, found, entry)
    lost = next((name for name in index if name not in tensors), None)
    if lost is not None:
        raise _contradiction(path, f"{lost!r} is not in {index[lost]}, where the index says")
    return list(tensors.values())


def _read_index(path: Path) -> dict[str, str]:
    with _opened(path.parent, path.name) as (fd, nbytes):
        if nbytes > _MAX_INDEX_NBYTES:
            raise _contradiction(path, f"it has {nbytes} bytes; an index has at most {_MAX_INDEX_NBYTES}")
        data = _read(fd, 0, nbytes)
    try:
        index = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _contradiction(path, f"it is not a JSON index of weights: {error}") from error
    for name in dict.fromkeys(index.values()):
        if not name.endswith(WEIGHTS_ENDING) or "/" in name or "\\" in name or not name.isprintable():
            raise _contradiction(path, f"{name[:80]!r} is no name of a safetensors file in the same directory")
    return index


def _header(folder: Path, name: str) -> tuple[SafetensorsTensor, ...]:
    try:
        with _opened(folder, name) as (fd, nbytes):
            return read_header(
                lambda start, stop: _read(fd, start, min(stop, nbytes)), nbytes, where=str(folder / name)
            ).tensors
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            f"{folder / name} is missing",
            why="the index names it, and it did not travel with the others",
            next="get it from where the others came from",
        ) from error


def _tensor(file: _File, found: SafetensorsTensor, entry: str) -> WholeTensor:
    return WholeTensor(
        entry=entry,
        name=found.name,
        rank=None,
        dtype=dtype_word(found.dtype),
        shape=found.shape,
        nbytes=found.nbytes,
        pieces=(Piece((0,) * len(found.shape), found.shape, lambda: _FileBytes(file, found)),),
    )


class _File:
    """A file in a directory."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name


class _FileBytes:
    """The bytes of a tensor in a file. There are no digests to check them against."""

    def __init__(self, file: _File, tensor: SafetensorsTensor) -> None:
        self._file = file
        self._tensor = tensor

    def read_into(self, target: Array, start: int) -> None:
        done = 0
        view = target.data
        with _opened(self._file.folder, self._file.name) as (fd, _):
            while done < target.size:
                count = os.preadv(fd, [view[done:]], self._tensor.begin + start + done)
                if count == 0:
                    raise CorruptCheckpointError(
                        f"tensor {self._tensor.name!r} in {self._file.folder / self._file.name} is damaged",
                        why="the file has become shorter while it was read",
                        next="compare it when nobody writes it any more",
                    )
                done += count


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[tuple[int, int]]:
    """Open a regular file of a directory, without following a link: its descriptor and its size."""
    # Without O_NONBLOCK a FIFO under this name would hang the reader for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with failing_as("read", str(folder), name):
        try:
            fd = os.open(folder / name, flags)
        except OSError as cause:
            if cause.errno == errno.ELOOP:
                raise storage_error(
                    "read",
                    str(folder),
                    name,
                    cause,
                    why="it is a symbolic link, and may lead anywhere",
                    next=f"name the file itself: {os.path.realpath(folder / name)}",
                ) from cause
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            yield fd, status.st_size
        finally:
            os.close(fd)


def _read(fd: int, start: int, stop: int) -> bytes:
    chunks: list[bytes] = []
    while start < stop:
        chunk = os.pread(fd, stop - start, start)
        if not chunk:
            break
        chunks.append(chunk)
        start += len(chunk)
    return b"".join(chunks)


def _contradiction(path: Path, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} is damaged, or does not belong to the files beside it",
        why=why,
        next="get the whole directory again from where it came from",
    )
