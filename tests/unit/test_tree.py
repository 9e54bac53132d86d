import argparse
import collections
import datetime
import enum
import json
import math
import pathlib
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.format.tree import decode_tree, encode_tree


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


def roundtrip(value: object) -> Any:
    return decode_tree(json.loads(json.dumps(encode_tree(value), allow_nan=False)))


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float | np.floating):
        return bool(one == other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(one == other)


EXAMPLES = [
    None,
    True,
    1,
    1.0,
    -0.0,
    2**80,
    -(2**63),
    math.inf,
    -math.inf,
    math.nan,
    "text",
    "$tensor",
    b"\x00\xff",
    bytearray(b"ab"),
    1 + 2j,
    complex(math.inf, -0.0),
    (1, (2,), ()),
    {1, 2},
    frozenset({"a"}),
    range(1, 9, 2),
    slice(None, 3),
    {1: "a", "1": "b", None: 0, (1, 2): 3},
    {"$tensor": 1},
    {"$a": 1, "b": 2},
    collections.OrderedDict(b=1, a=2),
    collections.Counter("abca"),
    collections.defaultdict(list, a=[1]),
    collections.deque([1, 2], maxlen=5),
    argparse.Namespace(lr=0.1, nested={"a": (1,)}),
    types.SimpleNamespace(x=1),
    pathlib.Path("a/b"),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
    datetime.date(2026, 1, 2),
    datetime.time(1, 2),
    datetime.timedelta(days=1, microseconds=2),
    Colour.RED,
    Level.LOW,
    np.float32(0.1),
    np.int64(-3),
    np.bool_(True),
    np.arange(6, dtype=">i2").reshape(2, 3),
    np.zeros((0, 3)),
    np.array(2.5),
]


@pytest.mark.parametrize("value", EXAMPLES, ids=repr)
def test_a_value_comes_back_with_its_type(value: object) -> None:
    assert same(roundtrip(value), value)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.dates()
    | st.timedeltas()
)
keys = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@given(trees)
def test_every_nested_value_comes_back(value: object) -> None:
    assert same(roundtrip(value), value)


class _Unknown:
    pass


@pytest.mark.parametrize(
    "value",
    [_Unknown(), lambda: 0, object, np.array([object()]), open],
    # Not by repr: an address differs from one collecting process to the next.
    ids=["instance", "lambda", "class", "array of objects", "builtin"],
)
def test_a_type_that_nobody_handles_is_named_with_its_path(value: object) -> None:
    with pytest.raises(UnsupportedStateError, match="a/1/b") as caught:
        encode_tree({"a": [0, {"b": value}]})
    assert "register" in str(caught.value)


def test_a_container_that_holds_itself_ends_with_an_error() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(UnsupportedStateError, match="deeper"):
        encode_tree(endless)


@pytest.mark.parametrize(
    "document",
    [
        {"$unknown": 1},
        {"$tuple": 3},
        {"$bytes": "???"},
        {"$numpy_array": ["|O", [1], ""]},
        {"$numpy_array": ["<f8", [9], "AAAA"]},
        {"$enum": ["os", "system", "x"]},
        {"$enum": ["antigravity", "X", "x"]},
        {"$default_dict": ["eval", []]},
        {"$datetime": "tomorrow"},
    ],
    ids=repr,
)
def test_content_that_does_not_fit_its_tag_is_refused(document: object) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_tree(document)


def test_decoding_never_imports_a_module_that_the_document_names() -> None:
    import sys

    with pytest.raises(CorruptCheckpointError, match="not imported"):
        decode_tree({"$enum": ["this", "X", "x"]})
    assert "this" not in sys.modules
