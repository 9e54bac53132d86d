"""Tensors of a checkpoint or a file as whole logical ones, however they are stored: in one piece, or in shards.

Their bytes are read forward, range by range; what is held of a stored piece is one block of it at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from ckptmgr.diff.elements import Array

__all__ = ["Bytes", "Key", "Piece", "TensorStream", "WholeTensor", "band_dim", "forward_ranges"]

_STEP_NBYTES = 4 * 1024 * 1024

Key: TypeAlias = tuple[str, str, int | None]
"""Entry, name, and the rank that has it for itself; None for what all ranks have together."""


class Bytes(Protocol):
    """The bytes of one stored piece."""

    def read_into(self, target: Array, start: int) -> None:
        """Fill a one-dimensional ``uint8`` array from byte ``start`` of the piece.

        Raises:
            CorruptCheckpointError: The bytes are not there, or not those that were written.
        """
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored part of a tensor, row-major.

    Attributes:
        offset: Where it begins in the whole, in elements by dimension.
        shape: Its size, likewise.
        open: Returns its bytes, with whatever is held of them; called again, they are read again.
        digests: What tells its bytes from others; None where nothing is known without reading.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    open: Callable[[], Bytes]
    digests: str | None = None


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """One tensor.

    Attributes:
        entry: The entry of the state that holds it.
        name: Its name within that.
        rank: As in `Key`.
        dtype: In torch's words; what torch has no word for is called as safetensors calls it.
        shape: In elements.
        nbytes: Size of its elements. Of a dtype that is packed, ``shape`` does not tell.
        pieces: What it is stored in: one for the whole, or shards that cover it. Empty shards are left out.
        aliases: Further names of it in the entry.
    """

    entry: str
    name: str
    rank: int | None
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: tuple[Piece, ...]
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """Its key, by its first name."""
        return self.entry, self.name, self.rank

    @property
    def fingerprint(self) -> Hashable | None:
        """What is equal exactly for tensors that are stored in the same pieces, and is known without reading.

        None where nothing is known. Different fingerprints of tensors in one piece mean different bits.
        """
        digests = [piece.digests for piece in self.pieces]
        if None in digests:
            return None
        cuts = frozenset((piece.offset, piece.shape, piece.digests) for piece in self.pieces)
        return self.dtype, self.shape, cuts


class TensorStream:
    """Reads the elements of a tensor forward, in the ranges that `forward_ranges` gives.

    Args:
        tensor: The tensor.
        dim: Of a tensor in shards, the dimension whose rows the ranges are made of: `band_dim`.
    """

    def __init__(self, tensor: WholeTensor, dim: int) -> None:
        self._tensor = tensor
        self._dim = dim
        self._bytes: dict[int, Bytes] = {}
        self._count = math.prod(tensor.shape)
        self._is_whole = len(tensor.pieces) == 1

    def read(self, begin: int, end: int, target: Array) -> Array:
        """Return elements ``[begin, end)`` in row-major order, as bytes.

        Args:
            begin: First element.
            end: The element after the last one.
            target: A buffer that may be used, large enough.
        """
        found = target[: self.nbytes_of(begin, end)]
        if self._is_whole:
            self._open(0).read_into(found, self.nbytes_of(0, begin))
        else:
            self._read_band(begin, end, found)
        return found

    def _read_band(self, begin: int, end: int, found: Array) -> None:
        """Read rows of one dimension, at one place in the dimensions outside of it, from all shards that have them."""
        shape, dim = self._tensor.shape, self._dim
        size = self._tensor.nbytes // self._count
        row = math.prod(shape[dim + 1 :])
        outer, first = divmod(begin // row, shape[dim])
        last = first + (end - begin) // row
        place = _unravelled(outer, shape[:dim])
        band = found.reshape(last - first, *shape[dim + 1 :], size)
        for index, piece in enumerate(self._tensor.pieces):
            inside = [at - offset for at, offset in zip(place, piece.offset, strict=False)]
            if not all(0 <= at < length for at, length in zip(inside, piece.shape, strict=False)):
                continue
            offset, nrows = piece.offset[dim], piece.shape[dim]
            top, bottom = max(first, offset), min(last, offset + nrows)
            if top >= bottom:
                continue
            start = 0
            for at, length in zip([*inside, top - offset], piece.shape[: dim + 1], strict=True):
                start = start * length + at
            within = map(_range, piece.offset[dim + 1 :], piece.shape[dim + 1 :])
            rows = band[(slice(top - first, bottom - first), *within)]
            filled = rows.reshape(-1) if rows.flags.c_contiguous else np.empty(rows.size, dtype=np.uint8)
            self._open(index).read_into(filled, start * math.prod(piece.shape[dim + 1 :]) * size)
            if not rows.flags.c_contiguous:
                rows[...] = filled.reshape(rows.shape)
            if bottom == offset + nrows and all(
                at == length - 1 for at, length in zip(inside, piece.shape, strict=False)
            ):
                # It was read to its end: what is held of it is not needed any more.
                del self._bytes[index]

    def nbytes_of(self, begin: int, end: int) -> int:
        """Return the size of elements ``[begin, end)``."""
        return (end - begin) * self._tensor.nbytes // self._count if self._count else 0

    def _open(self, index: int) -> Bytes:
        if index not in self._bytes:
            self._bytes[index] = self._tensor.pieces[index].open()
        return self._bytes[index]


def band_dim(tensors: Sequence[WholeTensor]) -> int:
    """Return the outermost dimension whose rows are no larger than a step; the last one where all are larger."""
    shape = tensors[0].shape
    size = max(tensor.nbytes for tensor in tensors) // max(1, math.prod(shape))
    return next(
        (dim for dim in range(len(shape)) if math.prod(shape[dim + 1 :]) * size <= _STEP_NBYTES), max(0, len(shape) - 1)
    )


def forward_ranges(tensors: Sequence[WholeTensor]) -> Iterator[tuple[int, int]]:
    """Yield ranges of elements, of about 4 MiB, that together are all of some tensors of one shape.

    Where one of them is in shards, a range is whole rows of the dimension `band_dim`.
    """
    shape = tensors[0].shape
    count = math.prod(shape)
    step = max(1, _STEP_NBYTES * count // max(1, *(tensor.nbytes for tensor in tensors)))
    if all(len(tensor.pieces) == 1 for tensor in tensors):
        # Packed elements share bytes: a multiple of eight ends between two bytes whatever their width.
        step, inner = max(8, step // 8 * 8), count
    else:
        dim = band_dim(tensors)
        row = math.prod(shape[dim + 1 :])
        step, inner = max(1, step // max(1, row)) * row, row * shape[dim]
    for outer in range(0, count, inner or 1):
        for begin in range(outer, outer + inner, step):
            yield begin, min(begin + step, outer + inner)


def _unravelled(index: int, shape: Sequence[int]) -> list[int]:
    place: list[int] = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.insert(0, at)
    return place


def _range(offset: int, size: int) -> slice:
    return slice(offset, offset + size)
