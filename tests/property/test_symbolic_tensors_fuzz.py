"""Whatever a file claims of its tensors: they lie within its bytes, or the file is refused; nothing else happens."""

from __future__ import annotations

import functools
import io
import math
import pickle
import random
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.errors import CkptmgrError, CorruptCheckpointError
from ckptmgr.interop.symbolic_values import read_symbolic

NELEMENTS = 24
CONTAINERS = ("torch-zip", "torch-legacy", "pickle")
extents = st.one_of(st.integers(0, 8), st.sampled_from([-1, 1 << 31, 1 << 62, 1 << 63, 1 << 70]))
unhurried = settings(deadline=None, max_examples=150)


class Placed:
    """Pickles as a tensor at a place of its own choice."""

    def __init__(self, storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (storage, offset, shape, stride, False, {})

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def storage() -> Any:
    return torch.arange(float(NELEMENTS))._typed_storage()


def written(value: Any, container: str) -> bytes:
    if container == "pickle":
        return pickle.dumps(value)
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=container == "torch-zip")
    return buffer.getvalue()


def read(data: bytes, container: str) -> Any:
    """Read a file as an import does; the values are checked for being readable in full."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(data)
        file.flush()
        look = Artifact(file.name, "trainer-checkpoint", "", "certain", details={"container": container})
        found = read_symbolic(Path(file.name), look)
        return touch(found.value)


def touch(value: Any) -> Any:
    """Copy every element of every tensor: a view that leaves its storage would be seen, or crash."""
    if isinstance(value, torch.Tensor):
        return value if value.device.type == "meta" else value.clone()
    if isinstance(value, dict):
        return {key: touch(item) for key, item in value.items()}
    return value


@unhurried
@given(
    container=st.sampled_from(CONTAINERS),
    offset=extents,
    places=st.lists(st.tuples(extents, extents), max_size=4),
    skewed=st.booleans(),
)
def test_a_tensor_is_what_its_place_says_or_the_file_is_refused(
    container: str, offset: int, places: list[tuple[int, int]], skewed: bool
) -> None:
    shape = tuple(size for size, _ in places)
    stride = tuple(step for _, step in places[: -1 if skewed and places else None])
    data = written({"t": Placed(storage(), offset, shape, stride)}, container)
    sound = all(0 <= number < 1 << 63 for number in (offset, *shape, *stride)) and len(shape) == len(stride)
    reach = offset + sum((size - 1) * step for size, step in places)
    try:
        value = read(data, container)
    except CorruptCheckpointError:
        # Strides of zero make any size of one element, and that is not written out.
        assert not sound or reach >= NELEMENTS or 0 in shape or math.prod(shape) > 1 << 24
        return
    tensor = value["t"]
    if not isinstance(tensor, torch.Tensor):
        assert not sound, "a call with arguments that no tensor can have is an object"
    elif 0 in shape:
        assert tensor.shape == shape
    else:
        assert sound
        assert reach < NELEMENTS
        assert tensor.shape == shape
        strides = [step * 4 for step in stride]
        expected = np.lib.stride_tricks.as_strided(np.arange(NELEMENTS, dtype=np.float32)[offset:], shape, strides)
        assert np.array_equal(tensor.numpy(), expected)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.register_buffer("ids", torch.arange(3).expand(2, 3))


@functools.cache
def whole(container: str) -> bytes:
    torch.manual_seed(1)
    return written(Net(), container)


def survives(data: bytes, container: str) -> None:
    try:
        read(data, container)
    except CkptmgrError:
        return


@unhurried
@given(container=st.sampled_from(CONTAINERS), seed=st.integers(0, 1 << 32))
def test_a_file_with_changed_bytes_is_read_or_refused(container: str, seed: int) -> None:
    draw = random.Random(seed)
    data = bytearray(whole(container))
    for _ in range(draw.randint(1, 6)):
        position = draw.randrange(len(data))
        choice = draw.randrange(3)
        if choice == 0:
            data[position] = draw.randrange(256)
        elif choice == 1:
            del data[position : position + draw.randint(1, 9)]
        else:
            data[position:position] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
    survives(bytes(data), container)


@unhurried
@given(container=st.sampled_from(CONTAINERS), keep=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_off_is_refused(container: str, keep: float) -> None:
    data = whole(container)
    with pytest.raises(CkptmgrError):
        read(data[: max(1, int(len(data) * keep))], container)


@pytest.mark.parametrize("numel", [1 << 20, 1 << 40, 1 << 62])
@pytest.mark.parametrize("container", ["torch-zip", "torch-legacy"])
def test_a_claim_of_any_size_costs_no_memory(container: str, numel: int) -> None:
    data = written({"t": torch.arange(float(NELEMENTS))}, container)
    # A number of one byte is made one of eight: of elements in the storage, and of the tensor's size.
    small, large = b"K" + bytes([NELEMENTS]), b"\x8a\x08" + numel.to_bytes(8, "little")
    if container == "torch-zip":
        other = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(other, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                assert content.count(small) == 2 * entry.filename.endswith("data.pkl")
                new.writestr(entry.filename, content.replace(small, large))
        data = other.getvalue()
    else:
        assert data.count(small) == 2
        data = data.replace(small, large)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            read(data, container)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
