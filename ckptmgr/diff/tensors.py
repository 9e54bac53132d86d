"""Tensors of a checkpoint or a file as whole logical ones, however they are stored: in one piece, or in shards.

Their bytes are read forward, range by range; what is held of a stored piece is one block of it at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from ckptmgr.diff.elements import Array

__all__ = ["Bytes", "Key", "Piece", "TensorStream", "WholeTensor", "forward_step"]

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
    """Reads the elements of a tensor forward.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: WholeTensor) -> None:
        self._tensor = tensor
        self._bytes: dict[int, Bytes] = {}
        self._count = math.prod(tensor.shape)
        self._is_whole = len(tensor.pieces) == 1
        self._row = math.prod(tensor.shape[1:])

    def read(self, begin: int, end: int, target: Array) -> Array:
        """Return elements ``[begin, end)`` in row-major order, as bytes.

        Args:
            begin: First element; of a tensor in shards the first of a row.
            end: The element after the last one; likewise.
            target: A buffer that may be used, large enough.
        """
        nbytes = self.nbytes_of(begin, end)
        found = target[:nbytes]
        if self._is_whole:
            self._open(0).read_into(found, self.nbytes_of(0, begin))
            return found
        size = self._tensor.nbytes // self._count
        first, last = begin // self._row, end // self._row
        band = found.reshape(last - first, *self._tensor.shape[1:], size)
        for index, piece in enumerate(self._tensor.pieces):
            top, bottom = max(first, piece.offset[0]), min(last, piece.offset[0] + piece.shape[0])
            if top >= bottom:
                if bottom <= first:
                    # It was read to its end: what is held of it is not needed any more.
                    self._bytes.pop(index, None)
                continue
            row_nbytes = math.prod(piece.shape[1:]) * size
            place = (slice(top - first, bottom - first), *map(_range, piece.offset[1:], piece.shape[1:]))
            rows = band[place]
            filled = rows.reshape(-1) if rows.flags.c_contiguous else np.empty(rows.size, dtype=np.uint8)
            self._open(index).read_into(filled, (top - piece.offset[0]) * row_nbytes)
            if not rows.flags.c_contiguous:
                rows[...] = filled.reshape(rows.shape)
        return found

    def nbytes_of(self, begin: int, end: int) -> int:
        """Return the size of elements ``[begin, end)``."""
        return (end - begin) * self._tensor.nbytes // self._count if self._count else 0

    def _open(self, index: int) -> Bytes:
        if index not in self._bytes:
            self._bytes[index] = self._tensor.pieces[index].open()
        return self._bytes[index]


def forward_step(tensors: Sequence[WholeTensor]) -> int:
    """Return how many elements of tensors of one shape to read at a time.

    About 4 MiB. Of tensors in shards it is whole rows of the first dimension, one at least.
    """
    shape = tensors[0].shape
    count = math.prod(shape)
    largest = max(tensor.nbytes for tensor in tensors)
    step = max(1, _STEP_NBYTES * count // max(largest, 1))
    if any(len(tensor.pieces) > 1 for tensor in tensors):
        row = max(1, math.prod(shape[1:]))
        return max(1, step // row) * row
    # Packed elements share bytes: a multiple of eight ends between two bytes whatever their width.
    return max(8, step // 8 * 8)


def _range(offset: int, size: int) -> slice:
    return slice(offset, offset + size)
