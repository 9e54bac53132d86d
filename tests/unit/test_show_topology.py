"""What ``ckptmgr show`` and ``ls`` tell of checkpoints that several ranks wrote, and of another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_samples import create_run, payload, save, start

from ckptmgr.cli.main import run
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import EntryRecord, Manifest, Topology
from ckptmgr.format.payload import FilePayload, Scope, TensorPayload
from ckptmgr.run.commit import CheckpointFields, commit_sealed, write_files
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]

NRANKS = 4
FACTS = {"kind": "map", "batch_size": 8, "world_size": NRANKS}
# In the middle of an epoch, and in one that an ElasticSampler has ordered.
PLAIN = {"epoch": 2, "batch": 3, "is_exhausted": False, "is_last_batch": False, "epoch_start": {}, "facts": FACTS}
SAMPLER = {"sampler": {"position": 24, "length": 64}}
LIGHTNING = {"epoch": 2, "batches": 3, "is_last": False, "loaders": [{"facts": FACTS}]}


def tensor(name: str, scope: Scope, rank: int) -> TensorPayload:
    # Two elements of the whole's eight, where it is a shard.
    place = {"global_shape": (2 * NRANKS,), "global_offset": (2 * rank,)} if scope == "sharded" else {}
    owner = None if scope == "replicated" else rank
    return TensorPayload(name, "model", "F32", (2,), memoryview(bytes(8)), scope=scope, rank=owner, **place)


def save_on_ranks(
    root: Path, step: int, position: dict[str, Any] | None, *, handler: str = "data-position", mesh: dict[str, int]
) -> Manifest:
    """Commit a checkpoint of four ranks: a model with tensors of each scope, a position, RNG and counters."""
    storage = open_storage(root)
    create_run(storage)
    checkpoint = CheckpointId(step, start(storage), 0)
    state = json.dumps({"entries": {"model": {}, "ckptmgr_data": position, "ckptmgr_rng": {}, "counters": {}}})
    parts = []
    for rank in range(NRANKS):
        tensors = [tensor("weight", "sharded", rank), tensor("mean", "per-rank", rank)]
        tensors += [tensor("bias", "replicated", rank)] if rank == 0 else []
        files = [
            FilePayload(f"model-{rank}.safetensors", tensors=tuple(tensors)),
            FilePayload(f"state-{rank}.json", content=state.encode(), is_state=True),
        ]
        parts.append(write_files(storage, checkpoint, files))
    fields = CheckpointFields(
        run_id="00" * 8,
        reason="test",
        entries=(
            EntryRecord(name="model", handler="module", handler_version=1),
            EntryRecord(name="ckptmgr_data", handler=handler, handler_version=1, scope="per-rank"),
            EntryRecord(name="ckptmgr_rng", handler="rng", handler_version=1, scope="per-rank"),
            EntryRecord(name="counters", handler="values", handler_version=1, scope="per-rank"),
        ),
        topology=Topology(world_size=NRANKS, mesh=mesh),
    )
    return commit_sealed(storage, checkpoint, parts, fields)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_on_ranks(tmp_path / "run", 7, PLAIN | SAMPLER, mesh={"dp": 2, "tp": 2})
    return tmp_path / "run"


def shown(run_dir: Path, capsys: Output, *options: str) -> dict[str, Any]:
    assert run(["show", f"{run_dir}@latest", "--json", *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def told(run_dir: Path, nproc: int, capsys: Output) -> dict[str, dict[str, Any]]:
    document = shown(run_dir, capsys, "--nproc", str(nproc))["on_nproc"]
    assert document["nproc"] == nproc
    return {entry["entry"]: entry for entry in document["entries"]}


def test_a_checkpoint_tells_its_ranks_and_what_they_had_in_common(run_dir: Path, capsys: Output) -> None:
    assert run(["show", f"{run_dir}@7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ranks" in next(line for line in lines if "4 ranks (dp 2 \N{MULTIPLICATION SIGN} tp 2)" in line)
    model = next(line for line in lines if line.startswith("model "))
    assert all(words in model for words in ("sharded 1", "per-rank 1", "replicated 1"))
    assert "per-rank" in next(line for line in lines if line.startswith("counters "))
    entry = shown(run_dir, capsys)["entries"][0]
    assert entry["tensor_scopes"] == {"sharded": 1, "per-rank": 1, "replicated": 1}
    assert entry["ntensors"] == 3, "a tensor in four shards is one"


def test_a_checkpoint_of_one_rank_says_nothing_of_others(tmp_path: Path, capsys: Output) -> None:
    storage = open_storage(tmp_path / "run")
    create_run(storage)
    save(storage, start(storage), 1)
    assert run(["show", f"{tmp_path / 'run'}@1"]) == 0
    output = capsys.readouterr().out
    assert "1 rank\n" in "\n".join(line.rstrip() for line in output.splitlines())
    assert "replicated" not in output
    assert run(["ls", str(tmp_path / "run")]) == 0
    assert "ranks" not in capsys.readouterr().out


def test_ls_shows_ranks_where_a_checkpoint_has_several(run_dir: Path, capsys: Output) -> None:
    save(open_storage(run_dir), start(open_storage(run_dir)), 9, files=payload(9))
    assert run(["ls", str(run_dir)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    # The column is aligned right.
    at = header.index("ranks") + len("ranks") - 1
    assert [(row.split()[0], row[at]) for row in rows] == [("7", "4"), ("9", "1")]
    assert run(["ls", "--json", str(run_dir)]) == 0
    assert [entry["world_size"] for entry in json.loads(capsys.readouterr().out)["checkpoints"]] == [4, 1]


def test_as_many_ranks_take_back_all_that_they_had(run_dir: Path, capsys: Output) -> None:
    entries = told(run_dir, 4, capsys)
    assert not any(entry["is_refused"] for entry in entries.values())
    assert "takes back its shards" in entries["model"]["words"]
    assert entries["ckptmgr_rng"]["words"] == "ranks 0 to 3 take back their own"
    assert entries["ckptmgr_data"]["words"] == "goes on after batch 3 of epoch 2"


def test_fewer_ranks_leave_what_the_others_had(run_dir: Path, capsys: Output) -> None:
    entries = told(run_dir, 1, capsys)
    assert "put together from their shards" in entries["model"]["words"]
    assert "all take that of rank 0" in entries["model"]["words"]
    assert entries["counters"]["words"] == "rank 0 takes back its own; that of ranks 1 to 3 is left"


def test_new_ranks_get_random_numbers_of_their_own_and_the_rest_of_rank_0(run_dir: Path, capsys: Output) -> None:
    entries = told(run_dir, 8, capsys)
    assert "ranks 4 to 7, new, derive their own" in entries["ckptmgr_rng"]["words"]
    assert "ranks 4 to 7, new, take that of rank 0" in entries["counters"]["words"]


def test_a_position_of_an_elastic_sampler_goes_on_on_any_number_that_splits_the_batch(
    run_dir: Path, capsys: Output
) -> None:
    for nproc in (1, 2, 8):
        position = told(run_dir, nproc, capsys)["ckptmgr_data"]
        assert not position["is_refused"]
        assert "after 24 of 64 samples of epoch 2" in position["words"]
    position = told(run_dir, 3, capsys)["ckptmgr_data"]
    assert position["is_refused"]
    assert "global batch size 8 cannot be split over 3 ranks; 2 or 4 would do" in position["words"]


@pytest.mark.parametrize("between", [{"is_last_batch": True}, {"is_exhausted": True}, {"epoch_start": None}])
def test_another_loader_is_refused_in_mid_epoch_and_not_between_epochs(
    tmp_path: Path, capsys: Output, between: dict[str, Any]
) -> None:
    save_on_ranks(tmp_path / "mid", 7, PLAIN, mesh={})
    position = told(tmp_path / "mid", 2, capsys)["ckptmgr_data"]
    assert position["is_refused"]
    assert "on_resume='restart'" in position["words"]
    assert not told(tmp_path / "mid", 4, capsys)["ckptmgr_data"]["is_refused"]
    save_on_ranks(tmp_path / "end", 7, PLAIN | between, mesh={})
    assert not told(tmp_path / "end", 2, capsys)["ckptmgr_data"]["is_refused"]


def test_a_data_set_that_is_elastic_goes_on(tmp_path: Path, capsys: Output) -> None:
    save_on_ranks(tmp_path / "run", 7, PLAIN | {"facts": {**FACTS, "is_elastic": True}}, mesh={})
    assert not told(tmp_path / "run", 2, capsys)["ckptmgr_data"]["is_refused"]


def test_a_sampler_that_fewer_ranks_share_than_there_are_is_not_judged(tmp_path: Path, capsys: Output) -> None:
    # Tensor parallel ranks train the same samples: into how many parts six ranks split a batch is up to the program.
    facts = {"facts": {**FACTS, "world_size": 2}}
    save_on_ranks(tmp_path / "run", 7, PLAIN | SAMPLER | facts, mesh={"dp": 2, "tp": 2})
    assert not told(tmp_path / "run", 6, capsys)["ckptmgr_data"]["is_refused"]


@pytest.mark.parametrize(
    ("data", "is_refused"),
    [
        (LIGHTNING, True),
        (LIGHTNING | {"is_last": True}, False),
        # The callback makes a sampler for as many ranks as there are.
        (LIGHTNING | {"loaders": [{"facts": FACTS, **SAMPLER}]}, False),
        (None, False),
    ],
)
def test_a_position_of_lightning_is_told_likewise(
    tmp_path: Path, capsys: Output, data: dict[str, Any] | None, is_refused: bool
) -> None:
    save_on_ranks(tmp_path / "run", 7, {"place": "step", "data": data}, handler="lightning-data", mesh={})
    assert told(tmp_path / "run", 3, capsys)["ckptmgr_data"]["is_refused"] == is_refused


def test_a_position_that_is_not_as_the_format_says_is_an_error(tmp_path: Path, capsys: Output) -> None:
    save_on_ranks(tmp_path / "run", 7, {"epoch": 2}, mesh={})
    assert run(["show", f"{tmp_path / 'run'}@7", "--nproc", "2"]) == 12
    assert "not as the format says" in capsys.readouterr().err
    assert run(["show", f"{tmp_path / 'run'}@7"]) == 0, "it is looked at only if it is asked for"


@pytest.mark.parametrize("others", [[], ["--config"]])
def test_ranks_are_asked_about_of_one_checkpoint(run_dir: Path, capsys: Output, others: list[str]) -> None:
    assert run(["show", str(run_dir), "--nproc", "2", *others]) == 2
    assert f"ckptmgr show {run_dir}@latest --nproc 2" in capsys.readouterr().err
