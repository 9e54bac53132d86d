"""Whatever can be captured comes back bit by bit, through real safetensors bytes and JSON."""

import math
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_state import InMemoryReader

from ckptmgr.state.capture import dry_check
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.read_entries import load_entries
from ckptmgr.state.snapshot import SnapshotBuffers
from ckptmgr.state.tensors import STORED_DTYPES

DTYPES = [*STORED_DTYPES, torch.complex128, torch.float8_e4m3fnuz, torch.float8_e8m0fnu]
ARRAY_DTYPES = ["?", "i1", "u2", "<i4", ">f4", "f2", "f8", "c8", "c16", "M8[s]", "U3"]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = dtype.itemsize * math.prod(shape)
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    form = draw(st.sampled_from(["as is", "permuted", "channels last", "expanded", "sliced"]))
    if form == "permuted":
        tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    elif form == "channels last" and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif form == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    elif form == "sliced" and tensor.dim():
        tensor = tensor[..., ::2]
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(ARRAY_DTYPES)))
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 3), (300, 2)]))
    if dtype.kind == "U":
        return np.full(shape, draw(st.text(max_size=3)), dtype=dtype)
    seed = draw(st.integers(0, 2**16))
    count = dtype.itemsize * math.prod(shape)
    data = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 256, count, dtype=np.uint8)
    array = data.view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.sampled_from(
        [torch.float16, torch.Size([1, 2]), torch.device("cpu"), Path("a/b"), np.float32(1.5), np.int64(3)]
    ),
)
keys = st.one_of(
    st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False), st.tuples(st.integers(), st.text())
)
trees = st.recursive(
    st.one_of(scalars, tensors(), arrays(), st.sets(st.integers() | st.text())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def assert_same(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        if first.numel() == 0:
            return
        # By integer views: a NaN is then equal to itself and to nothing else.
        dense = [
            tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
            for tensor in (first, second)
        ]
        assert torch.equal(*dense)
        if first.is_contiguous():
            assert second.is_contiguous()
        return
    assert type(first) is type(second)
    if isinstance(first, np.ndarray):
        assert (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    elif isinstance(first, dict):
        assert len(first) == len(second)
        for (key, item), (other_key, other) in zip(first.items(), second.items(), strict=True):
            assert_same(key, other_key)
            assert_same(item, other)
    elif isinstance(first, (list, tuple)) and not isinstance(first, torch.Size):
        assert len(first) == len(second)
        for item, other in zip(first, second, strict=True):
            assert_same(item, other)
    elif isinstance(first, (float, complex)):
        assert repr(first) == repr(second)
    else:
        assert first == second


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(trees)
def test_any_tree_comes_back_bit_by_bit(tree: object) -> None:
    entries = [CapturedEntry("first", "values", 1, {"tree": tree}), CapturedEntry("second", "values", 1, tree)]
    dry_check(entries)
    loaded = load_entries(InMemoryReader(entries, SnapshotBuffers().snapshot(entries)))
    assert_same({"tree": tree}, loaded["first"].tree)
    assert_same(tree, loaded["second"].tree)
