"""A fork is a run by itself: whole without its parent, or not there at all."""

from __future__ import annotations

import shutil
import struct
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from run_samples import create_run, save, start

from ckptmgr import fork
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, Fenced, StorageError, UsageError
from ckptmgr.fork import fork_run, refuse_cut_off_fork
from ckptmgr.format.digest import BLOCK_NBYTES
from ckptmgr.format.layout import RUN_MARKER, CheckpointId, attempt_key, manifest_key, note_key
from ckptmgr.format.manifest import AttemptEnd, Manifest, Note, RunMarker
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.format.record import decode_record, encode_record
from ckptmgr.launch.experiment import ExperimentRecord, document_digest
from ckptmgr.launch.start_record import StartRecord, describe_start
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt
from ckptmgr.run.prune import delete_checkpoints
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage

CONFIG, RESOLVED = "lr: ${base}\nbase: 0.1\n", "lr: 0.1\nbase: 0.1\n"


@pytest.fixture
def source(tmp_path: Path) -> LocalStorage:
    """A configured run with steps 100, 200 (tagged, best) and 300, and a metric that arrived later."""
    storage = LocalStorage(tmp_path / "source")
    create_run(storage)
    attempt = start(storage)
    digests = [document_digest(text.encode()) for text in (CONFIG, RESOLVED)]
    experiment = ExperimentRecord(config_digest=digests[0], resolved_digest=digests[1])
    storage.write(attempt_key(attempt, "config"), [CONFIG.encode()])
    storage.write(attempt_key(attempt, "resolved"), [RESOLVED.encode()])
    storage.write(attempt_key(attempt, "loggers"), [b"{}"])
    record = msgspec.structs.replace(describe_start(), kind="script", target="train.py", experiment=experiment, pid=1)
    storage.write(attempt_key(attempt, "start"), [encode_record(record)])
    for number, step in enumerate((100, 200, 300)):
        save(
            storage,
            attempt,
            step,
            number=number,
            metrics={"loss": 0.1 if step == 200 else 0.5},
            tags=["t"][: step == 200],
        )
    late = CheckpointId(200, attempt, 1)
    note = Note(version=1, checkpoint=str(late), attempt=1, created_at="", metrics={"acc": 0.9}, tags=("later",))
    storage.write(note_key(late, 1, 0), [encode_record(note)])
    return storage


def floats_of(storage: Storage, manifest: Manifest) -> dict[str, float]:
    reader = CheckpointReader(storage, manifest)
    return {t.name: struct.unpack_from("<f", reader.read_tensor(t))[0] for t in manifest.tensors}


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) if root.exists() else []


@pytest.mark.parametrize(
    ("selector", "step"),
    [("latest", 300), ("best", 200), ("100", 100), ("t", 200), ("later", 200), (str(CheckpointId(100, 1, 0)), 100)],
)
def test_any_reference_can_be_forked(source: LocalStorage, tmp_path: Path, selector: str, step: int) -> None:
    made = fork_run(Reference(source.url, selector), str(tmp_path / "new"))
    storage = LocalStorage(tmp_path / "new")
    assert Catalog(storage).latest() == made
    assert made.checkpoint == f"{step:010d}-000001-000000"
    assert floats_of(storage, made) == {"bias": step, "weight": step + 1}


def test_a_fork_is_whole_without_its_parent_and_names_it(source: LocalStorage, tmp_path: Path) -> None:
    parent = Catalog(source).resolve("200")
    made = fork_run(parse_reference(f"{source.url}@200"), str(tmp_path / "new"))
    shutil.rmtree(source.url)
    storage = LocalStorage(tmp_path / "new")
    catalog = Catalog.of_existing_run(storage)
    assert verify_checkpoint(catalog, made.id) == []
    assert catalog.marker.parent == f"{source.url}@{parent.checkpoint}"
    assert catalog.marker.run_id == made.run_id != parent.run_id
    assert made.reason == "fork of source@200"
    assert made.metrics == {"loss": 0.1, "acc": 0.9}
    assert (made.tags, made.continues) == ((), None)
    assert (made.monitor, made.mode) == (parent.monitor, parent.mode)
    end = decode_record(storage.read(attempt_key(1, "end")), AttemptEnd, where="end")
    assert (end.outcome, end.step) == ("finished", 200)
    assert all(file.path.startswith(made.id.folder) for file in made.files)


def test_a_fork_can_be_started_as_its_parent_was(source: LocalStorage, tmp_path: Path) -> None:
    fork_run(parse_reference(source.url), str(tmp_path / "new"))
    storage = LocalStorage(tmp_path / "new")
    assert storage.read(attempt_key(1, "config")).decode() == CONFIG
    assert storage.read(attempt_key(1, "resolved")).decode() == RESOLVED
    record = decode_record(storage.read(attempt_key(1, "start")), StartRecord, where="start")
    assert (record.kind, record.target) == ("script", "train.py")
    assert record.experiment is not None
    assert record.pid != 1
    assert record.fork_of == Catalog(storage).marker.parent
    # The loggers of the parent are the parent's.
    assert "loggers" not in Catalog(storage).attempts[1]


def test_a_fork_of_a_run_without_records_of_its_start_has_none(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "bare")
    create_run(storage)
    save(storage, start(storage), 10)
    fork_run(parse_reference(storage.url), str(tmp_path / "new"))
    assert Catalog(LocalStorage(tmp_path / "new")).attempts == {1: {"claim", "line", "end"}}


def test_a_fork_of_a_fork_names_the_fork(source: LocalStorage, tmp_path: Path) -> None:
    fork_run(parse_reference(source.url), str(tmp_path / "new"))
    fork_run(parse_reference(str(tmp_path / "new")), str(tmp_path / "newer"))
    parent = Catalog(LocalStorage(tmp_path / "newer")).marker.parent
    assert parent == f"{tmp_path / 'new'}@0000000300-000001-000000"


def test_files_of_earlier_checkpoints_are_copied_also_those_of_one_name(source: LocalStorage, tmp_path: Path) -> None:
    old, new = Catalog(source).resolve("100"), Catalog(source).resolve("300")
    id = CheckpointId(400, 1, 3)
    # Of the earlier file one tensor only is this checkpoint's.
    frozen = msgspec.structs.replace(old.tensors[1], entry="model", name="frozen", file=len(new.files))
    both = msgspec.structs.replace(
        new,
        checkpoint=str(id),
        step=400,
        files=(*new.files, old.files[frozen.file - len(new.files)]),
        tensors=(*new.tensors, frozen),
    )
    source.write(manifest_key(id), [encode_record(both)])
    made = fork_run(parse_reference(f"{source.url}@400"), str(tmp_path / "new"))
    shutil.rmtree(source.url)
    storage = LocalStorage(tmp_path / "new")
    assert verify_checkpoint(Catalog(storage), made.id) == []
    assert floats_of(storage, made) == {"bias": 300, "weight": 301, "frozen": 101}


@pytest.mark.parametrize("damage", ["flip", "flip in the state", "cut", "longer", "header"])
def test_a_damaged_checkpoint_is_not_forked_and_leaves_nothing(
    source: LocalStorage, tmp_path: Path, damage: str
) -> None:
    catalog = Catalog(source)
    file = catalog.latest().files[1 if "state" in damage else 0]
    path = Path(source.url) / file.path
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-1]
    elif damage == "longer":
        data += b"x"
    else:
        data[20 if damage == "header" else -2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"300|model\.safetensors|state\.json"):
        fork_run(parse_reference(f"{source.url}@300"), str(tmp_path / "new"))
    assert files_below(tmp_path / "new") == []
    assert fork_run(parse_reference(f"{source.url}@200"), str(tmp_path / "new")).step == 200


def test_a_tensor_of_several_blocks_is_checked_block_by_block(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "source")
    create_run(storage)
    big = bytearray(4 * BLOCK_NBYTES + 5)
    tensors = tuple(
        TensorPayload(name=name, entry="model", dtype="U8", shape=(len(data),), data=memoryview(data))
        for name, data in (("big", big), ("none", bytearray()), ("small", bytearray(b"abc")))
    )
    manifest = save(storage, start(storage), 10, files=[FilePayload("model.safetensors", tensors=tensors)])
    made = fork_run(parse_reference(storage.url), str(tmp_path / "new"))
    assert verify_checkpoint(Catalog(LocalStorage(tmp_path / "new")), made.id) == []
    with (Path(storage.url) / manifest.files[0].path).open("r+b") as file:
        file.seek(manifest.tensors[0].offset + 3 * BLOCK_NBYTES + 1)
        file.write(b"x")
    with pytest.raises(CorruptCheckpointError, match="'big'"):
        fork_run(parse_reference(storage.url), str(tmp_path / "newer"))
    assert files_below(tmp_path / "newer") == []


def test_a_damaged_configuration_is_not_forked(source: LocalStorage, tmp_path: Path) -> None:
    (Path(source.url) / attempt_key(1, "config")).write_text("lr: 7\n")
    with pytest.raises(CorruptCheckpointError, match=r"config\.yaml"):
        fork_run(parse_reference(source.url), str(tmp_path / "new"))
    assert files_below(tmp_path / "new") == []


def test_what_is_not_there_cannot_be_forked(source: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no run in"):
        fork_run(Reference(str(tmp_path / "typo")), str(tmp_path / "new"))
    with pytest.raises(CheckpointNotFoundError, match="step 250"):
        fork_run(Reference(source.url, "250"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_an_empty_directory_can_be_forked_into(source: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    fork_run(parse_reference(source.url), str(tmp_path / "new"))


@pytest.mark.parametrize("name", ["notes.txt", ".git", "with space", "checkpoints.txt"])
def test_a_directory_with_other_files_is_refused(source: LocalStorage, tmp_path: Path, name: str) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds {name}"):
        fork_run(parse_reference(source.url), str(tmp_path / "new"))
    assert files_below(tmp_path / "new") == [name]


def test_a_file_in_the_place_of_the_directory_is_refused(source: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    with pytest.raises(StorageError, match="a file stands"):
        fork_run(parse_reference(source.url), str(tmp_path / "new"))


def test_another_run_is_refused(source: LocalStorage, tmp_path: Path) -> None:
    other = LocalStorage(tmp_path / "other")
    create_run(other, run_id="11" * 8)
    with pytest.raises(UsageError, match="no checkpoint yet"):
        fork_run(parse_reference(source.url), other.url)
    save(other, start(other), 5, run_id="11" * 8)
    with pytest.raises(UsageError, match="holds a run with 1 checkpoints"):
        fork_run(parse_reference(source.url), other.url)


def test_a_fork_that_is_there_already_says_how_to_go_on(source: LocalStorage, tmp_path: Path) -> None:
    fork_run(parse_reference(source.url), str(tmp_path / "new"))
    before = files_below(tmp_path / "new")
    with pytest.raises(UsageError, match=r"this very fork[\s\S]*ckptmgr resume"):
        fork_run(parse_reference(source.url), str(tmp_path / "new"))
    assert files_below(tmp_path / "new") == before


@pytest.mark.parametrize("to", ["source", "source/inner", ".", "link", "source@100"])
def test_a_place_that_overlaps_with_the_parent_is_refused(source: LocalStorage, tmp_path: Path, to: str) -> None:
    (tmp_path / "link").symlink_to(source.url)
    before = files_below(tmp_path)
    with pytest.raises(UsageError):
        fork_run(parse_reference(source.url), str(tmp_path / to))
    assert files_below(tmp_path) == before


def test_a_fork_in_which_somebody_trains_is_not_gone_on_with(source: LocalStorage, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "new")
    parent = f"{source.url}@{Catalog(source).latest().checkpoint}"
    marker = RunMarker(version=1, run_id="22" * 8, created_at="", parent=parent)
    storage.write(RUN_MARKER, [encode_record(marker)])
    claim_attempt(storage, [])
    storage.write(attempt_key(1, "start"), [encode_record(describe_start())])
    with pytest.raises(UsageError, match="no checkpoint yet"):
        fork_run(parse_reference(source.url), storage.url)


def test_a_cut_off_fork_of_another_checkpoint_is_named(source: LocalStorage, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "new")
    marker = RunMarker(version=1, run_id="22" * 8, created_at="", parent="elsewhere@x")
    storage.write(RUN_MARKER, [encode_record(marker)])
    claim_attempt(storage, [])
    with pytest.raises(UsageError, match=r"fork of elsewhere@x was cut off[\s\S]*remove it"):
        fork_run(parse_reference(source.url), storage.url)


def test_a_cut_off_fork_is_not_trained_in_from_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "new")
    claim_attempt(storage, [])
    with pytest.raises(UsageError, match="fork that was cut off"):
        refuse_cut_off_fork(Catalog(storage), storage.url)
    create_run(storage)
    refuse_cut_off_fork(Catalog(storage), storage.url)


def test_a_run_goes_from_one_storage_to_another(source: LocalStorage, tmp_path: Path) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    fork_run(parse_reference(source.url), f"{place}/a")
    fork_run(parse_reference(f"{place}/a"), f"{place}/b")
    made = fork_run(parse_reference(f"{place}/b"), str(tmp_path / "back"))
    for url in (f"{place}/a", f"{place}/b", str(tmp_path / "back")):
        assert verify_checkpoint(Catalog(open_storage(url)), made.id) == []
    with pytest.raises(UsageError, match="lies within"):
        fork_run(parse_reference(f"{place}/a"), f"{place}/a/inner")


def test_credentials_of_the_parent_are_not_recorded(source: LocalStorage, tmp_path: Path) -> None:
    place = f"memory://user:password@{uuid.uuid4().hex}/a"
    fork_run(parse_reference(source.url), place)
    fork_run(parse_reference(place), str(tmp_path / "new"))
    stored = b"".join((tmp_path / "new" / name).read_bytes() for name in files_below(tmp_path / "new"))
    assert b"password" not in stored


def test_a_checkpoint_that_retention_deletes_meanwhile_is_told_as_such(
    source: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_files = fork.copy_files

    def late(*args: Any) -> Any:
        delete_checkpoints(Catalog(source), [CheckpointId(100, 1, 0)])
        return copy_files(*args)

    monkeypatch.setattr(fork, "copy_files", late)
    with pytest.raises(CheckpointNotFoundError, match="deleted while it was copied"):
        fork_run(Reference(source.url, "100"), str(tmp_path / "new"))
    assert files_below(tmp_path / "new") == []


def test_a_fork_that_is_interrupted_leaves_nothing(
    source: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_files = fork.copy_files

    def interrupted(*args: Any) -> Any:
        copy_files(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fork, "copy_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork_run(Reference(source.url), str(tmp_path / "new"))
    assert files_below(tmp_path / "new") == []


@pytest.mark.parametrize("other", ["300", "100"])
def test_of_two_forks_into_one_directory_one_is_told_that_it_lost(
    source: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    copy_files = fork.copy_files
    winners: list[Manifest] = []

    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(fork, "copy_files", copy_files)
        winners.append(fork_run(Reference(source.url, other), str(tmp_path / "new")))
        return copy_files(*args)

    monkeypatch.setattr(fork, "copy_files", overtaken)
    with pytest.raises(Fenced):
        fork_run(Reference(source.url, "300"), str(tmp_path / "new"))
    catalog = Catalog.of_existing_run(LocalStorage(tmp_path / "new"))
    assert catalog.latest() == winners[0]
    assert verify_checkpoint(catalog, winners[0].id) == []
    assert catalog.torn == []
