"""Headers of safetensors files: those of the real library are read as it reads them, all others are refused."""

from __future__ import annotations

import io
import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError
from ckptmgr.format.safetensors_header import (
    MAX_HEADER_NBYTES,
    SAFETENSORS_NBITS,
    SafetensorsHeader,
    read_header,
)

MIB = 1 << 20


def read(data: bytes) -> SafetensorsHeader:
    return read_header(io.BytesIO(data), len(data))


def with_header(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int = 0, end: int = 1, dtype: str = "U8", shape: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DTYPES = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint32]
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
contents = st.dictionaries(
    texts.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# With no tensor and empty metadata the library writes what it cannot read itself.
@given(contents, st.none() | st.dictionaries(texts, texts, min_size=1, max_size=4))
def test_files_of_the_real_library_are_read_as_it_reads_them(
    content: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in content.items()}
    data = save(tensors, metadata=metadata)
    header = read(data)
    theirs = dict(safetensors.deserialize(data))
    assert {found.name: (found.dtype, list(found.shape), found.nbytes) for found in header.tensors} == {
        name: (one["dtype"], one["shape"], len(one["data"])) for name, one in theirs.items()
    }
    assert header.metadata == (metadata or {})
    assert sum(found.nbytes for found in header.tensors) == len(data) - header.data_start


def test_the_bytes_of_a_tensor_lie_where_the_header_says(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": values, "b": torch.ones(5, dtype=torch.float64)}))
    with path.open("rb") as file:
        (found,) = [one for one in read_header(file, path.stat().st_size).tensors if one.name == "a"]
    raw = path.read_bytes()[found.begin : found.end]
    assert np.frombuffer(raw, "<i4").tolist() == values.flatten().tolist()


def test_every_dtype_of_the_real_library_is_known() -> None:
    for dtype, nbits in SAFETENSORS_NBITS.items():
        data = with_header({"a": tensor(0, nbits, dtype, (8,))}, bytes(nbits))
        assert len(safetensors.deserialize(data)) == 1, "the real library must know what is read here"
        assert read(data).tensors[0].nbytes == nbits


# What the real library accepts and we do not: names that stand twice, and fields that the format does not have.
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contents, st.data())
def test_a_changed_file_is_refused_or_read_as_the_real_library_reads_it(content: dict[str, Any], data: Any) -> None:
    raw = bytearray(save({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in content.items()}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if kind == "replace":
            raw[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0123456789 \\u')))
        elif kind == "insert":
            raw[at:at] = data.draw(
                st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"[", b"[[[[", b"1e9", b"\\u12"])
            )
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 9))]
        else:
            del raw[at:]
        if not raw:
            raw = bytearray(1)
    try:
        found = read(bytes(raw))
    except CorruptCheckpointError:
        return
    theirs = dict(safetensors.deserialize(bytes(raw)))
    assert {one.name: (one.dtype, list(one.shape)) for one in found.tensors} == {
        name: (one["dtype"], one["shape"]) for name, one in theirs.items()
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
claims = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "Q8", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 10**15), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 10**15), min_size=1, max_size=3) | json_values,
        "other": json_values,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(texts | st.just("__metadata__"), claims | json_values, max_size=3), st.binary(max_size=16))
def test_any_json_is_refused_or_agrees_with_itself(header: dict[str, Any], data: bytes) -> None:
    try:
        found = read(with_header(header, data))
    except CorruptCheckpointError:
        return
    at = found.data_start
    for one in found.tensors:
        assert one.begin == at
        assert math.prod(one.shape) * SAFETENSORS_NBITS[one.dtype] == 8 * one.nbytes
        at = one.end
    assert at == found.data_start + len(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_are_refused_or_read(text: bytes, length: int) -> None:
    for data in (text, with_header(text), length.to_bytes(8, "little") + text):
        try:
            read(data)
        except CorruptCheckpointError:
            continue


LIES = {
    "10^15 elements": {"a": tensor(0, 1, "U8", (10**15,))},
    "10^15 elements at 10^15 bytes": {"a": tensor(0, 10**15, "U8", (10**15,))},
    "a product that wraps to 1 in 64 bits": {"a": tensor(0, 1, "U8", (2**32, 2**32, 1))},
    "overlapping ranges": {"a": tensor(0, 2, shape=(2,)), "b": tensor(1, 3, shape=(2,))},
    "one range twice": {"a": tensor(), "b": tensor()},
    "a hole": {"a": tensor(), "b": tensor(2, 3)},
    "a range from behind": {"a": tensor(1, 0, shape=(0,))},
    "negative sizes": {"a": tensor(0, 1, shape=(-1, -1))},
    "an unknown dtype": {"a": tensor(0, 1, "FLOAT")},
    "more dimensions than anybody has": {"a": tensor(0, 1, shape=(1,) * 65)},
    "sizes that are true": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "sizes of a million digits": f'{{"a":{{"dtype":"U8","shape":[{"9" * 1_000_000}],"data_offsets":[0,1]}}}}'.encode(),
    "a name twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[0],'
    b'"data_offsets":[1,1]}}',
    "a name twice, once escaped": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8",'
    b'"shape":[0],"data_offsets":[1,1]}}',
    "a field twice": b'{"a":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": tensor()},
    "deep nesting": b'{"a":' + b"[" * 1_000_000,
    "deep nesting in metadata": b'{"__metadata__":{"a":' + b'{"a":' * 200_000,
    "a text that does not end": b'{"' + b"a" * 4_000_000,
    "escapes that do not end": b'{"' + b"\\\\" * 2_000_000,
    "half of a surrogate pair": b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "no UTF-8": b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "bytes behind the JSON": json.dumps({"a": tensor()}).encode() + b"\0",
    "a list": b"[]",
    "a million lists": b'{"a":' + b"[]," * 1_000_000,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_header_that_lies_costs_neither_memory_nor_time(lie: bytes | dict[str, Any]) -> None:
    data = with_header(lie, b"\0")
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match="safetensors"):
            read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(data) + MIB
    assert time.process_time() - began < 5


@pytest.mark.parametrize("length", [MAX_HEADER_NBYTES + 1, 2**63, 2**64 - 1])
def test_a_header_length_is_believed_by_nobody(length: int) -> None:
    def never(start: int, stop: int) -> bytes:
        assert stop <= 8, "only the length itself may be read"
        return length.to_bytes(8, "little")

    with pytest.raises(CorruptCheckpointError):
        read_header(never, 2**64)


@pytest.mark.parametrize("nbytes", [0, 7, 8, 20, 100])
def test_a_truncated_file_is_called_so(nbytes: int) -> None:
    data = save({"a": torch.ones(100)})[:nbytes]
    with pytest.raises(CorruptCheckpointError, match=r"truncated|begins with eight bytes"):
        read(data)
    # The file was longer when it was looked at.
    with pytest.raises(CorruptCheckpointError, match=r"truncated|and the file has 10000"):
        read_header(io.BytesIO(data), 10_000)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS"),
        (b"PK\x03\x04" + bytes(100), "damaged, or no safetensors"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"\x80\x02}q\x00." + b"x" * 20, "pickle"),
    ],
)
def test_what_is_something_else_is_named(content: bytes, word: str) -> None:
    with pytest.raises(CkptmgrError, match=word):
        read(content)


def test_a_large_honest_header_is_read_in_time() -> None:
    many = {f"layers.{index}.weight": tensor(index, index + 1) for index in range(50_000)}
    data = with_header(many, bytes(50_000))
    began = time.process_time()
    assert len(read(data).tensors) == 50_000
    assert time.process_time() - began < 10
