"""Stored bytes become the numbers that torch sees in them, and differences are what exact arithmetic gives."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptmgr.diff.elements import dtype_word, item_nbytes, kind_of, numbers_from
from ckptmgr.diff.measure import Measure, Measured
from ckptmgr.format.encoding import ITEM_NBITS
from ckptmgr.state.tensors import STORED_DTYPES, dtype_name


def raw(array: Any) -> np.ndarray:
    return np.frombuffer(bytearray(np.asarray(array).tobytes()), dtype=np.uint8)


def as_float64(array: np.ndarray) -> np.ndarray:
    # Among random bits there are NaNs that signal.
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def measured(a: Any, b: Any, words: tuple[str, str] | None = None) -> Measured:
    a, b = np.asarray(a), np.asarray(b)
    measure = Measure(*(words or (str(a.dtype), str(b.dtype))))
    measure.add(raw(a), raw(b))
    return measure.result()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.bfloat16,
        torch.float16,
    ],
    ids=dtype_name,
)
def test_every_bit_pattern_of_a_narrow_float_is_the_number_that_torch_sees(dtype: torch.dtype) -> None:
    bits = np.arange(1 << 8 * dtype.itemsize, dtype=f"<u{dtype.itemsize}")
    found = numbers_from(raw(bits), dtype_name(dtype)).astype(np.float32)
    expected = torch.frombuffer(bytearray(bits.tobytes()), dtype=dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    is_number = ~np.isnan(expected)
    # By bits: 0.0 and -0.0 are different here.
    np.testing.assert_array_equal(found[is_number].view(np.uint32), expected[is_number].view(np.uint32))


@pytest.mark.parametrize("dtype", [*STORED_DTYPES, torch.complex32, torch.complex128], ids=dtype_name)
def test_every_dtype_of_the_format_becomes_the_numbers_that_torch_sees(dtype: torch.dtype) -> None:
    data = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    if dtype == torch.bool:
        data &= 1
    word = dtype_name(dtype)
    found = numbers_from(data, word)
    tensor = torch.frombuffer(bytearray(data.tobytes()), dtype=dtype)
    assert item_nbytes(word) == dtype.itemsize
    if dtype.is_complex:
        expected: np.ndarray = torch.view_as_real(tensor).to(torch.float64).numpy()
        np.testing.assert_array_equal(as_float64(np.stack([found.real, found.imag], 1)), expected)
    elif dtype.is_floating_point:
        np.testing.assert_array_equal(as_float64(found), tensor.to(torch.float64).numpy())
    else:
        assert found.tolist() == tensor.to(torch.uint8 if dtype == torch.bool else dtype).tolist()


def test_every_name_of_the_format_has_a_word_and_numbers() -> None:
    assert {dtype_word(name) for name in ITEM_NBITS} == {dtype_name(dtype) for dtype in STORED_DTYPES}
    assert all(8 * (item_nbytes(dtype_word(name)) or 0) == nbits for name, nbits in ITEM_NBITS.items())
    assert kind_of("F4") == kind_of("quint8") == "bits"


INT64 = st.integers(-(2**63), 2**63 - 1)
UINT64 = st.integers(0, 2**64 - 1)
EDGES = [-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["int64", "uint64"]), st.sampled_from(["int64", "uint64"]), st.data())
def test_differences_of_64_bit_integers_are_exact(first: str, second: str, data: Any) -> None:
    kinds = {"int64": INT64, "uint64": UINT64}
    pairs = data.draw(st.lists(st.tuples(kinds[first], kinds[second]), min_size=1, max_size=6))
    a, b = (np.array(side, dtype=kind) for side, kind in zip(zip(*pairs, strict=True), (first, second), strict=True))
    found = measured(a, b)
    assert found.max_abs == max(abs(x - y) for x, y in pairs)
    assert isinstance(found.max_abs, int)
    assert found.ndifferent == sum(x != y for x, y in pairs)
    squares = [sum(Fraction(x) ** 2 for x in side) for side in ([x - y for x, y in pairs], [x for x, _ in pairs])]
    if squares[1]:
        assert found.relative == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-9)
    else:
        assert found.relative == (math.inf if squares[0] else 0)


def test_no_integer_overflows_at_the_ends_of_its_range() -> None:
    for x, y in product(EDGES, [0, 1, 2**63 - 1, 2**63, 2**64 - 1]):
        assert measured(np.array([x], np.int64), np.array([y], np.uint64)).max_abs == abs(x - y)
        assert measured(np.array([y], np.uint64), np.array([x], np.int64)).max_abs == abs(x - y)
    for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        ends = np.iinfo(kind)
        assert measured(np.array([ends.min], kind), np.array([ends.max], kind)).max_abs == ends.max - ends.min
    assert measured([True, False], [True, True]).max_abs == 1


floats = st.floats(width=64) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e308, -1e308, 5e-324])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=8))
@example([(1e308, -1e308)])
@example([(0.0, -0.0), (math.inf, math.inf)])
@example([(5e-324, 0.0)])
def test_floats_are_compared_as_numbers_and_no_nan_is_equal(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    found = measured(a, b)
    assert found.ndifferent == sum(x != y for x, y in pairs)
    assert found.nnan == (sum(map(math.isnan, a)), sum(map(math.isnan, b)))
    assert found.ninf == (sum(map(math.isinf, a)), sum(map(math.isinf, b)))
    assert found.is_same_bits == (a.tobytes() == b.tobytes())
    numbers = [(x, y) for x, y in pairs if not (math.isnan(x) or math.isnan(y))]
    largest = max((0.0 if x == y else abs(x - y) for x, y in numbers), default=0.0)
    assert found.max_abs == largest
    finite = [(Fraction(x), Fraction(y)) for x, y in numbers if math.isfinite(x) and math.isfinite(y)]
    top, bottom = sum((x - y) ** 2 for x, y in finite), sum(x**2 for x, _ in finite)
    if any(math.isinf(float(x) - float(y)) for x, y in finite) or (top and not bottom):
        assert found.relative == math.inf
    elif not top:
        assert found.relative == 0
    else:
        expected = top / bottom
        if Fraction(1, 10**300) < expected < 10**300:
            # Differences are rounded to float64 before they are squared.
            assert found.relative == pytest.approx(math.sqrt(expected), rel=1e-6)


def test_what_is_compared_in_parts_gives_what_the_whole_gives() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 200_000)) * np.logspace(-150, 150, 200_000)
    whole, parts = Measure("float64", "float64"), Measure("float64", "float64")
    whole.add(raw(a), raw(b))
    for begin in range(0, a.size, 33_333):
        parts.add(raw(a[begin : begin + 33_333]), raw(b[begin : begin + 33_333]))
    assert parts.result().max_abs == whole.result().max_abs == np.abs(a - b).max()
    assert parts.result().relative == pytest.approx(whole.result().relative, rel=1e-12)
    assert whole.result().relative == pytest.approx(
        float(np.linalg.norm(np.longdouble(a) - b) / np.linalg.norm(np.longdouble(a))), rel=1e-9
    )


def test_complex_numbers_are_apart_by_their_modulus() -> None:
    found = measured(np.array([1 + 1j, complex("nan"), 0], np.complex64), np.array([4 + 5j, 1, 0], np.complex64))
    assert (found.max_abs, found.ndifferent, found.nnan) == (5.0, 2, (1, 0))


def test_numbers_of_different_dtypes_are_compared_by_value() -> None:
    values = torch.tensor([1.0, -2.5, 3.125, float("inf")])
    found = measured(values.numpy(), values.to(torch.bfloat16).view(torch.uint16).numpy(), ("float32", "bfloat16"))
    assert (found.ndifferent, found.max_abs, found.is_same_bits) == (0, 0, False)
    found = measured(np.array([3], np.int64), np.array([3.5], np.float32))
    assert (found.ndifferent, found.max_abs) == (1, 0.5)


def test_nan_that_signals_warns_nobody() -> None:
    for word, bits in (
        ("float32", 0x7F800001),
        ("bfloat16", 0x7F81),
        ("float16", 0x7C01),
        ("float64", 0x7FF << 52 | 1),
    ):
        data = np.frombuffer(bits.to_bytes(item_nbytes(word) or 0, "little"), np.uint8)
        measure = Measure(word, word)
        measure.add(data, data)
        assert (measure.result().nnan, measure.result().is_same_bits, measure.result().ndifferent) == ((1, 1), True, 1)


def test_what_has_no_numbers_is_compared_by_its_bits() -> None:
    for other, is_same in ((b"abcd", True), (b"abce", False)):
        measure = Measure("F4", "F4")
        measure.add(np.frombuffer(b"abcd", np.uint8), np.frombuffer(other, np.uint8))
        found = measure.result()
        assert (found.is_same_bits, found.ndifferent, found.max_abs, found.relative) == (is_same, None, None, None)
    assert not Measure("F4", "float32").is_comparable
