"""What a comparison makes of every form in which state is stored: encodings, shards, ties, ranks and documents."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diff_samples import by_path, plain, save_in_turn, save_ranks, save_state, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.diff import compare
from ckptmgr.diff.documents import changes_between_trees, renamed_tree
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.manifest import EntryRecord, decode_manifest
from ckptmgr.format.tree import encode_tree
from ckptmgr.run.catalog import Catalog
from ckptmgr.state.tensors import STORED_DTYPES, dtype_name
from ckptmgr.storage.local import LocalStorage

GOLDEN = Path(__file__).parent.parent / "golden"

REAL = [dtype for dtype in STORED_DTYPES if not dtype.is_complex]
RARE = [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
NUMBERS = [1, 0, 1, 4, 0, 1]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", [*REAL, *RARE, torch.complex32, torch.complex64, torch.complex128], ids=dtype_name)
def test_every_dtype_is_compared_as_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    if dtype.is_complex:
        live = torch.complex(torch.tensor([1.0, 0, 3]), torch.tensor([0.0, 2, 0])).to(dtype)
        other = live + torch.tensor([0, 3 + 4j, 0]).to(dtype)
        expected = 5.0
    else:
        live = torch.tensor(NUMBERS).to(torch.float32).to(dtype)
        # As booleans, 4 and 1 would be the same.
        other = torch.tensor([1, 0, 1, 0 if dtype == torch.bool else 1, 0, 1]).to(torch.float32).to(dtype)
        expected = 1.0 if dtype == torch.bool else 3.0
    state = {"extra": {"x": live, "same": live.clone()}}
    run_dir = save_in_turn(tmp_path / "run", state, [lambda: state["extra"].update(x=other)])
    diff = by_path(compare(run_dir, read=True))
    changed, same = diff["extra/x"], diff["extra/same"]
    for tensor in (changed, same):
        assert tensor.a is not None
        assert (tensor.a.dtype, tensor.a.shape) == (dtype_name(dtype), tuple(live.shape))
        assert tensor.a.nbytes == live.numel() * dtype.itemsize
    assert same.verdict == "equal"
    assert changed.measured is not None
    assert changed.measured.max_abs == expected
    assert changed.measured.ndifferent == 1


def test_what_is_no_plain_tensor_is_compared_by_its_components(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    last = torch.ones(1, 2, 3, 4)
    values = {
        "sparse": dense.to_sparse(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "array": np.arange(600, dtype=np.int32),
        "last": last.contiguous(memory_format=torch.channels_last),
    }
    state: dict[str, Any] = {"extra": values}

    def change() -> None:
        dense[1, 0] = 5
        array = state["extra"]["array"].copy()
        array[599] = -1
        state["extra"].update(
            sparse=dense.to_sparse(), scalar=torch.tensor(2.0), array=array, last=torch.ones(1, 2, 3, 4)
        )

    diff = compare(save_in_turn(tmp_path / "run", state, [change]), read=True)
    found = {tensor.path: tensor.measured.max_abs for tensor in diff.changed if tensor.measured is not None}
    found = {path: largest for path, largest in found.items() if path.startswith("extra")}
    assert found == {"extra/sparse/values": 3.0, "extra/scalar": 0.5, "extra/array": 600}
    assert isinstance(found["extra/array"], int)
    assert {by_path(diff)[f"extra/{name}"].verdict for name in ("empty", "last", "sparse/indices")} == {"equal"}


def test_a_zero_that_changes_its_sign_is_told_as_other_bits(tmp_path: Path) -> None:
    state = {"extra": {"x": torch.zeros(3)}}
    diff = compare(save_in_turn(tmp_path / "run", state, [lambda: state["extra"]["x"][0].fill_(-0.0)]))
    tensor = by_path(diff)["extra/x"]
    assert (tensor.verdict, tensor.is_change) == ("other bits", True)
    assert tensor.measured is not None
    assert (tensor.measured.ndifferent, tensor.measured.max_abs) == (0, 0.0)


class Tied(nn.Module):
    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight if is_tied else nn.Parameter(self.embed.weight.detach().clone())


def test_tied_tensors_are_one_and_a_tie_that_came_is_told(tmp_path: Path) -> None:
    tied, other, apart = (
        save_state(tmp_path / name, {"model": Tied(is_tied=is_tied)})
        for name, is_tied in (("tied", True), ("other", True), ("apart", False))
    )
    (pair,) = [tensor for tensor in compare(tied, other).tensors if tensor.entry == "model"]
    assert (pair.name, pair.aliases) == ("embed.weight", ("head.weight",))
    diff = compare(apart, tied)
    assert [str(change) for change in diff.values] == ["model/head.weight: a tensor of its own -> tied to embed.weight"]
    assert {tensor.name for tensor in diff.tensors if tensor.entry == "model"} == {"embed.weight", "head.weight"}
    assert not diff.changed
    with torch.no_grad():
        module = Tied(is_tied=True)
        module.embed.weight += 1
    changed = compare(tied, save_state(tmp_path / "changed", {"model": module})).changed
    assert [tensor.aliases for tensor in changed] == [("head.weight",)]


def tied(folder: Path, name: str, *others: str, apart: tuple[str, ...] = ()) -> str:
    values = np.arange(4, dtype="<f4")
    save_ranks(folder, [[plain(name, values, aliases=others), *(plain(each, values) for each in apart)]])
    return str(folder)


def test_which_of_its_names_a_tied_tensor_is_stored_by_is_no_difference(tmp_path: Path) -> None:
    one, other = tied(tmp_path / "a", "x", "y", "z"), tied(tmp_path / "b", "y", "z", "x")
    for first, second in ((one, other), (other, one)):
        diff = compare(first, second)
        assert (diff.values, [tensor.verdict for tensor in diff.tensors]) == ((), ["equal bits"])


def test_ties_that_differ_are_told_once_each(tmp_path: Path) -> None:
    three = tied(tmp_path / "a", "x", "y", "z")
    two = tied(tmp_path / "b", "x", "y", apart=("z",))
    fewer = tied(tmp_path / "c", "y", "z")
    assert [str(change) for change in compare(three, two).values] == ["model/z: tied to x -> a tensor of its own"]
    assert [str(change) for change in compare(two, three).values] == ["model/z: a tensor of its own -> tied to x"]
    assert [str(change) for change in compare(three, fewer).values] == ["model/x: removed, was tied to y"]
    assert [tensor.verdict for tensor in compare(three, fewer).tensors] == ["equal bits"]


def test_a_file_that_holds_a_tied_tensor_by_any_of_its_names_lacks_nothing(tmp_path: Path) -> None:
    run_dir = tied(tmp_path / "a", "x", "y")
    for name in ("x", "y"):
        save_file({name: torch.arange(4.0)}, tmp_path / f"{name}.safetensors")
        assert compare(run_dir, tmp_path / f"{name}.safetensors").is_same
        assert compare(tmp_path / f"{name}.safetensors", run_dir).is_same


# Ranks


@st.composite
def cuttings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[list[slice]]:
    """Draw a way to cut a tensor: its dimensions, each into up to three ranges, some of them empty."""
    parts: list[list[slice]] = [[]]
    for size in shape:
        edges = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=2))), size]
        ranges = [slice(begin, end) for begin, end in pairwise(edges)]
        parts = [[*part, one] for part in parts for one in ranges]
    return parts


SHAPE = (5, 4, 3)


@settings(max_examples=15, deadline=None)
@given(cuttings(SHAPE), cuttings(SHAPE), st.booleans(), st.integers(0, 59))
def test_any_two_ways_of_sharding_give_what_the_whole_gives(
    tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any, is_same: bool, place: int
) -> None:
    folder = tmp_path_factory.mktemp("sharded")
    a = np.arange(60, dtype="<f4").reshape(SHAPE) + 1
    b = a.copy()
    if not is_same:
        b.reshape(-1)[place] = -1
    for name, array, cuts in (("a", a, first), ("b", b, second)):
        save_ranks(folder / name, [[shard("w", array, cut, rank=rank)] for rank, cut in enumerate(cuts)])
    save_ranks(folder / "whole", [[plain("w", b)]])
    for other in ("b", "whole"):
        (tensor,) = compare(str(folder / "a"), str(folder / other), read=True).tensors
        assert tensor.a is not None
        assert tensor.a.shape == SHAPE
        assert tensor.measured is not None
        assert tensor.is_same_bits == is_same
        assert tensor.measured.max_abs == (0 if is_same else a.reshape(-1)[place] + 1)
        assert tensor.measured.ndifferent == (0 if is_same else 1)
    assert compare(str(folder / "b"), str(folder / "whole"), read=True).tensors[0].verdict == "equal"


@pytest.mark.parametrize("shape", [(1, 3_000_000), (2, 1, 1_500_000), (3, 2, 700_000), (3, 1_100_000, 1)])
def test_rows_that_are_larger_than_a_step_are_read_in_parts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = np.random.default_rng(0).normal(size=shape).astype("<f4")
    other = whole.copy()
    place = tuple(size - 1 for size in shape)
    other[place] += 1
    at = [size // 3 for size in shape]
    low, high = ([slice(a, b) for a, b in zip(x, y, strict=True)] for x, y in (([0] * len(shape), at), (at, shape)))
    cuts = [list(cut) for cut in product(*zip(low, high, strict=True)) if all(one.stop > one.start for one in cut)]
    for name, array in (("a", whole), ("b", other)):
        save_ranks(tmp_path / name, [[shard("w", array, cut, rank=rank)] for rank, cut in enumerate(cuts)])
    save_ranks(tmp_path / "c", [[plain("w", whole)]])
    for first, second in (("a", "b"), ("c", "b")):
        (tensor,) = compare(str(tmp_path / first), str(tmp_path / second)).tensors
        assert tensor.measured is not None
        assert tensor.measured.ndifferent == 1
        assert tensor.measured.max_abs == abs(float(whole[place]) - float(other[place]))
    assert compare(str(tmp_path / "a"), str(tmp_path / "c")).tensors[0].verdict == "equal"


def test_the_same_shards_are_equal_by_their_digests_and_others_are_read(tmp_path: Path) -> None:
    whole = np.arange(32, dtype="<f4").reshape(8, 4)
    rows = [[shard("w", whole, (slice(4 * rank, 4 * rank + 4), slice(0, 4)), rank=rank)] for rank in range(2)]
    columns = [[shard("w", whole, (slice(0, 8), slice(2 * rank, 2 * rank + 2)), rank=rank)] for rank in range(2)]
    for name, parts in (("a", rows), ("b", rows), ("c", columns)):
        save_ranks(tmp_path / name, parts)
    (same,) = compare(str(tmp_path / "a"), str(tmp_path / "b")).tensors
    assert (same.verdict, same.measured) == ("equal bits", None)
    (other,) = compare(str(tmp_path / "a"), str(tmp_path / "c")).tensors
    assert other.verdict == "equal"
    (unread,) = compare(str(tmp_path / "a"), str(tmp_path / "c"), weights=False).tensors
    assert (unread.verdict, unread.is_same_bits) == ("not compared", None)


def test_what_each_rank_has_for_itself_is_compared_rank_by_rank(tmp_path: Path) -> None:
    entries = (
        EntryRecord(name="model", handler="module", handler_version=1),
        EntryRecord(name="own", handler="values", handler_version=1, scope="per-rank"),
    )
    values = np.arange(3, dtype="<f4")

    def save(name: str, shifts: list[float], seeds: list[int]) -> str:
        parts = [[plain("mean", values + shift, rank=rank)] for rank, shift in enumerate(shifts)]
        documents = [{"model": {}, "own": {"seed": seed}} for seed in seeds]
        save_ranks(tmp_path / name, parts, documents=documents, entries=entries)
        return str(tmp_path / name)

    one, other = save("a", [0, 0], [1, 2]), save("b", [0, 5], [1, 3])
    diff = compare(one, other)
    assert [tensor.path for tensor in diff.changed] == ["model/mean (rank 1)"]
    assert [str(change) for change in diff.values] == ["own/seed (rank 1): 2 -> 3"]
    # Of more ranks than the other has, what only they have is told; the documents of both are compared.
    three = compare(one, save("c", [0, 0, 0], [1, 2, 9]))
    assert {tensor.path: tensor.verdict for tensor in three.changed} == {"model/mean (rank 2)": "only in b"}
    assert {fact.name: (fact.a, fact.b) for fact in three.facts if fact.about == "topology"} == {"ranks": ("2", "3")}
    assert three.values == ()


def test_what_all_ranks_have_together_is_compared_with_what_each_has(tmp_path: Path) -> None:
    values = np.arange(3, dtype="<f4")
    save_ranks(tmp_path / "a", [[plain("mean", values)]])
    save_ranks(tmp_path / "b", [[plain("mean", values + rank, rank=rank)] for rank in range(2)])
    for arguments in (("a", "b"), ("b", "a")):
        diff = compare(*(str(tmp_path / name) for name in arguments))
        assert {tensor.path: tensor.is_change for tensor in diff.tensors} == {
            "model/mean (rank 0)": False,
            "model/mean (rank 1)": True,
        }


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_checkpoints_of_every_version_are_compared(version: str) -> None:
    diff = compare(str(GOLDEN / version), read=True)
    assert (diff.a.step, diff.b.step) == (6, 7)
    assert not diff.changed
    assert {fact.name for fact in diff.facts} == {"step", "epoch", "metric loss", "metric bad"}
    assert sum(tensor.measured is not None for tensor in diff.tensors) == len(diff.tensors)


def test_golden_checkpoints_of_one_rank_and_of_two_hold_the_same_state() -> None:
    diff = compare(str(GOLDEN / "v1"), str(GOLDEN / "v2"), read=True)
    assert not diff.changed
    assert [str(change) for change in diff.values] == ['optimizer/type: added, "AdamW"']
    assert [(entry.name, entry.a, entry.b) for entry in diff.entries] == [("own", None, "values v1")]
    verdicts = {tensor.verdict for tensor in diff.tensors}
    assert verdicts == {"equal"}


# Documents


def changes(a: Any, b: Any) -> list[str]:
    return [str(change) for change in changes_between_trees(encode_tree(a), encode_tree(b), "x")]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"k": 1}, {"k": 1.0}, ["x/k: 1 -> 1.0"]),
        ({"k": 1}, {"k": True}, ["x/k: 1 -> true"]),
        ({"k": 0.0}, {"k": -0.0}, ["x/k: 0.0 -> -0.0"]),
        ({"k": float("nan")}, {"k": float("inf")}, ["x/k: nan -> inf"]),
        ({"k": float("nan")}, {"k": float("nan")}, []),
        ({"k": 2**70}, {"k": 2**70 + 1}, [f"x/k: {2**70} -> {2**70 + 1}"]),
        ({"k": [1, 2]}, {"k": [1, 2, 3]}, ["x/k/2: added, 3"]),
        ({"k": (1, 2)}, {"k": [1, 2]}, ['x/k: {"$tuple":[1,2]} -> [1,2]']),
        ({"k": {"a": 1}}, {"k": None}, ['x/k: {"a":1} -> null']),
        ({1: "a", (2, 3): "b"}, {1: "a", (2, 3): "c"}, ['x/{"$tuple":[2,3]}: "b" -> "c"']),
        ({1: "a", "1": "b"}, {1: "a", "1": "c"}, ["x: dict"]),
        ({"k": b"abc"}, {"k": b"abd"}, ["x/k: 3 bytes: YWJj -> 3 bytes: YWJk"]),
        ({"k": {3, 4}}, {"k": {3, 5}}, ["x/k/1: 4 -> 5"]),
        ({}, {"k": {}}, ["x/k: added, {}"]),
        ({"k": "x" * 100 + "a"}, {"k": "x" * 100 + "b"}, [f'x/k: "{"x" * 58}… (before) -> "{"x" * 58}… (after)']),
        (list(range(600)), list(range(1, 601)), ["x: 600 values -> 600 values, 600 of them differ"]),
        ([0] * 600, [0] * 599 + [1], ["x/599: 0 -> 1"]),
    ],
)
def test_values_are_compared_place_by_place(a: Any, b: Any, expected: list[str]) -> None:
    found = changes(a, b)
    if expected == ["x: dict"]:
        # Keys that look alike: the whole is one change, and nothing is hidden.
        assert len(found) == 1
    else:
        assert found == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(values, values)
def test_trees_have_changes_exactly_if_their_documents_differ(a: Any, b: Any) -> None:
    first, second = encode_tree({"k": a}), encode_tree({"k": b})
    assert bool(changes(first, second)) == (json.dumps(first) != json.dumps(second))
    assert changes({"k": a}, {"k": a}) == []
    assert bool(changes({"k": a}, {"k": b})) == (_normal(first) != _normal(second))


def _normal(tree: Any) -> str:
    # The order of keys is none of a dict's meaning.
    return json.dumps(tree, sort_keys=True)


def test_a_document_that_is_nested_without_end_is_refused() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    for a, b in ((deep, 1), (1, deep), (deep, [deep])):
        with pytest.raises(CorruptCheckpointError, match="nested deeper"):
            list(changes_between_trees(a, b, "x"))
    with pytest.raises(CorruptCheckpointError, match="nested deeper"):
        renamed_tree(deep, {"a": "b"})


def test_a_document_that_lacks_an_entry_is_damage(tmp_path: Path) -> None:
    save_ranks(tmp_path / "a", [[plain("w", np.ones(2, "<f4"))]])
    save_ranks(tmp_path / "b", [[plain("w", np.ones(2, "<f4"))]], documents=[{"other": {}}])
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))


def test_records_that_contradict_themselves_are_damage(tmp_path: Path) -> None:
    values = np.arange(4, dtype="<f4")
    lies = [
        [plain("w", values, encoding="cipher")],
        [plain("w", values, encoding="complex", logical_dtype="complex128", logical_shape=(2,))],
        [plain("w", values, encoding="bits", logical_dtype="float8_e8m0fnu", logical_shape=(4,))],
        [plain("w", values, encoding="bits", logical_dtype="uint32", logical_shape=(2, 2))],
    ]
    save_ranks(tmp_path / "honest", [[plain("w", values)]])
    for index, tensors in enumerate(lies):
        folder = tmp_path / str(index)
        save_ranks(folder, [tensors])
        # The manifest is as the format wants it: only who reads the tensor can tell.
        id = Catalog(LocalStorage(folder)).committed[0]
        decode_manifest((folder / f"{id.folder}manifest.json").read_bytes(), where="it", checkpoint=id)
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            compare(str(tmp_path / "honest"), str(folder))


def test_a_tokenizer_that_has_changed_is_told_by_its_fingerprint_and_by_its_file(tmp_path: Path) -> None:
    for name, lowercase in (("a", False), ("b", True), ("c", False)):
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        if lowercase:
            tokenizer.normalizer = normalizers.Lowercase()
        with Checkpointer(tmp_path / name, {"model": nn.Linear(1, 1), "preprocessor": tokenizer}) as ckpt:
            ckpt.resume()
            ckpt.step(1)
            ckpt.save()
    changed = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [fact.name for fact in changed.facts if fact.about == "code"] == ["fingerprint of preprocessor"]
    (change,) = [value for value in changed.values if value.path.startswith("preprocessor/")]
    assert change.path == "preprocessor/state/file"
    assert change.a.startswith("tokenizer.json (")
    assert change.a != change.b
    same = compare(str(tmp_path / "a"), str(tmp_path / "c"))
    assert not [fact for fact in same.facts if fact.about == "code"]
    assert not [value for value in same.values if value.path.startswith("preprocessor/")]
