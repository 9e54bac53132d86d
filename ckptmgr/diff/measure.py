"""How far two tensors are apart, gathered block by block: no block is needed again when the next one comes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ckptmgr.diff.elements import Array, item_nbytes, kind_of, numbers_from

__all__ = ["Measure", "Measured"]

# Elements at a time: what NumPy makes of them stays in the processor's cache.
_STRIDE = 1 << 16
_TOP = 1 << 64


@dataclass(frozen=True, slots=True)
class Measured:
    """What sets the elements of two tensors of one shape apart.

    Attributes:
        is_same_bits: Every bit is the same, and so are the dtypes; NaNs with the same bits too.
        ndifferent: Elements that are not equal as numbers. A NaN is equal to nothing, also not to a NaN with the same
            bits; an infinity is equal to one of its sign. None where the bits have no meaning as numbers.
        max_abs: Largest ``|a - b|`` where neither is NaN: a Python integer, exact, between integers; else a float64, of
            complex numbers the modulus. Infinite where one side is infinite, or the difference beyond float64. None
            where the bits have no meaning as numbers.
        relative: ``||a - b|| / ||a||``, over the elements that are finite on both sides; infinite where a is zero and b
            is not, or where a difference is beyond float64.
        nnan: Elements that are NaN, in a and in b.
        ninf: Elements that are infinite and not NaN, in a and in b.
    """

    is_same_bits: bool
    ndifferent: int | None
    max_abs: float | None
    relative: float | None
    nnan: tuple[int, int]
    ninf: tuple[int, int]


class _Norm:
    """A Euclidean norm that neither overflows nor underflows on the way: a scale, and squares relative to it."""

    def __init__(self) -> None:
        self.scale = 0.0
        self._squares = 0.0

    def add(self, magnitudes: Array) -> None:
        """Add elements, given as float64 that are not negative and not NaN."""
        largest = float(magnitudes.max(initial=0.0))
        if largest == 0.0 or math.isinf(self.scale):
            return
        if math.isinf(largest):
            self.scale = math.inf
            return
        scaled = magnitudes / largest
        squares = float(np.dot(scaled, scaled))
        if largest > self.scale:
            self._squares = self._squares * (self.scale / largest) ** 2 + squares
            self.scale = largest
        else:
            self._squares += squares * (largest / self.scale) ** 2

    def relative_to(self, other: _Norm) -> float:
        """Return the ratio of two norms; 0 for nothing relative to nothing."""
        if self.scale == 0.0:
            return 0.0
        if other.scale == 0.0 or math.isinf(self.scale):
            return math.inf
        if math.isinf(other.scale):
            return 0.0
        return self.scale / other.scale * math.sqrt(self._squares / other._squares)


class Measure:
    """Gathers how far two tensors are apart.

    Integers are compared exactly, whatever their widths and signs; norms are computed in float64, so differences of
    64-bit integers are rounded to 53 bits there. Real and complex numbers are compared as float64 and complex128; where
    a 64-bit integer meets a real number, it is rounded to 53 bits first.

    Args:
        a: dtype of the first tensor, in torch's words.
        b: dtype of the second.
    """

    def __init__(self, a: str, b: str) -> None:
        self._words = (a, b)
        kinds = {kind_of(a), kind_of(b)}
        self._is_bits = "bits" in kinds
        self._is_integer = kinds == {"integer"}
        self._wide = np.complex128 if "complex" in kinds else np.float64
        self._same_bits = a == b
        self._ndifferent = 0
        self._max_abs: float = 0 if self._is_integer else 0.0
        self._distance, self._length = _Norm(), _Norm()
        self._nnan, self._ninf = [0, 0], [0, 0]

    @property
    def is_comparable(self) -> bool:
        """Whether anything can be said: numbers can be compared with numbers, and bits with bits of the same dtype."""
        return not self._is_bits or self._words[0] == self._words[1]

    def add(self, a: Array, b: Array) -> None:
        """Add the bytes of as many elements of both, as one-dimensional ``uint8``."""
        is_same = self._words[0] == self._words[1] and bool(np.array_equal(a, b))
        self._same_bits = self._same_bits and is_same
        if self._is_bits:
            return
        sizes = [item_nbytes(word) or 1 for word in self._words]
        # What is too large for its type, and NaNs that signal, are looked for afterwards.
        with np.errstate(all="ignore"):
            for start in range(0, a.size // sizes[0], _STRIDE):
                parts = [
                    numbers_from(raw[start * size : (start + _STRIDE) * size], word)
                    for raw, size, word in zip((a, b), sizes, self._words, strict=True)
                ]
                if self._is_integer:
                    self._add_integers(*parts)
                else:
                    self._add_numbers(*(part.astype(self._wide) for part in parts))

    def result(self) -> Measured:
        """Return what was gathered."""
        is_number = not self._is_bits
        return Measured(
            is_same_bits=self._same_bits,
            ndifferent=self._ndifferent if is_number else None,
            max_abs=self._max_abs if is_number else None,
            relative=self._distance.relative_to(self._length) if is_number else None,
            nnan=(self._nnan[0], self._nnan[1]),
            ninf=(self._ninf[0], self._ninf[1]),
        )

    def _add_numbers(self, a: Array, b: Array) -> None:
        nan = [np.isnan(side) for side in (a, b)]
        finite = [np.isfinite(side) for side in (a, b)]
        for index in range(2):
            self._nnan[index] += int(np.count_nonzero(nan[index]))
            self._ninf[index] += int(np.count_nonzero(~(finite[index] | nan[index])))
        is_equal = a == b
        self._ndifferent += a.size - int(np.count_nonzero(is_equal))
        both = finite[0] & finite[1]
        if not both.all():
            if bool((~(both | nan[0] | nan[1] | is_equal)).any()):
                self._max_abs = math.inf
            a, b = a[both], b[both]
        distance = np.abs(a - b)
        self._max_abs = max(self._max_abs, float(distance.max(initial=0.0)))
        self._distance.add(distance)
        self._length.add(np.abs(a))

    def _add_integers(self, a: Array, b: Array) -> None:
        distance, beyond = _distance(a, b)
        self._ndifferent += int(np.count_nonzero((distance != 0) | beyond))
        largest = int(distance.max(initial=0))
        as_real = distance.astype(np.float64)
        if beyond.any():
            largest = _TOP + int(distance[beyond].max())
            as_real[beyond] += float(_TOP)
        self._max_abs = max(self._max_abs, largest)
        self._distance.add(as_real)
        self._length.add(np.abs(a.astype(np.float64)))


def _distance(a: Array, b: Array) -> tuple[Array, Array]:
    """Return ``|a - b|`` modulo 2^64 as ``uint64``, and where 2^64 is to be added."""
    (bits, negative), (other_bits, other_negative) = _complement(a), _complement(b)
    # In two's complement the difference is right modulo 2^64, whatever the signs; what is left is which one is larger.
    is_less = (negative & ~other_negative) | ((negative == other_negative) & (bits < other_bits))
    distance = np.where(is_less, other_bits - bits, bits - other_bits)
    # Only an unsigned number above 2^63 and a negative one can be further apart than 64 bits tell.
    larger = np.where(is_less, other_bits, bits)
    beyond = (negative != other_negative) & (distance < larger)
    return distance, beyond


def _complement(side: Array) -> tuple[Array, Array]:
    """Return integers as the 64 bits of their two's complement, and which of them are negative."""
    if side.dtype.kind == "u":
        return side.astype(np.uint64), np.zeros(side.shape, dtype=bool)
    wide = side.astype(np.int64)
    return wide.view(np.uint64), wide < 0
