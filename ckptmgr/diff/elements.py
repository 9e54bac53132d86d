"""Stored bytes as numbers that NumPy can compute with, for every dtype whose bits have a meaning here.

bfloat16 and the 8-bit floats are unknown to NumPy; they are widened by bit arithmetic and by tables of all 256 values.
Widening loses nothing: every value of a narrow float is one of the wide.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np

from ckptmgr.format.encoding import DTYPE_WORDS

__all__ = ["Array", "Kind", "dtype_word", "item_nbytes", "kind_of", "numbers_from"]

Array: TypeAlias = np.ndarray[Any, Any]

Kind: TypeAlias = Literal["real", "complex", "integer", "bits"]
"""``bits``: no number is known for them, so they are compared bit by bit alone."""

_WORDS = DTYPE_WORDS | {
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_PLAIN = {
    "uint8": "<u1",
    "int8": "<i1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
    "int64": "<i8",
    "uint64": "<u8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}
# Exponent bits, mantissa bits, bias; how infinities and NaN are spelled.
_TABLES: dict[str, tuple[int, int, int, Literal["ieee", "fn", "fnuz"]]] = {
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e4m3fn": (4, 3, 7, "fn"),
    "float8_e5m2fnuz": (5, 2, 16, "fnuz"),
    "float8_e4m3fnuz": (4, 3, 8, "fnuz"),
}
_NBYTES = {word: np.dtype(name).itemsize for word, name in _PLAIN.items()}
_NBYTES |= {"bool": 1, "bfloat16": 2, "complex32": 4, "float8_e8m0fnu": 1} | dict.fromkeys(_TABLES, 1)


def dtype_word(stored: str) -> str:
    """Return torch's word for a dtype of safetensors, such as ``bfloat16`` for ``BF16``; others keep their name."""
    return _WORDS.get(stored, stored)


def item_nbytes(word: str) -> int | None:
    """Return the bytes of one element; None for a dtype that has no numbers here."""
    return _NBYTES.get(word)


def kind_of(word: str) -> Kind:
    """Return how elements of a dtype are compared."""
    if word not in _NBYTES:
        return "bits"
    if word.startswith("complex"):
        return "complex"
    return "integer" if word == "bool" or word.startswith(("int", "uint")) else "real"


def numbers_from(raw: Array, word: str) -> Array:
    """Return stored elements as numbers.

    Args:
        raw: One-dimensional ``uint8``, little-endian, a whole number of elements; not copied where it need not be.
        word: A dtype in torch's words whose kind is not ``bits``.

    Returns:
        One-dimensional: float16, float32 or float64 for real numbers, complex64 or complex128, or integers of the
        dtype itself; a ``bool`` becomes 0 or 1 of ``uint8``.
    """
    if word in _PLAIN:
        return raw.view(_PLAIN[word])
    if word == "bool":
        is_true: Array = raw != 0
        return is_true.view(np.uint8)
    if word == "bfloat16":
        # The upper half of a float32.
        wide: Array = raw.view("<u2").astype("<u4") << 16
        return wide.view("<f4")
    if word == "complex32":
        with np.errstate(invalid="ignore"):
            return raw.view("<f2").astype("<f4").view("<c8")
    return _table(word).take(raw)


@cache
def _table(word: str) -> Array:
    """Return the 256 values of an 8-bit float."""
    if word == "float8_e8m0fnu":
        # Powers of two alone: no sign, no zero, and one NaN. The smallest one is a subnormal of float32.
        return np.array([*(2.0 ** (bits - 127) for bits in range(255)), np.nan], dtype="<f4")
    return np.array([_value(bits, *_TABLES[word]) for bits in range(256)], dtype="<f4")


def _value(bits: int, nexponent: int, nmantissa: int, bias: int, special: str) -> float:
    sign = -1.0 if bits & 0x80 else 1.0
    exponent = bits >> nmantissa & (1 << nexponent) - 1
    mantissa = bits & (1 << nmantissa) - 1
    is_top = exponent == (1 << nexponent) - 1
    if special == "fnuz" and bits == 0x80:
        return float("nan")
    if special == "fn" and bits & 0x7F == 0x7F:
        return float("nan")
    if special == "ieee" and is_top:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return float(sign * mantissa * 2.0 ** (1 - bias - nmantissa))
    return float(sign * (1 + mantissa / (1 << nmantissa)) * 2.0 ** (exponent - bias))
