"""Kill a fork at every storage operation: no checkpoint counts or all of it is there, and the same command goes on."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptmgr import fork
from ckptmgr.errors import CkptmgrError, StorageError, UsageError
from ckptmgr.format.layout import RUN_MARKER, CheckpointId, attempt_key
from ckptmgr.format.manifest import EntryRecord, RunMarker
from ckptmgr.format.payload import FilePayload
from ckptmgr.format.record import encode_record
from ckptmgr.launch.start_record import describe_start
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.commit import CheckpointFields, commit_checkpoint
from ckptmgr.run.lineage import claim_attempt, record_line
from ckptmgr.run.reference import Reference
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.capture import capture_state
from ckptmgr.state.snapshot import SnapshotBuffers
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.faulty import FaultyStorage

Wrap = Callable[[Storage], Storage]


@pytest.fixture
def source(tmp_path: Path) -> LocalStorage:
    """A configured run with one checkpoint of a few files."""
    storage = LocalStorage(tmp_path / "source")
    storage.write(RUN_MARKER, [encode_record(RunMarker(version=1, run_id="00" * 8, created_at=""))], exclusive=True)
    attempt = claim_attempt(storage, []).attempt
    record_line(storage, attempt, None)
    for name in ("config", "resolved"):
        storage.write(attempt_key(attempt, name), [b"lr: 0.1\n"])
    storage.write(attempt_key(attempt, "start"), [encode_record(describe_start())])
    entries = capture_state({"a": {"x": bytearray(5000), "step": 7}, "b": {"y": 1.5}})
    files: list[FilePayload] = list(SnapshotBuffers().snapshot(entries))
    fields = CheckpointFields(
        run_id="00" * 8,
        reason="test",
        entries=tuple(EntryRecord(name=e.name, handler=e.handler, handler_version=e.version) for e in entries),
    )
    commit_checkpoint(storage, CheckpointId(7, attempt, 0), files, fields)
    return storage


def work(source: LocalStorage, to: Path, wrap: Wrap = lambda storage: storage) -> None:
    def open_storage(place: str, **_: object) -> Storage:
        return source if place == source.url else wrap(LocalStorage(place))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork, "open_storage", open_storage)
        fork.fork_run(Reference(source.url), str(to))


def points(source: LocalStorage, to: Path) -> list[str]:
    storages: list[FaultyStorage] = []

    def wrap(storage: Storage) -> Storage:
        storages.append(FaultyStorage(storage, count_reads=True))
        return storages[-1]

    work(source, to, wrap)
    return storages[0].points


def kill_at(point: int, source: LocalStorage, to: Path) -> None:
    child = os.fork()
    if child == 0:
        # The child of a fork must never return into pytest.
        with contextlib.suppress(BaseException):
            work(source, to, lambda storage: FaultyStorage(storage, kill_at=point, count_reads=True))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child was not killed at point {point}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def check_what_is_left(source: LocalStorage, to: Path, where: str) -> None:
    catalog = Catalog(LocalStorage(to))
    was_whole = bool(catalog.committed)
    if was_whole:
        assert catalog.is_run, where
        assert verify_checkpoint(catalog, catalog.latest().id) == [], where
        with pytest.raises(UsageError, match="this very fork"):
            work(source, to)
    else:
        if catalog.attempts:
            with pytest.raises(UsageError, match="cut off"):
                fork.refuse_cut_off_fork(catalog, str(to))
        work(source, to)
    catalog = Catalog.of_existing_run(LocalStorage(to))
    assert catalog.latest().step == 7, where
    assert verify_checkpoint(catalog, catalog.latest().id) == [], where
    assert catalog.marker.run_id == catalog.latest().run_id, where
    if not was_whole:
        assert catalog.torn == [], where
        assert [path for path in to.rglob("*") if path.name.startswith(".")] == [], where


def test_a_fork_killed_at_every_storage_operation_is_whole_or_goes_on(source: LocalStorage, tmp_path: Path) -> None:
    names = points(source, tmp_path / "count")
    assert len(names) > 30
    for number, name in enumerate(names, start=1):
        to = tmp_path / str(number)
        kill_at(number, source, to)
        check_what_is_left(source, to, f"point {number}: {name}")


def test_a_fork_killed_twice_goes_on_a_third_time(source: LocalStorage, tmp_path: Path) -> None:
    names = points(source, tmp_path / "count")
    for number in range(5, len(names) - 5, 7):
        to = tmp_path / str(number)
        kill_at(number, source, to)
        if not Catalog(LocalStorage(to)).committed:
            kill_at(number, source, to)
        check_what_is_left(source, to, f"point {number}: {names[number - 1]}")


@pytest.mark.parametrize("keep_failing", [False, True])
def test_a_failure_at_every_storage_operation_is_told(source: LocalStorage, tmp_path: Path, keep_failing: bool) -> None:
    names = points(source, tmp_path / "count")
    for number, name in enumerate(names, start=1):
        to = tmp_path / str(number)
        failure = None
        try:
            work(
                source,
                to,
                lambda storage, at=number: FaultyStorage(
                    storage, fail_at=at, count_reads=True, keep_failing=keep_failing
                ),
            )
        except CkptmgrError as error:
            failure = error
        assert isinstance(failure, StorageError), f"point {number}: {name} failed in silence"
        marked = names.index("write ckptmgr.json: start") + 1
        if not keep_failing and number < marked and not name.endswith("claim.json: done"):
            left = [path for path in to.rglob("*") if path.is_file()] if to.exists() else []
            assert left == [], f"point {number}: {name}"
        check_what_is_left(source, to, f"point {number}: {name}")
