"""DCP on real ranks: from one process to FSDP2, to FSDP2 with tensor parallel, to DDP, and back to one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_script import build, same, state_of, tensors_of

from ckptmgr.cli.main import run
from ckptmgr.format.manifest import AttemptEnd
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record
from ckptmgr.storage import open_storage
from ckptmgr.topology import CheckpointReader, CheckpointWriter, LoadPlanner, SavePlanner

SCRIPT = Path(__file__).with_name("dcp_script.py")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def launch(case: str, place: Path, nranks: int) -> list[dict[str, Any]]:
    """Run a case on real ranks, and return what each of them found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), case, str(place)], env=environment, capture_output=True, text=True, timeout=300
    )
    (place / f"{case}.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((place / f"{case}-{rank}.json").read_text()) for rank in range(nranks)]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return state_of(build(0), is_trained=True)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, trained: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Pass one state on from topology to topology; each test looks at a part of what came of it."""
    place = tmp_path_factory.mktemp("dcp")
    torch.save(tensors_of(trained), place / "plain.pt")
    dcp.save(trained, storage_writer=CheckpointWriter(place / "plain", step=2), planner=SavePlanner())
    found = {case: launch(case, place, nranks) for case, nranks in (("fsdp", 2), ("fsdp_tp", 4), ("ddp", 2))}
    return place, found


def loaded(place: Path, name: str) -> dict[str, Any]:
    state = state_of(build(9), is_trained=False)
    dcp.load(state, storage_reader=CheckpointReader(place / name), planner=LoadPlanner())
    return state


def test_a_state_is_the_same_on_every_topology_that_takes_it_over(story: Any) -> None:
    _, found = story
    assert {case: [rank["same as plain"] for rank in ranks] for case, ranks in found.items()} == {
        "fsdp": [True, True],
        "fsdp_tp": [True] * 4,
        "ddp": [True, True],
    }


@pytest.mark.parametrize("name", ["plain", "fsdp", "tp", "ddp"])
def test_what_any_topology_saved_loads_into_one_process(story: Any, trained: dict[str, Any], name: str) -> None:
    place, _ = story
    state = loaded(place, name)
    assert same(tensors_of(state), tensors_of(trained))
    assert repr(state["progress"]) == repr(trained["progress"])
    assert state["optimizer"]["param_groups"] == trained["optimizer"]["param_groups"]


def test_values_come_back_on_ranks_as_they_were(story: Any) -> None:
    _, found = story
    assert {rank["progress"] for rank in found["fsdp"]} == {"{'step': 2, 'best': nan, 'window': (1, 2)}"}


def test_a_checkpoint_of_several_ranks_is_one_like_any_other(story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = story
    manifest = Catalog(open_storage(str(place / "tp"))).latest()
    assert (manifest.version, manifest.topology.world_size, manifest.topology.mesh) == (2, 4, {"dp": 2, "tp": 2})
    assert not [path for path in place.glob("*/checkpoints/*/*") if path.suffix not in (".json", ".safetensors")]
    for name in ("fsdp", "tp", "ddp", "own", "full"):
        assert run(["verify", str(place / name)]) == 0
    assert run(["show", f"{place / 'tp'}@latest"]) == 0
    told = capsys.readouterr().out
    assert "dcp v1" in told
    assert "damaged" not in told


def test_a_full_disk_on_one_rank_commits_nothing_and_names_the_rank(story: Any) -> None:
    place, found = story
    for rank in found["fsdp"]:
        assert rank["full disk"]["classes"] == {"1": "StorageError"}
        assert "(RANK 1)" in rank["full disk"]["text"]
        assert "No space left" in rank["full disk"]["text"]
    storage = open_storage(str(place / "full"))
    catalog = Catalog(storage)
    assert [(id.step, id.attempt) for id in catalog.committed] == [(5, 2)]
    end = read_attempt_record(storage, 1, "end", AttemptEnd)
    assert (end.outcome, end.step) == ("failed", 4)
    assert end.error is not None
    assert end.error.startswith("rank 1: StorageError")


def test_pickled_values_are_refused_on_all_ranks_before_a_run_is_made(story: Any) -> None:
    place, found = story
    for rank in found["fsdp"]:
        assert rank["pickled"]["classes"] == {"0": "UnsupportedStateError", "1": "UnsupportedStateError"}
        # The first ones by name, all of them by number.
        assert "15 values are no tensors: optimizer.param_groups.0.lr, " in rank["pickled"]["text"]
    assert not (place / "none").exists()


def test_a_value_that_each_rank_has_for_itself_is_refused_by_name(story: Any) -> None:
    _, found = story
    for rank in found["fsdp"]:
        assert rank["own values"]["classes"] == {"0": "StateMismatchError"}
        assert "mine.rank" in rank["own values"]["text"]


def test_of_a_tensor_that_differs_rank_0s_is_saved_and_said(story: Any) -> None:
    place, found = story
    assert [rank["own tensor"] for rank in found["fsdp"]] == [7.0, 7.0]
    assert "buffers.seen; what belongs to each rank needs a name of its own" in (place / "fsdp.log").read_text()


def test_a_flipped_byte_is_an_error_on_every_rank_and_changes_nothing_on_any(story: Any) -> None:
    _, found = story
    for rank in found["fsdp"]:
        assert set(rank["flipped"]["classes"].values()) == {"CorruptCheckpointError"}
        assert "model-rank-00001.safetensors is damaged" in rank["flipped"]["text"]
        assert rank["untouched"]


def test_async_save_commits_in_the_same_attempt(story: Any) -> None:
    _, found = story
    assert {rank["async"] for rank in found["fsdp"]} == {"0000000003-000001-000001"}


def test_what_a_checkpointer_saved_on_ranks_loads_through_dcp(story: Any) -> None:
    _, found = story
    assert [rank["from a Checkpointer"] for rank in found["fsdp"]] == [True, True]
