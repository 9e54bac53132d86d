"""What each rank has for itself: finding out whether replicas differ, and what another number of ranks makes of it."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from ranks_of_threads import meet, on_all

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.format.manifest import Manifest, Topology
from ckptmgr.joint_save import JointSaves
from ckptmgr.ranks.group import Ranks
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.divergence import checked_divergence, compared_digests, joined_digest, replica_digests, tensor_digest
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.other_ranks import for_ranks
from ckptmgr.state.rng import capture_rng, derived_rng, preserved_rng, restore_rng, same_rng

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 4)], ids=str)
def test_every_dtype_and_shape_has_a_digest_of_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.zeros(shape, dtype=dtype)
    assert tensor_digest(value) == tensor_digest(value.clone())
    if value.numel():
        flat = value.clone().reshape(-1)
        flat.view(torch.uint8)[-1] = 1
        assert tensor_digest(value) != tensor_digest(flat.reshape(shape))


def test_a_view_has_the_digest_of_its_elements_in_order() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(value.t()) == tensor_digest(value.t().contiguous())
    assert tensor_digest(np.arange(6)[::2]) == tensor_digest(np.arange(0, 6, 2))


def test_not_a_number_is_the_same_as_itself_and_minus_zero_is_not_zero() -> None:
    assert tensor_digest(torch.tensor([float("nan")])) == tensor_digest(torch.tensor([float("nan")]))
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))


def model(weight: float = 0.0, *, buffer: float = 0.0, name: str = "model") -> list[CapturedEntry]:
    tree = {"tensors": {"weight": torch.full((4,), weight), "mean": torch.full((4,), buffer)}}
    return [
        CapturedEntry(name, "module", 1, tree, tensor_scopes={"mean": "compared"}),
        CapturedEntry("own", "values", 1, {"noise": torch.rand(4)}, scope="per-rank"),
        CapturedEntry("extra", "values", 1, {"noise": torch.rand(4)}),
    ]


def test_only_parameters_and_moments_that_all_hold_alike_are_compared() -> None:
    entries = model()
    encoders = [EntryEncoder(entry) for entry in entries]
    assert list(replica_digests(entries, encoders)) == ["model/weight"]
    assert [found[:2] for found in compared_digests(entries, encoders)] == [("model", "mean")]
    assert joined_digest({"a": "1", "b": "2"}) == joined_digest({"b": "2", "a": "1"}) != joined_digest({"a": "2"})


@pytest.mark.parametrize("value", ["", "Warn", None, True, 1])
def test_a_mode_that_does_not_exist_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="on_divergence="):
        checked_divergence(value)


@pytest.mark.parametrize("mode", ["off", "warn", "raise"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ranks_compare_what_they_save(mode: str, weight: float, caplog: pytest.LogCaptureFixture) -> None:
    ranks = meet(3)
    saves = [JointSaves(rank, checked_divergence(mode)) for rank in ranks]
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        outcomes = on_all(ranks, lambda r: saves[r.rank].agree("step 5", model(weight if r.rank == 2 else 0.0)))
    for rank in ranks:
        rank.close()
    refused = mode == "raise" and bool(weight)
    assert [isinstance(outcome, StateMismatchError) for outcome in outcomes] == [refused] * 3
    if refused:
        assert "1 of 1 tensors differ from those of rank 0: model/weight on rank 2" in str(outcomes[1])
    warned = [message for message in caplog.messages if "diverged" in message]
    assert len(warned) == (mode == "warn" and bool(weight))
    assert all("model/weight on rank 2" in message for message in warned)


@pytest.mark.parametrize("name", ["model", "gan/generator"])
@pytest.mark.parametrize("differs", [False, True])
def test_a_compared_buffer_is_each_ranks_own_only_while_it_differs(differs: bool, name: str) -> None:
    ranks = meet(2)
    saves = [JointSaves(rank, "off") for rank in ranks]
    work = lambda r: saves[r.rank].agree("step 1", model(buffer=float(r.rank) * differs, name=name))  # noqa: E731
    for encoders, share in on_all(ranks, work):
        (mean,) = [tensor for tensor in encoders[0].tensors if tensor.name == "mean"]
        expected = "per-rank" if differs else ("replicated" if share.rank == 0 else None)
        assert share.scope_of(model(name=name)[0], mean) == expected
    for rank in ranks:
        rank.close()


def draws(tree: dict[str, object]) -> tuple[float, float, float]:
    """Return what the global generators give from a state on."""
    with preserved_rng():
        restore_rng(tree)
        return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_derived_states_are_the_same_each_time_and_differ_between_ranks_and_from_their_origin() -> None:
    origin = capture_rng()
    derived = [derived_rng(origin, rank=rank) for rank in range(1, 9)]
    again = [derived_rng(origin, rank=rank) for rank in range(1, 9)]
    assert all(same_rng(first, second) for first, second in zip(derived, again, strict=True))
    for numbers in zip(draws(origin), *map(draws, derived), strict=True):
        assert len(set(numbers)) == 9


def test_derived_states_differ_where_their_origins_do() -> None:
    with preserved_rng():
        torch.manual_seed(1)
        first = derived_rng(capture_rng(), rank=1)
        torch.manual_seed(2)
        second = derived_rng(capture_rng(), rank=1)
    assert all(a != b for a, b in zip(draws(first), draws(second), strict=True))


def saved_by(world_size: int) -> Manifest:
    return Manifest(
        version=2,
        run_id="run",
        checkpoint="0000000007-000001-000000",
        attempt=1,
        step=7,
        reason="test",
        created_at="",
        files=(),
        tensors=(),
        entries=(),
        states=(),
        topology=Topology(world_size=world_size),
    )


def entries() -> dict[str, CapturedEntry]:
    return {
        "rng": CapturedEntry("rng", "rng", 1, capture_rng(), "per-rank"),
        "own": CapturedEntry("own", "values", 1, {"a": 1}, "per-rank"),
        "model": CapturedEntry("model", "module", 1, {}),
    }


@pytest.mark.parametrize(("saved", "now"), [(1, 1), (2, 2), (2, 4), (4, 2), (1, 3), (3, 1)])
def test_only_new_ranks_get_random_numbers_of_their_own(saved: int, now: int, caplog: pytest.LogCaptureFixture) -> None:
    loaded = entries()
    group = meet(now) if now > 1 else [Ranks.alone()]
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        for ranks in group:
            adapted = for_ranks(loaded, saved_by(saved), ranks)
            assert adapted["own"] is loaded["own"]
            assert adapted["model"] is loaded["model"]
            is_kept = same_rng(adapted["rng"].tree, loaded["rng"].tree)
            assert is_kept == (ranks.rank < saved)
    for ranks in group:
        ranks.close()
    # Once, by rank 0, and only where something is lost or shared.
    assert len(caplog.messages) == (saved != now and saved > 1)
    assert all("each rank had its own own" in message for message in caplog.messages)
