"""Sharded tensors from storage: any part of any sharding, only what is needed of it, and no damage passed on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import digest
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import EntryRecord, Manifest, TensorRecord, Topology, check_shards, decode_manifest
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.format.record import encode_record
from ckptmgr.run import reader
from ckptmgr.run.commit import CheckpointFields, commit_sealed, write_files
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.state.read_entries import load_entries, read_box
from ckptmgr.state.sharding import Box
from ckptmgr.testing.memory import MemoryStorage

BLOCK_NBYTES = 64
ID = CheckpointId(1, 1, 0)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Cut tensors into blocks of 16 elements, so that small ones have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK_NBYTES", BLOCK_NBYTES)
        patch.setattr(reader, "BLOCK_NBYTES", BLOCK_NBYTES)
        patch.setattr(reader, "_READ_NBYTES", BLOCK_NBYTES)
        yield


class WatchedStorage(MemoryStorage):
    """Notes which bytes of which objects are read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []

    def readinto(self, key: str, buffer: memoryview, *, start: int = 0) -> None:
        self.reads.append((key, start, start + buffer.nbytes))
        super().readinto(key, buffer, start=start)


def whole_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)


def full(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[box.slices_in(full(tuple(tensor.shape)))]


def stored(whole: torch.Tensor, boxes: list[Box]) -> tuple[WatchedStorage, Manifest]:
    """Store a tensor as one shard on each rank."""
    storage, parts = WatchedStorage(), []
    for rank, box in enumerate(boxes):
        data = memoryview(bytearray(cut(whole, box).contiguous().numpy().tobytes()))
        tensor = TensorPayload(
            name="w",
            entry="model",
            dtype="I32",
            shape=box.shape,
            data=data,
            scope="sharded",
            rank=rank,
            global_shape=tuple(whole.shape),
            global_offset=box.offset,
        )
        suffix = f"-rank-{rank:05d}" if rank else ""
        document = {"entries": {} if rank else {"model": {"w": {"$tensor": "w"}}}}
        files = [
            FilePayload(f"model{suffix}.safetensors", (tensor,)),
            FilePayload(f"state{suffix}.json", content=json.dumps(document).encode(), is_state=True),
        ]
        parts.append(write_files(storage, ID, files))
    fields = CheckpointFields(
        run_id="run",
        reason="test",
        entries=(EntryRecord(name="model", handler="values", handler_version=1),),
        topology=Topology(world_size=len(boxes)),
    )
    return storage, commit_sealed(storage, ID, parts, fields)


@st.composite
def grids(draw: st.DrawFn, max_size: int = 9) -> tuple[tuple[int, ...], list[Box]]:
    """Draw a shape, and the boxes of a mesh that cuts it along any of its dimensions; some may be empty."""
    shape = tuple(draw(st.lists(st.integers(1, max_size), min_size=1, max_size=3)))
    ranges = []
    for size in shape:
        ends = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=2))), size]
        ranges.append(list(itertools.pairwise(ends)))
    boxes = [Box(tuple(b for b, _ in parts), tuple(e - b for b, e in parts)) for parts in itertools.product(*ranges)]
    return shape, boxes


def filled(boxes: list[Box]) -> list[Box]:
    return [box for box in boxes if 0 not in box.shape]


@st.composite
def parts_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    ranges = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    return Box(tuple(b for b, _ in ranges), tuple(e - b for b, e in ranges))


@given(st.data())
def test_any_part_of_any_sharding_is_read_back_bit_by_bit(data: st.DataObject) -> None:
    shape, boxes = data.draw(grids())
    boxes = data.draw(st.permutations(filled(boxes)))
    wanted = data.draw(parts_of(shape))
    whole = whole_of(shape)
    storage, manifest = stored(whole, boxes)
    part = read_box(CheckpointReader(storage, manifest), manifest.tensors, wanted)
    assert part.dtype == torch.int32
    assert torch.equal(part, cut(whole, wanted))
    assert torch.equal(load_entries(CheckpointReader(storage, manifest))["model"].tree["w"], whole)


@given(st.data())
def test_only_blocks_with_rows_of_the_part_are_read_each_once(data: st.DataObject) -> None:
    shape, boxes = data.draw(grids(max_size=24))
    wanted = data.draw(parts_of(shape))
    storage, manifest = stored(whole_of(shape), filled(boxes))
    storage.reads.clear()
    read_box(CheckpointReader(storage, manifest), manifest.tensors, wanted)
    needed = set()
    for record in manifest.tensors:
        piece = Box(record.global_offset or (), record.shape)
        common = wanted.overlap(piece)
        if common is None:
            continue
        row_nbytes = record.nbytes // record.shape[0]
        first = (common.offset[0] - piece.offset[0]) * row_nbytes
        for block in range(first // BLOCK_NBYTES, -(-(first + common.shape[0] * row_nbytes) // BLOCK_NBYTES)):
            start = record.offset + block * BLOCK_NBYTES
            end = min(start + BLOCK_NBYTES, record.offset + record.nbytes)
            needed.add((manifest.files[record.file].path, start, end))
    read = [each for each in storage.reads if each[1] != each[2]]
    assert sorted(read) == sorted(needed)


@pytest.mark.parametrize("block", range(6))
def test_damage_is_found_exactly_where_it_is_needed(block: int) -> None:
    # Two shards of 3 blocks each, a row to a block; rows 1 to 3 are wanted.
    whole = whole_of((6, 16))
    storage, manifest = stored(whole, [Box((0, 0), (3, 16)), Box((3, 0), (3, 16))])
    record = manifest.tensors[block // 3]
    key = manifest.files[record.file].path
    content = bytearray(storage.objects[key])
    content[record.offset + block % 3 * BLOCK_NBYTES] ^= 1
    storage.objects[key] = bytes(content)
    wanted = Box((1, 4), (3, 5))
    if 1 <= block < 4:
        with pytest.raises(CorruptCheckpointError, match=r"tensor 'w' of 'model' in .* is damaged"):
            read_box(CheckpointReader(storage, manifest), manifest.tensors, wanted)
    else:
        part = read_box(CheckpointReader(storage, manifest), manifest.tensors, wanted)
        assert torch.equal(part, cut(whole, wanted))


def test_pieces_that_do_not_cover_a_part_give_an_error_and_no_uninitialised_memory() -> None:
    storage, manifest = stored(whole_of((4, 2)), [Box((0, 0), (2, 2)), Box((2, 0), (2, 2))])
    for records in (manifest.tensors[:1], []):
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            read_box(CheckpointReader(storage, manifest), records, full((4, 2)))
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        read_box(CheckpointReader(storage, manifest), manifest.tensors[:1], Box((2, 0), (1, 1)))


def records(shape: tuple[int, ...], boxes: list[Box]) -> list[TensorRecord]:
    return [
        TensorRecord(
            name="w",
            entry="model",
            file=rank,
            offset=0,
            nbytes=0,
            dtype="I32",
            shape=box.shape,
            blocks="",
            scope="sharded",
            rank=rank,
            global_shape=shape,
            global_offset=box.offset,
        )
        for rank, box in enumerate(boxes)
    ]


@given(st.data())
def test_shards_are_whole_exactly_if_each_element_is_in_one_of_them(data: st.DataObject) -> None:
    shape, boxes = data.draw(grids())
    for _ in range(data.draw(st.integers(0, 2))):
        # Something is lost, stands twice, moves or grows.
        change = data.draw(st.sampled_from(["drop", "repeat", "replace"]))
        index = data.draw(st.integers(0, len(boxes) - 1)) if boxes else None
        if change == "drop" and index is not None:
            del boxes[index]
        elif change == "repeat" and index is not None:
            boxes.append(boxes[index])
        elif index is not None:
            boxes[index] = data.draw(parts_of(shape))
    counts = torch.zeros(shape, dtype=torch.int32)
    for box in boxes:
        cut(counts, box).add_(1)
    if not boxes or bool((counts == 1).all()):
        check_shards(records(shape, boxes))
    else:
        with pytest.raises(ValueError, match="model/w: its shards"):
            check_shards(records(shape, boxes))


def test_as_many_elements_as_the_whole_has_are_not_enough() -> None:
    overlapping = [Box((0,), (2,)), Box((1,), (2,))]
    with pytest.raises(ValueError, match="overlap, and leave a part of it out"):
        check_shards(records((4,), overlapping))


def changed(manifest: Manifest, **fields: Any) -> bytes:
    return encode_record(msgspec.structs.replace(manifest, **fields))


def shard(manifest: Manifest, **fields: Any) -> tuple[TensorRecord, ...]:
    return (manifest.tensors[0], msgspec.structs.replace(manifest.tensors[1], **fields))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: {"tensors": m.tensors[:1]}, "hold 4 of 8 elements"),
        (lambda m: {"tensors": shard(m, global_offset=(1, 0))}, "overlap"),
        (lambda m: {"tensors": shard(m, global_offset=(0, 0))}, "overlap"),
        (lambda m: {"tensors": shard(m, global_offset=(3, 0))}, "outside of the whole"),
        (lambda m: {"tensors": shard(m, global_offset=(-1, 0))}, "outside of the whole"),
        (lambda m: {"tensors": shard(m, global_offset=(2,))}, "without its place"),
        (lambda m: {"tensors": shard(m, global_offset=None)}, "without its place"),
        (lambda m: {"tensors": shard(m, global_shape=(5, 2))}, "of different tensors"),
        (lambda m: {"tensors": shard(m, rank=None)}, "without a rank"),
        (lambda m: {"tensors": shard(m, rank=0)}, "listed twice"),
        (lambda m: {"topology": Topology(world_size=3)}, "not those of 3 ranks"),
        (lambda m: {"topology": Topology(world_size=1)}, "not those of 1 ranks"),
        (lambda m: {"states": m.states[:1]}, "1 state documents are not those of 2 ranks"),
        (lambda m: {"states": ()}, "0 state documents"),
        (lambda m: {"states": (m.states[0], m.states[0])}, "two ranks have one state document"),
        (lambda m: {"states": (m.states[0], 99)}, "not among the files"),
    ],
)
def test_a_manifest_of_several_ranks_that_contradicts_itself_is_refused(change: Any, why: str) -> None:
    _, manifest = stored(whole_of((4, 2)), [Box((0, 0), (2, 2)), Box((2, 0), (2, 2))])
    decode_manifest(changed(manifest), where="manifest.json", checkpoint=ID)
    with pytest.raises(CorruptCheckpointError, match="contradicts itself") as caught:
        decode_manifest(changed(manifest, **change(manifest)), where="manifest.json", checkpoint=ID)
    assert why in str(caught.value)
