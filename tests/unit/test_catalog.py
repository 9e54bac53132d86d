import shutil
from pathlib import Path

import pytest
from run_samples import create_run, save, start

from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, RunNotFoundError, StorageError, UsageError
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import Note
from ckptmgr.format.record import encode_record
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.storage.local import LocalStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    storage = LocalStorage(root)
    create_run(storage)
    attempt = start(storage)
    for number, (step, loss) in enumerate([(10, 0.5), (20, 0.2), (30, float("nan"))]):
        save(storage, attempt, step, number=number, metrics={"loss": loss}, tags=["warm"] if step == 10 else [])
    return storage


@pytest.mark.parametrize(
    ("selector", "step"),
    [("latest", 30), ("best", 20), ("20", 20), ("0020", 20), ("warm", 10), ("0000000010-000001-000000", 10)],
)
def test_a_selector_names_a_checkpoint(storage: LocalStorage, selector: str, step: int) -> None:
    assert Catalog(storage).resolve(selector).step == step


@pytest.mark.parametrize("selector", ["21", "cold", "0000000099-000001-000000"])
def test_a_selector_that_names_nothing_says_what_is_there(storage: LocalStorage, selector: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"30|ls"):
        Catalog(storage).resolve(selector)


def test_a_checkpoint_with_a_file_missing_or_short_is_not_latest(storage: LocalStorage, root: Path) -> None:
    folder = root / CheckpointId(30, 1, 2).folder
    (folder / "model.safetensors").unlink()
    assert Catalog(storage).latest().step == 20
    shorter = root / CheckpointId(20, 1, 1).folder / "state.json"
    shorter.write_bytes(shorter.read_bytes()[:-1])
    assert Catalog(storage).latest().step == 10
    assert Catalog(storage).resolve("30").step == 30  # a named one is returned: verify tells what is wrong
    shutil.rmtree(root / CheckpointId(10, 1, 0).folder)
    with pytest.raises(CheckpointNotFoundError, match="none is intact"):
        Catalog(storage).latest()


def test_a_damaged_manifest_is_stepped_over(storage: LocalStorage, root: Path) -> None:
    manifest = root / CheckpointId(30, 1, 2).folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step":30', b'"step":31'))
    catalog = Catalog(storage)
    assert catalog.latest().step == 20
    assert "does not match its digest" in str(catalog.why_not_intact(CheckpointId(30, 1, 2)))


def test_a_manifest_in_another_checkpoints_folder_is_refused(storage: LocalStorage, root: Path) -> None:
    folders = [root / CheckpointId(step, 1, number).folder for number, step in enumerate([10, 20, 30])]
    (folders[2] / "manifest.json").write_bytes((folders[0] / "manifest.json").read_bytes())
    with pytest.raises(CorruptCheckpointError, match="manifest of 0000000010"):
        Catalog(storage).manifest(CheckpointId(30, 1, 2))


def test_a_note_adds_metrics_and_tags_after_the_commit(storage: LocalStorage) -> None:
    id = CheckpointId(30, 1, 2)
    note = Note(version=1, checkpoint=str(id), attempt=1, created_at="", metrics={"loss": 0.1}, tags=("final",))
    storage.write(id.folder + "note-000001-000000.json", [encode_record(note)])
    storage.write(id.folder + "note-000001-000001.json", [b"torn"])
    catalog = Catalog(storage)
    assert catalog.best().step == 30
    assert catalog.resolve("final").step == 30


def test_best_without_a_metric_that_anybody_named_is_a_usage_error(root: Path) -> None:
    storage = LocalStorage(root)
    create_run(storage)
    start(storage)
    with pytest.raises(CheckpointNotFoundError, match="none was ever saved"):
        Catalog(storage).best()
    save(storage, 1, 1, metrics={"other": 1.0})
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint on the line has a value of 'loss'"):
        Catalog(storage).best()


def test_an_empty_place_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="nothing is stored"):
        Catalog.of_existing_run(LocalStorage(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunNotFoundError, match=r"no ckptmgr\.json"):
        Catalog.of_existing_run(LocalStorage(tmp_path))
    with pytest.raises(StorageError):
        Catalog.of_existing_run(LocalStorage(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/x", Reference("runs/x")),
        ("runs/x@best", Reference("runs/x", "best")),
        ("s3://key:secret@bucket/run", Reference("s3://key:secret@bucket/run")),
        ("s3://bucket/run@1200", Reference("s3://bucket/run", "1200")),
        ("/a@b/c@tag-1", Reference("/a@b/c", "tag-1")),
        ("ckptmgr:///runs/x@best", Reference("/runs/x", "best")),
    ],
)
def test_a_reference_is_a_run_and_a_selector(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


def test_a_directory_whose_name_holds_an_at_sign_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "exp@v2").mkdir()
    assert parse_reference(f"{tmp_path}/exp@v2") == Reference(f"{tmp_path}/exp@v2")
    assert parse_reference(f"{tmp_path}/exp@v2@best") == Reference(f"{tmp_path}/exp@v2", "best")


@pytest.mark.parametrize("text", ["", "@best", "runs/x@", "runs/x@a b", "runs/x@-1"])
def test_a_reference_that_cannot_be_meant_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


def continued(storage: LocalStorage) -> None:
    """Add an attempt that goes on from step 20, as step 25."""
    attempt = start(storage, Catalog(storage).resolve("20"))
    save(storage, attempt, 25)


@pytest.mark.parametrize("is_lost", [False, True], ids=["damaged", "lost"])
@pytest.mark.parametrize("attempt", [1, 2])
def test_the_line_is_known_from_manifests_where_its_record_is_not(
    storage: LocalStorage, root: Path, attempt: int, is_lost: bool
) -> None:
    continued(storage)
    line = root / f"attempts/{attempt:06d}/line.json"
    if is_lost:
        line.unlink()
    else:
        line.write_bytes(b"x" * 50)
    assert [id.step for id in Catalog(storage).on_line] == [10, 20, 25]


def test_all_records_of_attempts_may_be_lost(storage: LocalStorage, root: Path) -> None:
    continued(storage)
    shutil.rmtree(root / "attempts")
    assert [id.step for id in Catalog(storage).on_line] == [10, 20, 25]
    assert start(storage, Catalog(storage).latest()) == 3


def test_a_damaged_line_of_an_attempt_that_saved_nothing_is_left_out_loudly(
    storage: LocalStorage, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(storage, Catalog(storage).resolve("10"))
    (root / "attempts/000002/line.json").write_bytes(b"x" * 50)
    assert Catalog(storage).latest().step == 30
    assert "attempt 2 is left out" in caplog.text


def test_a_damaged_marker_is_told_and_harms_nothing(
    storage: LocalStorage, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "ckptmgr.json").write_bytes(b"{}")
    assert Catalog(storage).latest().step == 30
    assert Catalog(storage).run_id == "00" * 8
    assert "ckptmgr.json" in caplog.text


def test_a_checkpoint_of_another_run_is_not_taken_for_one_of_this(storage: LocalStorage, tmp_path: Path) -> None:
    other = LocalStorage(tmp_path / "other")
    create_run(other, run_id="11" * 8)
    manifest = save(other, start(other), 99, run_id="11" * 8)
    shutil.copytree(tmp_path / "other" / manifest.id.folder, tmp_path / "run" / manifest.id.folder)
    assert Catalog(storage).latest().step == 30
    assert "another run" in (Catalog(storage).why_not_intact(manifest.id) or "")
