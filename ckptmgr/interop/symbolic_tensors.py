"""Tensors of a pickle that nobody has unpickled: views of the file's own bytes, each within its storage.

A pickle may claim any offset, shape and stride. Nothing is believed: every element of a tensor must lie in the bytes of
its storage, and all tensors together may not claim much more than the file has, or a small file would fill a disk.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch

from ckptmgr.diagnose.pickle_calls import itemsize
from ckptmgr.diagnose.pickle_values import Tensor
from ckptmgr.diagnose.pickled_storages import PickledFile, Span
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.interop.pickled import damaged
from ckptmgr.state.tensors import DTYPES

__all__ = ["TensorReader"]

_ALIGNMENT: Final = 16
_SLACK_NBYTES: Final = 64 << 20
_MATH_BITS: Final = ("conjugate", "negative")


class TensorReader:
    """Makes the tensors of a file from their symbols. The file is mapped; unaligned storages are copied.

    Args:
        path: The file.
        pickled: Where its storages lie.

    Attributes:
        unreadable: Tensors without elements, each with why the real one could not be read.
    """

    def __init__(self, path: Path, pickled: PickledFile) -> None:
        self.unreadable: list[tuple[torch.Tensor, str]] = []
        self._path = path
        self._pickled = pickled
        self._bytes = np.memmap(path, np.uint8, mode="c")
        self._bases: dict[tuple[str, int], torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {}
        self._claimed: set[tuple[object, ...]] = set()
        # Views of one memory may overlap, as those of a flat buffer that is saved beside its pieces do.
        self._left_nbytes = 2 * len(self._bytes) + _SLACK_NBYTES

    def tensor(self, symbol: Tensor) -> torch.Tensor:
        """Return a tensor; the same one for the same symbol, and views of one memory for views of one storage.

        What cannot be read without its class comes back on the meta device, and stands in ``unreadable``.

        Raises:
            CorruptCheckpointError: It lies outside of its storage, or the file claims more than it can hold.
        """
        made = self._made.get(id(symbol))
        if made is None:
            why = _why_unreadable(symbol)
            made = self.stand_in(why) if why is not None else self._read(symbol)
            self._made[id(symbol)] = made
        return made

    def stand_in(self, why: str) -> torch.Tensor:
        """Return a tensor without elements, for something that cannot be read."""
        made = torch.empty(0, device="meta")
        self.unreadable.append((made, why))
        return made

    def _read(self, symbol: Tensor) -> torch.Tensor:
        storage, dtype = symbol.storage, DTYPES[symbol.dtype]
        assert storage is not None
        span = self._pickled.spans.get(storage.root)
        if span is None:
            raise self._outside(symbol, "whose bytes are missing")
        declared = storage.numel * (itemsize(storage.dtype) or 0)
        available = min(span.nbytes, declared) // dtype.itemsize
        offset = storage.first + symbol.offset
        if len(symbol.shape) != len(symbol.stride):
            raise self._outside(symbol, f"with strides {symbol.stride}")
        is_empty = 0 in symbol.shape
        reach = sum((size - 1) * stride for size, stride in zip(symbol.shape, symbol.stride, strict=True))
        if offset < 0 or (not is_empty and offset + reach >= available):
            raise self._outside(symbol, f"from element {offset} on, in a storage of {available}")
        if not is_empty:
            self._claim(symbol, dtype)
        try:
            if is_empty:
                return torch.empty(symbol.shape, dtype=dtype)
            base = self._base(storage.root, span, dtype)
            found = base[: available * dtype.itemsize].view(dtype).as_strided(symbol.shape, symbol.stride, offset)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._outside(symbol, str(error).partition("\n")[0][:200]) from error
        if symbol.note in _MATH_BITS:
            return found.conj().resolve_conj() if symbol.note == "conjugate" else -found
        return found

    def _claim(self, symbol: Tensor, dtype: torch.dtype) -> None:
        assert symbol.storage is not None
        identity = (symbol.storage.key, symbol.offset, symbol.shape, symbol.stride, symbol.dtype)
        if identity in self._claimed:
            return
        self._claimed.add(identity)
        nbytes = dtype.itemsize
        for size in symbol.shape:
            nbytes *= size
        self._left_nbytes -= nbytes
        if self._left_nbytes < 0:
            raise damaged(self._path, f"its tensors claim far more than its {len(self._bytes)} bytes")

    def _base(self, key: str, span: Span, dtype: torch.dtype) -> torch.Tensor:
        swapped = 0
        if self._pickled.byteorder != sys.byteorder:
            swapped = dtype.itemsize // (2 if dtype.is_complex else 1)
        base = self._bases.get((key, swapped))
        if base is None:
            data = self._bytes[span.start : span.start + span.nbytes]
            if swapped > 1:
                whole = span.nbytes - span.nbytes % swapped
                data = data[:whole].view(f"u{swapped}").byteswap().view(np.uint8)
            base = torch.from_numpy(data)
            if span.start % _ALIGNMENT:
                base = base.clone()
            self._bases[key, swapped] = base
        return base

    def _outside(self, symbol: Tensor, why: str) -> CorruptCheckpointError:
        shape = symbol.shape if len(symbol.shape) < 9 else "of many dimensions"
        return damaged(self._path, f"a {symbol.dtype[:20]} tensor {shape} is said to lie outside of its storage: {why}")


def _why_unreadable(symbol: Tensor) -> str | None:
    if symbol.note is not None and symbol.note not in _MATH_BITS:
        return symbol.note
    if symbol.dtype not in DTYPES or symbol.dtype.startswith("q"):
        return f"it is {symbol.dtype[:40]}"
    if symbol.storage is None or itemsize(symbol.storage.dtype) is None:
        return "it has no storage of its own"
    if symbol.storage.root and "/" in symbol.storage.root and symbol.storage.start is None:
        return "its elements lie in a text of an old pickle protocol"
    return None
