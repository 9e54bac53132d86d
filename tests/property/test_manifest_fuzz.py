"""Whatever a manifest says, it is read or refused: no other error, and no more time and memory than its own bytes."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ckptmgr.errors import CorruptCheckpointError, FormatVersionError
from ckptmgr.format.digest import block_digests, combined_digest
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import Manifest, decode_manifest, decode_manifest_excerpt
from ckptmgr.format.tiling import covers_once

GOLDEN = Path(__file__).parent.parent / "golden"
REAL = sorted(GOLDEN.glob("v*/checkpoints/*/manifest.json"))
ID = CheckpointId(1, 1, 0)


def framed(body: bytes) -> bytes:
    """Put a body into the frame of a record, with the digest that it needs."""
    digest = combined_digest(block_digests(body)).encode()
    return b'{"digest":"xxh3-128:' + digest + b'","record":' + body + b"}\n"


def decoded(body: bytes, checkpoint: CheckpointId = ID) -> Manifest | None:
    """Decode a body both ways, and let only the errors pass that a reader may expect."""
    try:
        decode_manifest_excerpt(framed(body), where="manifest.json", checkpoint=checkpoint)
    except (CorruptCheckpointError, FormatVersionError) as error:
        _check_message(error)
    try:
        return decode_manifest(framed(body), where="manifest.json", checkpoint=checkpoint)
    except (CorruptCheckpointError, FormatVersionError) as error:
        _check_message(error)
        return None


def _check_message(error: Exception) -> None:
    assert len(str(error)) < 2000


def body_of(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_bytes())["record"]
    return body


def encoded(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def id_of(path: Path) -> CheckpointId:
    return CheckpointId.parse(path.parent.name)


def test_real_manifests_are_read() -> None:
    assert len(REAL) == 2 * len(list(GOLDEN.glob("v*"))) >= 4
    for path in REAL:
        found = decoded(encoded(body_of(path)), id_of(path))
        assert found is not None
        assert found.tensors


ODD = [None, True, -1, 0, 1, 10**15, 2**63, -(2**70), 1.5, "", "a", "..", "/etc/passwd", "00" * 16, "zz" * 16, " " * 32]
ODD += [[], {}, [0], [10**15] * 3, [-1, -1], [1] * 80, {"a": 1}, "NaN", "per-rank", "sharded", "plain", [[]], "0" * 64]
odd_values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, item in children for place in places(item, (*path, key)))][: 4000 if path else None]


PLACES = {path: places(body_of(path))[1:] for path in REAL}


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(REAL), st.data())
def test_a_changed_manifest_is_read_or_refused(path: Path, data: Any) -> None:
    document = body_of(path)
    for _ in range(data.draw(st.integers(1, 4))):
        *outer, last = data.draw(st.sampled_from(PLACES[path]))
        parent = document
        try:
            for key in outer:
                parent = parent[key]
            kind = data.draw(st.sampled_from(["replace", "remove", "repeat", "swap"]))
            if kind == "remove":
                del parent[last]
            elif kind == "repeat" and isinstance(parent, list):
                parent.append(parent[last])
            elif kind == "swap" and isinstance(parent, list):
                parent[last], parent[0] = parent[0], parent[last]
            else:
                parent[last] = data.draw(odd_values)
        except (LookupError, TypeError):
            continue
    found = decoded(encoded(document), id_of(path))
    if found is not None:
        # What a reader relies on.
        assert all(tensor.offset + tensor.nbytes <= found.files[tensor.file].nbytes for tensor in found.tensors)
        assert all(len(tensor.blocks) == 32 * -(-tensor.nbytes // (16 << 20)) for tensor in found.tensors)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(REAL), st.data())
def test_a_manifest_with_other_bytes_is_read_or_refused(path: Path, data: Any) -> None:
    raw = bytearray(encoded(body_of(path)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"[", b"]", b"{", b"}", b",", b"1e999", b"NaN", b"\\ud800"])
        )
    decoded(bytes(raw), id_of(path))
    # Without a digest that agrees nothing is parsed.
    with pytest.raises(CorruptCheckpointError):
        decode_manifest(bytes(raw), where="manifest.json", checkpoint=id_of(path))


@settings(max_examples=300, deadline=None)
@given(
    odd_values | st.dictionaries(st.sampled_from(list(body_of(REAL[0]))), odd_values, max_size=16),
    st.binary(max_size=50),
)
@example({"version": 3}, b"")
@example({"version": 10**30}, b"[" * 50)
def test_any_json_and_any_bytes_are_refused(document: Any, data: bytes) -> None:
    assert decoded(encoded(document)) is None
    assert decoded(data) is None


def manifest(**fields: Any) -> dict[str, Any]:
    return {
        "version": 1, "run_id": "r", "checkpoint": str(ID), "attempt": 1, "step": 1, "reason": "", "created_at": "",
        "files": [{"path": "a", "nbytes": 10**6, "digest": "0" * 32}], "tensors": [], "states": [], "topology": {},
        "entries": [{"name": "m", "handler": "h", "handler_version": 1}], **fields,
    }  # fmt: skip


def record(**fields: Any) -> dict[str, Any]:
    return {
        "name": "a", "entry": "m", "file": 0, "offset": 0, "nbytes": 1, "dtype": "U8", "shape": [1],
        "blocks": "0" * 32, **fields,
    }  # fmt: skip


def grid(count: int, *, is_whole: bool) -> list[dict[str, Any]]:
    """Cut a tensor in all of eight dimensions, into ``count`` elements; or leave one out and have another twice."""
    whole = [count // 128, *[2] * 7]
    places = [[index // 128, *((index >> bit) & 1 for bit in range(7))] for index in range(count)]
    if not is_whole:
        places[-1] = places[0]
    return [
        record(offset=index, shape=[1] * 8, scope="sharded", rank=index, global_shape=whole, global_offset=place)
        for index, place in enumerate(places)
    ]


LIES = {
    "10^15 elements": manifest(tensors=[record(shape=[10**15])]),
    "10^15 elements that the file claims to have": manifest(
        files=[{"path": "a", "nbytes": 10**15, "digest": "0" * 32}], tensors=[record(shape=[10**15], nbytes=10**15)]
    ),
    "elements without end": manifest(tensors=[record(shape=[10**18] * 300_000)]),
    "a whole without end": manifest(
        tensors=[
            record(shape=[1], scope="sharded", rank=0, global_shape=[10**18] * 100_000, global_offset=[0] * 100_000)
        ]
    ),
    "sizes of many digits": manifest(tensors=[record(shape=[10**4000] * 64)]),
    "an order without end": manifest(tensors=[record(order=list(range(300_000)))]),
    "a logical shape without end": manifest(tensors=[record(logical_shape=[10**18] * 300_000)]),
    "a name without end": manifest(tensors=[record(name="a" * 5_000_000, file=7)]),
    "a path without end": manifest(files=[{"path": "/a" * 2_000_000, "nbytes": 0, "digest": "0" * 32}]),
    "another checkpoint": manifest(checkpoint="a" * 5_000_000),
    "digests that are no hex": manifest(tensors=[record(blocks="x" * 5_000_000)]),
    "shards that overlap": manifest(tensors=grid(12_800, is_whole=False)),
    "shards that say nothing": manifest(tensors=[record(scope="sharded")]),
    "a hundred thousand names of one tensor": manifest(tensors=[record()] * 30_000),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_manifest_that_lies_costs_neither_time_nor_memory(lie: dict[str, Any]) -> None:
    data = framed(encoded(lie))
    began = time.process_time()
    with pytest.raises(CorruptCheckpointError) as caught:
        decode_manifest(data, where="manifest.json", checkpoint=ID)
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 2000


NESTED = {
    "deep lists": b'"x":' + b"[" * 2_000_000,
    "deep dicts": b'"x":' + b'{"a":' * 400_000,
    "deep and closed": b'"x":' + b"[" * 900_000 + b"]" * 900_000,
    "many lists": b'"x":[' + b"[]," * 300_000 + b"0]",
    "many texts": b'"x":[' + b'"ab",' * 300_000 + b"0]",
    "many lists for files": b'"files":[' + b"[]," * 300_000 + b"0]",
    "a key twice": b'"step":1,"step":1',
    "a key twice, deeper": b'"metrics":{"a":1,"a":2}',
    "a number without end": b'"step":' + b"9" * 1_000_000,
}


@pytest.mark.parametrize("extra", NESTED.values(), ids=NESTED)
def test_json_that_is_made_to_hurt_is_parsed_within_bounds(extra: bytes) -> None:
    body = encoded(manifest())[:-1] + b"," + extra + b"}"
    began = time.process_time()
    tracemalloc.start()
    try:
        decoded(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # JSON in memory is larger than as text, by a factor; a manifest has 64 MiB at most.
    assert peak < 60 * len(body)
    assert time.process_time() - began < 10


def test_a_manifest_of_many_shards_is_checked_in_time() -> None:
    data = framed(encoded(manifest(tensors=grid(12_800, is_whole=True))))
    began = time.process_time()
    assert len(decode_manifest(data, where="manifest.json", checkpoint=ID).tensors) == 12_800
    assert time.process_time() - began < 5


# Tilings


def covered_once(whole: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Count how often each element is covered: slow, and plainly right."""
    counts = Counter(
        place
        for offset, shape in boxes
        for place in product(*(range(o, o + n) for o, n in zip(offset, shape, strict=True)))
    )
    return all(counts[place] == 1 for place in product(*map(range, whole))) and counts.total() == len(counts)


@st.composite
def boxes_within(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Draw a whole and a tiling of it by repeated cuts, and then perhaps move, drop or repeat a box."""
    whole = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    boxes = [((0,) * len(whole), whole)]
    for _ in range(draw(st.integers(0, 5))):
        offset, shape = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(whole) - 1))
        at = draw(st.integers(0, shape[dim]))
        first = tuple(at if index == dim else size for index, size in enumerate(shape))
        rest = tuple(shape[dim] - at if index == dim else size for index, size in enumerate(shape))
        place = tuple(start + at if index == dim else start for index, start in enumerate(offset))
        boxes += [(offset, first), (place, rest)]
    change = draw(st.sampled_from(["none", "none", "drop", "repeat", "move"]))
    index = draw(st.integers(0, len(boxes) - 1))
    if change == "drop":
        del boxes[index]
    elif change == "repeat":
        boxes.append(boxes[index])
    elif change == "move":
        offset, shape = boxes[index]
        boxes[index] = (tuple(draw(st.integers(0, w - n)) for w, n in zip(whole, shape, strict=True)), shape)
    return whole, boxes


@settings(max_examples=500, deadline=None)
@given(boxes_within())
def test_boxes_cover_a_whole_exactly_if_each_element_is_in_one_of_them(drawn: Any) -> None:
    whole, boxes = drawn
    assert covers_once(whole, boxes) == covered_once(whole, boxes)
