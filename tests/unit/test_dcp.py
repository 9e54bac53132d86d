"""DCP in one process: what a checkpoint is to it, what is refused, and by which words."""

import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from ckptmgr import Checkpointer
from ckptmgr.errors import (
    CkptmgrError,
    CorruptCheckpointError,
    Fenced,
    RunNotFoundError,
    StateMismatchError,
    StorageError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.format.manifest import AttemptEnd
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, read_attempt_record
from ckptmgr.run.reader import CheckpointReader as VerifyingReader
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.read_entries import load_entries
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.testing.memory import MemoryStorage
from ckptmgr.topology import CheckpointReader, CheckpointWriter, LoadPlanner, SavePlanner

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save(storage: Any, step: int, state: dict[str, Any], **options: Any) -> None:
    planner = options.pop("planner", None) or SavePlanner()
    dcp.save(state, storage_writer=CheckpointWriter("x", step=step, storage=storage, **options), planner=planner)


def load(storage: Any, state: dict[str, Any], selector: str = "latest", **options: Any) -> dict[str, Any]:
    planner = options.pop("planner", None) or LoadPlanner(**options)
    dcp.load(state, storage_reader=CheckpointReader(f"x@{selector}", storage=storage), planner=planner)
    return state


def failure(call: Callable[[], object], kind: type[CkptmgrError]) -> str:
    """Return the text of our error, which DCP has wrapped."""
    with pytest.raises(CheckpointException) as caught:
        call()
    error, _ = caught.value.failures[0]
    assert type(error) is kind
    assert str(error) in str(caught.value)
    return str(error)


def blank(state: Any) -> Any:
    """Return a state of the same form with other values in it."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    return [blank(item) for item in state] if isinstance(state, list) else None


VALUES = {
    "tuple": (1, (2, "three")),
    "set": {4, 5},
    "nan": float("nan"),
    "bytes": b"\x00\xff",
    "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "large": 2**80,
    "dtype": torch.bfloat16,
    "numbers": np.arange(600, dtype=np.uint32),
    3: "an integer for a key",
    "$odd": "a key with a dollar",
    "none": None,
}
TENSORS = {
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "flag": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "pairs": torch.randn(3, dtype=torch.complex128),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "view": torch.randn(4, 6)[:, ::2],
}


def test_every_value_and_tensor_comes_back_as_it_was() -> None:
    storage = MemoryStorage()
    state = {"model": TENSORS, "values": VALUES, "list": [torch.ones(2), {"lr": 0.1}], "epoch": 7, "top": torch.ones(3)}
    save(storage, 1, state)
    live = load(storage, blank(state))
    for name, tensor in TENSORS.items():
        assert torch.equal(live["model"][name], tensor)
    numbers = live["values"].pop("numbers")
    assert (numbers.dtype, numbers.tolist()) == (np.uint32, list(range(600)))
    assert repr(live["values"]) == repr({key: value for key, value in VALUES.items() if key != "numbers"})
    assert live["list"][1] == {"lr": 0.1}
    assert live["epoch"] == 7
    assert torch.equal(live["list"][0], torch.ones(2))
    assert torch.equal(live["top"], torch.ones(3))


def test_the_first_key_is_the_entry_and_the_files_are_plain() -> None:
    storage = MemoryStorage()
    save(storage, 1, {"model": {"a.weight": torch.ones(2)}, "state": {"x": torch.ones(1)}, "epoch": 7})
    manifest = Catalog(storage).latest()
    assert [(e.name, e.handler, e.handler_version) for e in manifest.entries] == [
        ("model", "dcp", 1),
        ("state", "dcp", 1),
        ("state~2", "dcp", 1),
    ]
    assert [(tensor.entry, tensor.name) for tensor in manifest.tensors] == [("model", "a.weight"), ("state", "x")]
    assert verify_checkpoint(Catalog(storage), manifest.id) == []
    entries = load_entries(VerifyingReader(storage, manifest))
    assert entries["state~2"].tree == {"tensors": {}, "values": {"epoch": 7}, "paths": {"epoch": ["epoch"]}}


def test_a_flat_state_dict_is_one_entry_and_half_of_it_is_refused() -> None:
    storage = MemoryStorage()
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    save(storage, 1, model.state_dict())
    assert [entry.name for entry in Catalog(storage).latest().entries] == ["state"]
    half = {"0.weight": torch.zeros(3, 2)}
    assert "not in the live state: '0.bias', '1.weight', '1.bias'" in failure(
        lambda: load(storage, half), StateMismatchError
    )
    assert not half["0.weight"].any()
    load(storage, half, allow_partial_load=True)
    assert torch.equal(half["0.weight"], model[0].weight)


def test_what_does_not_fit_is_told_completely_and_nothing_is_cast_or_changed() -> None:
    storage = MemoryStorage()
    save(storage, 1, {"model": {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "v": 1}, "other": 2})
    model = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(4), "d": torch.zeros(1), "v": torch.zeros(1)}
    text = failure(lambda: load(storage, {"model": model}), StateMismatchError)
    assert "missing in the checkpoint: 'model.d'" in text
    assert "not in the live state: 'model.c'" in text
    assert "dtype of 'model.a' is float32 (2,) in the checkpoint, float64 (2,) now" in text
    assert "shape of 'model.b' is float32 (3,) in the checkpoint, float32 (4,) now" in text
    assert "'model.v' is a value in the checkpoint, float32 (1,) now" in text
    assert not any(tensor.any() for tensor in model.values())


def test_a_part_of_the_state_is_loaded_alone() -> None:
    storage = MemoryStorage()
    save(storage, 1, {"model": {"a": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}, "epoch": 7, "rng": 1})
    assert load(storage, {"model": {"a": torch.zeros(2)}, "epoch": 0})["epoch"] == 7


class Opaque:
    """Something that nobody can store."""


@pytest.mark.parametrize(
    ("value", "told"),
    [(Opaque(), "Opaque"), ((torch.ones(1),), "a tensor inside of a plain value")],
)
def test_what_cannot_be_stored_is_refused_by_name_before_a_run_is_made(value: object, told: str) -> None:
    storage = MemoryStorage()
    text = failure(lambda: save(storage, 1, {"extra": {"thing": value}}), UnsupportedStateError)
    assert "extra.thing" in text
    assert told in text
    assert storage.objects == {}


def test_dcps_own_planners_save_tensors_and_are_refused_values() -> None:
    storage = MemoryStorage()
    save(storage, 1, {"model": {"a": torch.ones(2)}}, planner=DefaultSavePlanner())
    assert torch.equal(
        load(storage, {"model": {"a": torch.zeros(2)}}, planner=DefaultLoadPlanner())["model"]["a"], torch.ones(2)
    )
    state = {"model": {"a": torch.ones(2)}, "epoch": 7}
    assert "1 values are no tensors: epoch" in failure(
        lambda: save(storage, 2, state, planner=DefaultSavePlanner()), UnsupportedStateError
    )
    save(storage, 2, state)
    text = failure(lambda: load(storage, state, planner=DefaultLoadPlanner()), UnsupportedStateError)
    assert "would unpickle them" in text


def test_cached_plans_are_refused_before_they_write_over_a_checkpoint() -> None:
    storage = MemoryStorage()
    state = {"model": {"a": torch.ones(2)}}
    save(storage, 1, state, planner=DefaultSavePlanner(enable_plan_caching=True))
    before = dict(storage.objects)
    try:
        text = failure(
            lambda: save(storage, 2, state, planner=DefaultSavePlanner(enable_plan_caching=True)), UsageError
        )
    finally:
        for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(DefaultSavePlanner, f"_cached_{name}").clear()
    assert "write over its files" in text
    assert storage.objects == before


def test_saves_of_a_process_are_one_attempt_and_going_back_is_a_new_one() -> None:
    storage = MemoryStorage()
    for step in (10, 20, 30, 20, 25):
        save(storage, step, {"epoch": step})
    catalog = Catalog(storage)
    assert [
        (id.step, id.attempt, id.save) for id in sorted(catalog.committed, key=lambda id: (id.attempt, id.save))
    ] == [
        *((10, 1, 0), (20, 1, 1), (30, 1, 2)),
        *((20, 2, 0), (25, 2, 1)),
    ]
    assert load(storage, {"epoch": 0})["epoch"] == 25
    assert [id.step for id in catalog.on_line] == [10, 20, 20, 25]


def test_a_process_that_was_taken_over_is_told() -> None:
    storage = MemoryStorage()
    save(storage, 1, {"epoch": 1})
    claim_attempt(storage, [1])
    assert "attempt 2 took it over" in failure(lambda: save(storage, 2, {"epoch": 2}), Fenced)
    assert [id.step for id in Catalog(storage).committed] == [1]


def test_a_save_that_fails_at_any_operation_commits_nothing_and_the_next_one_is_whole() -> None:
    state = {"model": {"a": torch.ones(2)}, "epoch": 1}
    probe = FaultyStorage(MemoryStorage())
    save(probe, 1, state)
    nbefore = len(probe.points)
    save(probe, 2, state)
    points = probe.points[nbefore:]
    assert points[-1].endswith("manifest.json: done")
    for number, point in enumerate(points, start=1):
        storage = MemoryStorage()
        save(storage, 1, state)
        faulty = FaultyStorage(storage, fail_at=number)
        failure(lambda faulty=faulty: save(faulty, 2, {**state, "epoch": 2}), StorageError)
        catalog = Catalog(storage)
        assert load(storage, blank(state))["epoch"] == (2 if point.endswith("manifest.json: done") else 1)
        end = read_attempt_record(storage, 1, "end", AttemptEnd)
        assert (end.outcome, end.step) == ("failed", 2)
        assert catalog.committed[0].step == 1
        save(storage, 3, {**state, "epoch": 3})
        assert (Catalog(storage).latest().attempt, load(storage, blank(state))["epoch"]) == (2, 3)


def test_a_damaged_tensor_is_found_before_anything_is_changed() -> None:
    storage = MemoryStorage()
    state = {"a": {"x": torch.ones(4)}, "b": {"x": torch.ones(4)}, "epoch": 7}
    save(storage, 1, state)
    key = next(key for key in storage.objects if key.endswith("/b.safetensors"))
    storage.objects[key] = storage.objects[key][:-1] + b"\x01"
    live = blank(state)
    text = failure(lambda: load(storage, live), CorruptCheckpointError)
    assert "b.safetensors is damaged" in text
    assert (live["a"]["x"].sum(), live["b"]["x"].sum(), live["epoch"]) == (0, 0, None)


def test_a_damaged_document_and_a_missing_run_are_told_as_what_they_are() -> None:
    storage = MemoryStorage()
    failure(lambda: load(storage, {"epoch": 0}), RunNotFoundError)
    save(storage, 1, {"epoch": 7})
    key = next(key for key in storage.objects if key.endswith("/state.json"))
    storage.objects[key] = storage.objects[key].replace(b"7", b"8")
    assert "state.json is damaged" in failure(lambda: load(storage, {"epoch": 0}), CorruptCheckpointError)
    with pytest.raises(CorruptCheckpointError):
        _ = CheckpointReader("x", storage=storage).read_metadata().state_dict_metadata


def test_async_save_stages_the_state_and_commits_it() -> None:
    storage = MemoryStorage()
    state = {"model": {"a": torch.ones(2)}, "epoch": 1}
    writer = CheckpointWriter("x", step=1, storage=storage)
    saved = dcp.async_save(state, storage_writer=writer, planner=SavePlanner())
    state["model"]["a"].zero_()
    saved.result()
    assert torch.equal(load(storage, blank(state))["model"]["a"], torch.ones(2))
    assert writer.checkpoint_id == "x@0000000001-000001-000000"


def test_a_writer_is_for_one_save_and_takes_no_other_name() -> None:
    storage = MemoryStorage()
    writer = CheckpointWriter("x", step=1, storage=storage)
    with pytest.raises(UsageError, match="leave checkpoint_id out"):
        dcp.save({"epoch": 1}, checkpoint_id="elsewhere", storage_writer=writer, planner=SavePlanner())
    dcp.save({"epoch": 1}, storage_writer=writer, planner=SavePlanner())
    text = failure(lambda: dcp.save({"epoch": 1}, storage_writer=writer, planner=SavePlanner()), UsageError)
    assert "a CheckpointWriter is for one save" in text
    with pytest.raises(UsageError, match="step='7'"):
        CheckpointWriter("x", step="7", storage=storage)  # type: ignore[arg-type]


def test_a_reader_looks_anew_at_each_load_and_takes_another_reference(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    reader = CheckpointReader(run_dir)
    for step in (1, 2):
        dcp.save({"epoch": step}, storage_writer=CheckpointWriter(run_dir, step=step), planner=SavePlanner())
        state = {"epoch": 0}
        dcp.load(state, storage_reader=reader, planner=LoadPlanner())
        assert state["epoch"] == step
    dcp.load(state, checkpoint_id=f"{run_dir}@1", storage_reader=reader, planner=LoadPlanner())
    assert state["epoch"] == 1


def test_modules_that_a_checkpointer_saved_are_read_with_ties_and_extra_state(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("seen", torch.tensor(4))

        def get_extra_state(self) -> Any:
            return {"words": ("a", "b")}

        def set_extra_state(self, state: Any) -> None:
            pass

    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    with Checkpointer(str(tmp_path), {"model": module, "optimizer": optimizer}, every_n_steps=1) as checkpointer:
        checkpointer.resume()
        checkpointer.step(1)
    live = {"model": blank(module.state_dict())}
    dcp.load(live, storage_reader=CheckpointReader(tmp_path), planner=LoadPlanner())
    assert torch.equal(live["model"]["first.weight"], module.first.weight)
    assert torch.equal(live["model"]["second.weight"], module.first.weight)
    assert live["model"]["seen"] == 4
    assert live["model"]["_extra_state"] == {"words": ("a", "b")}
    with_optimizer = {**live, "optimizer": {"state": {"first.weight": {"exp_avg": torch.zeros(3, 3)}}}}
    text = failure(
        lambda: dcp.load(with_optimizer, storage_reader=CheckpointReader(tmp_path), planner=LoadPlanner()),
        StateMismatchError,
    )
    assert "'optimizer' cannot be loaded through DCP: the handler 'optimizer' saved it" in text


def test_a_checkpointer_that_meets_such_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    dcp.save({"model": model.state_dict()}, storage_writer=CheckpointWriter(tmp_path, step=1), planner=SavePlanner())
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(StateMismatchError, match="saved through PyTorch's DCP") as caught,
        Checkpointer(str(tmp_path), {"model": nn.Linear(2, 2)}, every_n_steps=1) as checkpointer,
    ):
        checkpointer.resume()
    assert "ckptmgr.topology.CheckpointReader" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_document_that_contradicts_the_format_is_corrupt_and_not_a_crash() -> None:
    from ckptmgr.format.manifest import EntryRecord
    from ckptmgr.topology.dcp_layout import read_names

    entry = EntryRecord(name="model", handler="dcp", handler_version=1)
    for document in (
        {},
        {"entries": {}},
        {"entries": {"model": 3}},
        {"entries": {"model": {"tensors": {"a": 1}, "values": {}, "paths": {"a": ["model", "a"]}}}},
        {"entries": {"model": {"tensors": {"a": {"$tensor": "a"}}, "values": {}, "paths": {}}}},
    ):
        with pytest.raises(CorruptCheckpointError, match="not as the format says"):
            read_names([entry], json.loads(json.dumps(document)), "step 1")


def test_a_run_that_was_removed_gets_no_end_of_an_attempt_it_never_had() -> None:
    save(MemoryStorage(), 1, {"epoch": 1})
    again = MemoryStorage()  # the same place, emptied
    save(again, 1, {"epoch": 1})
    assert "attempts/000001/end.json" not in again.objects
