"""The order of an epoch, as a function of seed and epoch that is the same on every machine and with every version."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ckptmgr.errors import UsageError

__all__ = ["EpochOrder", "whole_number"]

_WORD = 2**64


class EpochOrder(Sampler[int]):
    """All indices of an epoch, shuffled by seed and epoch alone.

    The shuffled order is the indices sorted by the first ``length`` numbers of 64 bits that Philox4x64-10 gives with
    the key ``(seed, epoch)``; equal numbers leave the smaller index first. NumPy promises the raw numbers of its bit
    generators for good, but neither what it makes of them nor what ``torch.randperm`` gives. No global random number
    generator is drawn from.

    Args:
        length: Number of samples.
        shuffle: Otherwise the order is 0, 1, 2, ... in every epoch.
        seed: From 0 up to 2**64 - 1.

    Attributes:
        length: Number of samples.
        shuffle: Whether the order is shuffled.
        seed: The seed.
        epoch: The epoch whose order is given; 0 until :meth:`set_epoch`.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int) -> None:
        self.length = whole_number("length", length)
        self.shuffle = bool(shuffle)
        self.seed = whole_number("seed", seed, below=_WORD)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0."""
        self.epoch = whole_number("epoch", epoch, below=_WORD)

    def indices(self) -> npt.NDArray[np.int64]:
        """Return the order of the epoch that is set."""
        if not self.shuffle:
            return np.arange(self.length, dtype=np.int64)
        generator = np.random.Philox(key=np.array([self.seed, self.epoch], dtype=np.uint64))
        return np.argsort(generator.random_raw(self.length), kind="stable").astype(np.int64, copy=False)

    def __iter__(self) -> Iterator[int]:
        yield from self.indices().tolist()

    def __len__(self) -> int:
        return self.length


def whole_number(name: str, value: object, *, at_least: int = 0, below: int | None = None) -> int:
    """Return ``value`` as an ``int``.

    Raises:
        UsageError: It is no whole number, or out of range.
    """
    try:
        # numpy's integers are meant as numbers, True is not.
        number = None if isinstance(value, bool) else value.__index__()  # type: ignore[attr-defined]
    except AttributeError:
        number = None
    if number is None or number < at_least or (below is not None and number >= below):
        limit = "" if below is None else f" and at most {below - 1}"
        raise UsageError(f"{name}={value!r}", why=f"it is a whole number of at least {at_least}{limit}")
    return int(number)
