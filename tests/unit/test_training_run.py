import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptmgr import Checkpointer, training_run
from ckptmgr.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    Fenced,
    FormatVersionError,
    SaveFailedError,
    StorageError,
    TopologyError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import RunMarker
from ckptmgr.format.record import NEWEST_VERSION, encode_record
from ckptmgr.launch.requested import requested_run
from ckptmgr.policy.retention import KeepAll, KeepBest, KeepLast, KeepTagged, RetentionPolicy, Union
from ckptmgr.run.catalog import Catalog
from ckptmgr.state.capture import capture_state
from ckptmgr.storage.local import LocalStorage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.topology.join import join_ranks
from ckptmgr.training_run import Monitor, TrainingRun, load_checkpoint


def open_run(root: Path, *, resume: str = "auto", retention: RetentionPolicy | None = None) -> TrainingRun:
    run = TrainingRun.open(
        str(root), resume=resume, retention=retention or KeepAll(), monitor=Monitor("loss"), background=True
    )
    run.accept()
    return run


def save(run: TrainingRun, step: int, **fields: object) -> CheckpointId:
    state = capture_state({"a": {"x": torch.full((4,), float(step))}})
    return run.save(state, step=step, reason="test", wait=True, **fields)  # type: ignore[arg-type]


def flip_last_byte(root: Path, step: int, name: str) -> None:
    (path,) = root.glob(f"checkpoints/{step:010d}-*/{name}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "run"
    run = open_run(root)
    for step, loss in ((10, 0.3), (20, 0.1), (30, 0.2)):
        save(run, step, metrics={"loss": loss}, tags=["warm"] if step == 10 else [])
    run.close("finished")
    return root


@pytest.mark.parametrize(
    ("resume", "step"), [("auto", 30), ("must", 30), ("best", 20), ("20", 20), ("warm", 10), ("never", None)]
)
def test_resume_chooses_what_to_continue(root: Path, resume: str, step: int | None) -> None:
    run = open_run(root, resume=resume)
    assert (run.continued.manifest.step if run.continued else None) == step
    if run.continued:
        assert torch.equal(run.continued.entries["a"].tree["x"], torch.full((4,), float(step or 0)))
    run.close("finished")


@pytest.mark.parametrize("resume", ["must", "1200", "best"])
def test_a_run_that_must_be_there_and_is_not_is_not_created(tmp_path: Path, resume: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        open_run(tmp_path / "other", resume=resume)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("resume", "on_line"), [("10", [11]), ("never", [11])])
def test_going_back_or_starting_anew_deletes_nothing_of_the_line_that_was_left(
    root: Path, resume: str, on_line: list[int]
) -> None:
    run = open_run(root, resume=resume, retention=KeepLast(1))
    save(run, 11)
    run.close("finished")
    catalog = Catalog(LocalStorage(root))
    assert [id.step for id in catalog.on_line] == on_line
    assert {20, 30} <= {id.step for id in catalog.committed}
    assert catalog.resolve("0000000030-000001-000002").step == 30


@pytest.mark.parametrize("name", ["a.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_set_aside_loudly(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    flip_last_byte(root, 30, name)
    run = open_run(root)
    assert run.continued is not None
    assert run.continued.manifest.step == 20
    assert "set aside the checkpoint of step 30" in caplog.text
    save(run, 25)
    run.close("finished")
    assert load_checkpoint(str(root)).manifest.step == 25


def test_a_run_without_a_whole_checkpoint_is_not_silently_started_anew(root: Path) -> None:
    for step in (10, 20, 30):
        flip_last_byte(root, step, "a.safetensors")
    with pytest.raises(CorruptCheckpointError, match="none of the 3 checkpoints"):
        open_run(root)
    run = open_run(root, resume="never")
    assert run.continued is None
    run.close("finished")


def test_a_damaged_checkpoint_that_was_named_is_not_replaced_by_another(root: Path) -> None:
    flip_last_byte(root, 20, "a.safetensors")
    with pytest.raises(CorruptCheckpointError, match="'x'"):
        open_run(root, resume="20")


def test_the_process_that_was_taken_over_is_told_and_loses_nothing(tmp_path: Path) -> None:
    one = open_run(tmp_path)
    save(one, 1)
    two = open_run(tmp_path)
    save(two, 2)
    with pytest.raises(Fenced, match="attempt 2 took it over"):
        save(one, 500)
    save(two, 3)
    two.close("finished")
    assert load_checkpoint(str(tmp_path)).manifest.step == 3


def test_a_failure_in_the_background_surfaces_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = LocalStorage(tmp_path)
    faulty: list[FaultyStorage] = []

    def open_faulty(*_: object, **__: object) -> FaultyStorage:
        faulty.append(FaultyStorage(inner))
        return faulty[-1]

    monkeypatch.setattr(training_run, "open_storage", open_faulty)
    run = open_run(tmp_path)
    save(run, 1)
    faulty[0]._fail_at = len(faulty[0].points) + 3
    state = capture_state({"a": {"x": torch.zeros(4)}})
    run.save(state, step=2, reason="test")
    with pytest.raises(SaveFailedError, match="the save of step 2 failed") as caught:
        run.save(state, step=3, reason="test")
    assert caught.value.__cause__ is not None
    assert "No space left" in str(caught.value.__cause__)
    run.save(state, step=4, reason="test", wait=True)
    run.close("finished")
    assert load_checkpoint(str(tmp_path)).manifest.step == 4


def test_the_snapshot_does_not_change_when_training_goes_on(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    x = torch.zeros(1_000_000)
    for step in range(1, 6):
        x.fill_(step)
        run.save(capture_state({"a": {"x": x}}), step=step, reason="test")
        x.fill_(-1)
    run.close("finished")
    for step in range(1, 6):
        assert load_checkpoint(f"{tmp_path}@{step}").entries["a"].tree["x"].eq(step).all()


def test_retention_keeps_what_has_a_reason(tmp_path: Path) -> None:
    run = open_run(tmp_path, retention=Union(KeepLast(2), KeepBest(1, "loss", "min"), KeepTagged()))
    for step in range(1, 9):
        save(run, step, metrics={"loss": abs(step - 3)}, tags=["pin"] if step == 2 else [])
    run.close("finished")
    assert [id.step for id in Catalog(LocalStorage(tmp_path)).on_line] == [2, 3, 7, 8]
    best = run.best()
    assert best is not None
    assert (best[0].step, best[1]) == (3, 0.0)


def test_a_metric_that_arrives_after_the_commit_counts(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    first = save(run, 1, metrics={"loss": 1.0})
    second = save(run, 2)
    run.annotate(second, metrics={"loss": 0.5}, tags=["good"])
    run.close("finished")
    assert run.best() == (second, 0.5)
    assert first != second
    assert load_checkpoint(f"{tmp_path}@best").manifest.step == 2
    assert load_checkpoint(f"{tmp_path}@good").manifest.step == 2


def test_a_value_that_cannot_be_stored_is_told_at_the_first_save(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UnsupportedStateError, match="a/x"):
        run.save(capture_state({"a": {"x": object()}}), step=1, reason="test")
    run.close("failed")


def test_reading_claims_nothing(root: Path) -> None:
    before = sorted(path.name for path in (root / "attempts").iterdir())
    load_checkpoint(f"{root}@best")
    assert sorted(path.name for path in (root / "attempts").iterdir()) == before


def test_each_save_says_what_it_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ckptmgr"):
        run = open_run(tmp_path)
        save(run, 7)
        run.close("finished")
    assert "saved step 7 (test)" in caplog.text
    assert "durable after" in caplog.text


def test_a_run_that_was_killed_before_its_first_save_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(tmp_path)
    monkeypatch.setenv(training_run.RUN_DIR_VARIABLE, str(tmp_path))
    run_dir, resume = requested_run("elsewhere", "auto")
    assert (run_dir, resume) == (str(tmp_path), "auto")
    assert open_run(tmp_path, resume=resume).continued is None


def test_secrets_in_an_exception_do_not_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3t-value-0815")
    run = open_run(tmp_path)
    run.close("failed", error="RuntimeError: denied for s3cr3t-value-0815")
    text = (tmp_path / "attempts/000001/end.json").read_text()
    assert "denied" in text
    assert "s3cr3t" not in text


def test_ranks_without_a_process_group_are_refused_and_neither_claim_nor_create_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Checkpointer(tmp_path / "run", {"a": {"x": 1}}) as checkpointer, pytest.raises(TopologyError) as caught:
        checkpointer.resume()
    assert "2 ranks" in caught.value.what
    assert "WORLD_SIZE and RANK are set" in str(caught.value)
    assert "init_process_group" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_one_rank_and_a_world_size_that_no_launcher_set_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert join_ranks().world_size == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_ranks().world_size == 1


def test_a_run_of_a_newer_format_is_not_claimed(root: Path) -> None:
    marker = RunMarker(version=NEWEST_VERSION + 1, run_id="00" * 8, created_at="")
    (root / "ckptmgr.json").write_bytes(encode_record(marker))
    with pytest.raises(FormatVersionError):
        open_run(root)
    assert [path.name for path in (root / "attempts").iterdir()] == ["000001"]


@pytest.mark.parametrize("lost", ["ckptmgr.json", "attempts"])
def test_a_run_that_lost_its_records_goes_on_where_it_stopped(root: Path, lost: str) -> None:
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = open_run(root)
    assert run.continued is not None
    save(run, 40)
    run.close("finished")
    assert [id.step for id in Catalog(LocalStorage(root)).on_line] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "fields",
    [{"tags": "good"}, {"tags": [5]}, {"tags": ["a b"]}, {"tags": ["latest"]}, {"tags": ["12"]}, {"step": 10**10}],
    ids=repr,
)
def test_what_could_not_be_found_again_is_refused_at_once(tmp_path: Path, fields: dict[str, object]) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UsageError):
        save(run, **{"step": 1, **fields})  # type: ignore[arg-type]
    save(run, 1)
    run.close("finished")


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(SaveFailedError, match="not be readable"):
        save(run, 1, metrics={"loss": True})
    save(run, 2, metrics={"loss": 1.0})
    run.close("finished")
    assert [id.step for id in Catalog(LocalStorage(tmp_path)).committed] == [2]


def test_a_failed_last_save_is_recorded_as_a_failure(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    state = capture_state({"a": {"x": torch.zeros(4)}})
    run.save(state, step=1, reason="test", metrics={"loss": True})
    with pytest.raises(SaveFailedError):
        run.close("finished")
    assert '"outcome":"failed"' in (tmp_path / "attempts/000001/end.json").read_text()


def test_a_forked_child_neither_saves_nor_ends_its_parents_attempt(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                save(run, 1)
            except UsageError:
                run.close("failed")
                status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    save(run, 2)
    run.close("finished")
    assert [id.step for id in Catalog(LocalStorage(tmp_path)).committed] == [2]


@pytest.mark.parametrize("run_dir", [5, "", "runs/x@best", b"runs/x"], ids=repr)
def test_a_run_directory_that_cannot_be_meant_is_refused(run_dir: object) -> None:
    with pytest.raises(UsageError):
        requested_run(run_dir, "auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("resume", [None, 5, True, ""], ids=repr)
def test_a_resume_that_cannot_be_meant_is_refused(resume: object) -> None:
    with pytest.raises(UsageError, match="resume="):
        requested_run("runs/x", resume)  # type: ignore[arg-type]


def test_a_plain_loop_is_told_how_to_begin_with_another_run() -> None:
    assert requested_run("runs/x", "runs/y@best") == ("runs/x", "runs/y@best")
    with pytest.raises(UsageError, match="another run") as caught:
        requested_run("runs/x", "runs/y@best", takes_references=False)
    assert "ckpt.restore('runs/y@best')" in str(caught.value)


def test_a_storage_that_fails_does_not_send_training_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LocalStorage.read

    def failing(self: LocalStorage, key: str, **kwargs: int) -> bytes:
        if key.startswith("checkpoints/0000000030") and key.endswith("manifest.json"):
            raise StorageError("the file server is away")
        return read(self, key, **kwargs)

    monkeypatch.setattr(LocalStorage, "read", failing)
    with pytest.raises(StorageError, match="away"):
        open_run(root)


def test_a_reader_that_is_slower_than_retention_looks_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readinto = LocalStorage.readinto

    def retaining(self: LocalStorage, key: str, buffer: memoryview, *, start: int = 0) -> None:
        if key.startswith("checkpoints/0000000030"):
            monkeypatch.undo()
            run = open_run(root, retention=KeepLast(1))
            for step in (40, 50, 60):
                save(run, step)
            run.close("finished")
        readinto(self, key, buffer, start=start)

    monkeypatch.setattr(LocalStorage, "readinto", retaining)
    assert load_checkpoint(str(root)).manifest.step == 60
