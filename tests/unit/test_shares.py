"""Who writes what: everything once, by a rank that holds it, and about equally much by each."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_of_threads import meet, on_all

from ckptmgr.errors import StateMismatchError, TopologyError
from ckptmgr.joint_save import JointSaves
from ckptmgr.ranks.group import RankFailure
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.shares import Layout, Share, layout_digest, layout_of, plan_shares, refuse_different_layouts


def whole(name: str, size: int, *, is_rank_0s: bool = False) -> list[Any]:
    return ["model", name, "U8", [size], None, None, size, is_rank_0s]


def shard(name: str, begin: int, end: int, size: int) -> list[Any]:
    return ["model", name, "U8", [end - begin], [size], [begin], end - begin, False]


@st.composite
def layouts(draw: st.DrawFn) -> list[Layout]:
    """Draw what each rank holds: replicated tensors, rank 0's, and tensors cut among groups of ranks."""
    world_size = draw(st.integers(1, 6))
    layouts: list[Layout] = [[] for _ in range(world_size)]
    for number in range(draw(st.integers(0, 12))):
        name, size = f"t{number}", draw(st.integers(1, 1000))
        kind = draw(st.sampled_from(["replicated", "rank 0", "sharded"]))
        # Of a sharded tensor several ranks may hold the same part, and some of them none.
        nparts = draw(st.integers(1, world_size))
        cuts = sorted(draw(st.lists(st.integers(0, size), min_size=nparts - 1, max_size=nparts - 1)))
        parts = list(zip([0, *cuts], [*cuts, size], strict=True))
        for rank, layout in enumerate(layouts):
            if kind == "sharded":
                layout.append(shard(name, *parts[rank % nparts], size))
            else:
                layout.append(whole(name, size, is_rank_0s=kind == "rank 0"))
    return layouts


@given(layouts())
def test_every_tensor_and_every_shard_is_written_once_by_a_rank_that_holds_it(layouts: list[Layout]) -> None:
    written = [
        (*layouts[rank][i][:2], str(layouts[rank][i][5])) for rank, s in enumerate(plan_shares(layouts)) for i in s
    ]
    wanted = {(*item[:2], str(item[5])) for layout in layouts for item in layout if item[6]}
    assert len(written) == len(set(written))
    assert set(written) == wanted


@given(layouts())
def test_what_is_rank_0s_is_written_by_rank_0(layouts: list[Layout]) -> None:
    for rank, share in enumerate(plan_shares(layouts)):
        assert not any(layouts[rank][i][7] for i in share) or rank == 0


@given(layouts())
def test_the_same_layouts_give_the_same_plan(layouts: list[Layout]) -> None:
    assert plan_shares(layouts) == plan_shares([[list(item) for item in layout] for layout in layouts])


@given(st.integers(1, 8), st.lists(st.integers(0, 10_000), max_size=40))
def test_replicated_tensors_are_shared_out_within_the_largest_one(world_size: int, sizes: list[int]) -> None:
    layout = [whole(f"t{number}", size) for number, size in enumerate(sizes)]
    loads = [sum(layout[i][6] for i in share) for share in plan_shares([layout] * world_size)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_who_has_much_to_write_for_itself_gets_less_of_what_all_hold() -> None:
    layouts = [[whole("big", 900, is_rank_0s=True), *(whole(f"t{i}", 100) for i in range(6))] for _ in range(3)]
    shares = plan_shares(layouts)
    assert shares[0] == [0]
    assert [len(share) for share in shares[1:]] == [3, 3]


def test_a_sharded_tensor_of_which_nobody_holds_anything_is_refused() -> None:
    with pytest.raises(TopologyError, match="no rank holds model/t"):
        plan_shares([[shard("t", 0, 0, 8)], [shard("t", 8, 8, 8)]])


def test_a_sharded_tensor_without_elements_is_written() -> None:
    shares = plan_shares([[shard("t", 0, 0, 0)], [shard("t", 0, 0, 0)]])
    assert sorted(map(len, shares)) == [0, 1]


def test_layouts_that_differ_are_told_completely() -> None:
    first = [whole("a", 1), whole("b", 2), shard("c", 0, 2, 4)]
    second = [whole("a", 1), whole("b", 3), shard("c", 2, 4, 4), whole("d", 1)]
    with pytest.raises(StateMismatchError) as caught:
        refuse_different_layouts([first, second, first[1:]])
    assert caught.value.why is not None
    assert [line.strip() for line in caught.value.why.splitlines()] == [
        "rank 0 has no model/d, which rank 1 has",
        "model/b is U8 (2,) on rank 0, U8 (3,) on rank 1",
        "rank 2 has no model/a",
    ]


def test_of_many_differences_the_first_are_told_and_the_others_counted() -> None:
    with pytest.raises(StateMismatchError, match="and 4 more") as caught:
        refuse_different_layouts([[whole(f"t{i}", 1) for i in range(6)], [], []])
    assert caught.value.why is not None
    assert caught.value.why.count("has no") == 8


def test_places_of_shards_may_differ() -> None:
    refuse_different_layouts([[shard("c", 0, 2, 4)], [shard("c", 2, 4, 4)]])


def test_the_scope_of_a_tensor_follows_from_its_entry_from_the_plan_and_from_what_differs() -> None:
    tree = {name: torch.ones(2) for name in ("mine", "theirs", "own", "same", "differs")}
    scopes = {"own": "per-rank", "same": "compared", "differs": "compared"}
    entry = CapturedEntry("model", "module", 1, tree, tensor_scopes=scopes)  # type: ignore[arg-type]
    encoder = EntryEncoder(entry)
    assert [(item[1], item[7]) for item in layout_of([entry], [encoder])] == [
        ("mine", False),
        ("theirs", False),
        ("same", True),
        ("differs", True),
    ]
    share = Share(1, 2, frozenset({("model", "mine")}), frozenset({("model", "differs")}))
    assert {tensor.name: share.scope_of(entry, tensor) for tensor in encoder.tensors} == {
        "mine": "replicated",
        "theirs": None,
        "own": "per-rank",
        "same": None,
        "differs": "per-rank",
    }
    assert {Share.OF_ONE.scope_of(entry, tensor) for tensor in encoder.tensors} == {"replicated"}


@settings(max_examples=20)
@given(layouts())
def test_a_digest_says_whether_a_layout_has_changed(layouts: list[Layout]) -> None:
    for layout in layouts:
        assert layout_digest(layout) == layout_digest([list(item) for item in layout])
        assert layout_digest(layout) != layout_digest([*layout, whole("another", 1)])


def test_a_rank_that_missed_a_plan_gets_another_one_and_everything_is_written() -> None:
    ranks = meet(2, timeout_s=0.3)
    saves = [JointSaves(rank, "off") for rank in ranks]
    entries = [CapturedEntry("extra", "values", 1, {name: torch.ones(4) for name in "abcd"})]
    given_up = threading.Event()
    planned = JointSaves._plan

    def plan_late(self: JointSaves, layouts: list[Layout]) -> Any:
        # Rank 1 waits for rank 0's plan, and gives it up.
        given_up.wait()
        return planned(self, layouts)

    def agree(what: str) -> list[Any]:
        def work(rank: Any) -> Any:
            try:
                return saves[rank.rank].agree(what, entries)[1]
            finally:
                given_up.set()

        return on_all(ranks, work)

    saves[0]._plan = plan_late.__get__(saves[0])  # type: ignore[method-assign]
    assert isinstance(agree("the save of step 1")[1], RankFailure)
    shares = agree("the save of step 2")
    for rank in ranks:
        rank.close()
    written = [name for share in shares for _, name in share.mine]
    assert sorted(written) == ["a", "b", "c", "d"]
