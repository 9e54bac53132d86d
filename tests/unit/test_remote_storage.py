"""What a remote storage may do to us, played by a store in memory that misbehaves on request."""

from __future__ import annotations

import gc
import io
import logging
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
import stamina
from fsspec.spec import AbstractFileSystem
from pretend_store import PretendStore

from ckptmgr.errors import StorageError, UsageError
from ckptmgr.storage import Entry, open_storage
from ckptmgr.storage.remote import FsspecStorage

MIB = 1 << 20


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Three attempts, and no waiting between them."""
    with stamina.set_testing(True, attempts=3):
        yield


Register = Callable[[type[PretendStore]], type[PretendStore]]


@pytest.fixture
def register() -> Register:
    def register_class(behaviour: type[PretendStore]) -> type[PretendStore]:
        fresh = {"objects": {}, "uploads": [], "errors": {}, "lost_replies": {}, "calls": [], "options": []}
        store = type(behaviour.__name__, (behaviour,), fresh)
        fsspec.register_implementation("pretend", store, clobber=True)
        return store

    return register_class


@pytest.fixture
def store(register: Register) -> type[PretendStore]:
    return register(PretendStore)


def open_new(**options: Any) -> FsspecStorage:
    storage = open_storage(f"pretend://bucket/{uuid.uuid4().hex}", **options)
    assert isinstance(storage, FsspecStorage)
    return storage


def test_filesystems_are_our_own_and_cache_nothing(store: type[PretendStore]) -> None:
    open_new(storage_options={"colour": "blue"})
    open_new()
    assert store.options == [{"colour": "blue", "use_listings_cache": False}, {"use_listings_cache": False}]


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError("reset"), OSError(16, "503 slow down"), OSError(121, "500")]
)
def test_operations_are_repeated_while_the_failure_is_transient_and_each_time_logged(
    store: type[PretendStore], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    storage = open_new()
    for operation in ("pipe_file", "cat_file", "rm_file"):
        store.errors[operation] = [error, error]
    store.errors["ls"] = [None, error, error]
    with caplog.at_level(logging.WARNING, "ckptmgr.storage"):
        storage.write("a/b", [b"content"])
        assert storage.list() == [Entry("a/b", 7)]
        assert storage.read("a/b") == b"content"
        storage.delete("a/b")
    assert not any(name.endswith("/a/b") for name in store.objects)
    records = [record for record in caplog.records if record.name == "ckptmgr.storage"]
    assert len(records) == 8
    assert "attempt 1" in records[0].getMessage()
    assert "a/b" in records[0].getMessage()


def test_a_lasting_failure_is_a_storage_error_that_says_where_why_and_what_next(store: type[PretendStore]) -> None:
    storage = open_new()
    store.errors["cat_file"] = [ConnectionResetError("by peer")] * 3
    with pytest.raises(StorageError) as caught:
        storage.read("a/b")
    assert caught.value.what == f"cannot read 'a/b' in {storage.url}"
    assert "by peer" in str(caught.value.why)
    assert "network" in str(caught.value.next)
    assert isinstance(caught.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize("error", [PermissionError("denied"), ValueError("nonsense"), OSError(28, "quota")])
def test_other_failures_are_not_repeated(store: type[PretendStore], error: Exception) -> None:
    storage = open_new()
    store.errors["pipe_file"] = [error]
    with pytest.raises(StorageError):
        storage.write("a", [b"x"])
    assert store.calls.count("pipe_file") == 1


def test_a_missing_object_is_not_asked_for_again(store: type[PretendStore]) -> None:
    with pytest.raises(FileNotFoundError):
        open_new().read("a")
    assert store.calls == ["cat_file"]


def test_a_refused_login_is_no_empty_list(store: type[PretendStore]) -> None:
    # fsspec's own walk swallows the error, and a run with checkpoints would start anew.
    storage = open_new()
    store.errors["ls"] = [PermissionError("denied")]
    with pytest.raises(StorageError) as caught:
        storage.list()
    assert "credentials" in str(caught.value.next)


def test_a_missing_bucket_is_named_when_it_is_written_to(store: type[PretendStore]) -> None:
    storage = open_new()
    for exclusive in (False, True):
        store.errors["pipe_file"] = [FileNotFoundError("NoSuchBucket")]
        with pytest.raises(StorageError) as caught:
            storage.write("a", [b"x"], exclusive=exclusive)
        assert "create it first" in str(caught.value.next)


def test_an_exclusive_create_whose_reply_was_lost_is_a_success(store: type[PretendStore]) -> None:
    storage = open_new()
    storage.write("first", [b"x"], exclusive=True)
    store.lost_replies["pipe_file"] = [TimeoutError("no reply")]
    storage.write("claim", [b"nonce of mine"], exclusive=True)
    assert storage.read("claim") == b"nonce of mine"


def test_an_exclusive_create_that_was_not_stored_and_fails_is_a_storage_error(store: type[PretendStore]) -> None:
    storage = open_new()
    storage.write("first", [b"x"], exclusive=True)
    store.errors["pipe_file"] = [TimeoutError("no reply")] * 3
    with pytest.raises(StorageError):
        storage.write("claim", [b"x"], exclusive=True)
    assert [entry.key for entry in storage.list()] == ["first"]


class OddConflicts(PretendStore):
    def conflict(self, path: str) -> Exception:
        return OSError(22, "At least one of the preconditions you specified did not hold")  # as SeaweedFS says it


def test_a_conflict_with_an_odd_error_is_file_exists(register: Register) -> None:
    register(OddConflicts)
    storage = open_new()
    storage.write("claim", [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        storage.write("claim", [b"second"], exclusive=True)
    assert storage.read("claim") == b"first"


class IgnoresConditions(PretendStore):
    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode="overwrite")


class KnowsNoConditions(PretendStore):
    def pipe_file(self, path: str, value: bytes) -> None:  # type: ignore[override]
        super().pipe_file(path, value)


class LooksThenWrites(PretendStore):
    looked = threading.Barrier(2)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        try:
            # Two that come together have both looked before one writes; one that comes alone goes on.
            self.looked.wait(timeout=0.1)
        except threading.BrokenBarrierError:
            self.looked.reset()
        super().pipe_file(path, value)


class HasTheDefaultOnly(PretendStore):
    pipe_file = AbstractFileSystem.pipe_file


NOT_EXCLUSIVE = [IgnoresConditions, KnowsNoConditions, LooksThenWrites, HasTheDefaultOnly]


@pytest.mark.parametrize("behaviour", NOT_EXCLUSIVE)
def test_a_store_without_exclusive_create_is_found_out_and_refused(
    register: Register, behaviour: type[PretendStore]
) -> None:
    store = register(behaviour)
    storage = open_new()
    with pytest.raises(StorageError, match="single_writer"):
        storage.write("claim", [b"x"], exclusive=True)
    assert store.objects == {}


@pytest.mark.parametrize("behaviour", [IgnoresConditions, KnowsNoConditions, HasTheDefaultOnly])
def test_a_single_writer_may_use_it_and_is_told(
    register: Register, caplog: pytest.LogCaptureFixture, behaviour: type[PretendStore]
) -> None:
    register(behaviour)
    storage = open_new(single_writer=True)
    with caplog.at_level(logging.WARNING, "ckptmgr.storage"):
        storage.write("claim", [b"first"], exclusive=True)
    assert "no exclusive create" in caplog.text
    with pytest.raises(FileExistsError):
        storage.write("claim", [b"second"], exclusive=True)
    assert storage.read("claim") == b"first"


def test_a_root_is_proven_once_and_no_probe_is_left(store: type[PretendStore]) -> None:
    storage = open_new()
    storage.write("a", [b"1"], exclusive=True)
    probes = store.calls.count("pipe_file") - 1
    assert 2 <= probes <= 6
    storage.write("b", [b"2"], exclusive=True)
    open_storage(storage.url).write("c", [b"3"], exclusive=True)
    assert store.calls.count("pipe_file") == probes + 3
    assert sorted(name.rpartition("/")[2] for name in store.objects) == ["a", "b", "c"]


def test_plain_writes_need_no_proof(store: type[PretendStore]) -> None:
    open_new().write("a", [b"1"])
    assert store.calls == ["pipe_file"]


def test_large_objects_are_streamed_in_parts(store: type[PretendStore]) -> None:
    storage = open_new()
    storage.write("large", (bytes([number]) * (40 * MIB) for number in range(4)))
    assert store.calls.count("part") == 3
    assert "pipe_file" not in store.calls
    assert storage.list() == [Entry("large", 160 * MIB)]
    assert storage.read("large", start=80 * MIB - 1, stop=80 * MIB + 1) == b"\x01\x02"


@pytest.mark.parametrize("nparts", [1, 2, 5])
def test_a_stream_that_is_cut_off_publishes_nothing_even_when_it_is_collected(
    store: type[PretendStore], nparts: int
) -> None:
    storage = open_new()

    def parts() -> Iterator[bytes]:
        for _ in range(nparts):
            yield bytes(20 * MIB)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write("large", parts())
    gc.collect()
    assert store.objects == {}
    assert store.uploads == []


@pytest.mark.parametrize("operation", ["open", "part", "complete"])
def test_a_stream_that_fails_publishes_nothing(store: type[PretendStore], operation: str) -> None:
    storage = open_new()
    store.errors[operation] = [OSError(5, "device")]
    with pytest.raises(StorageError) as caught:
        storage.write("large", [bytes(20 * MIB)] * 5)
    assert "'large'" in caught.value.what
    gc.collect()
    assert store.objects == {}
    assert store.uploads == []


class ShowsFilesWhileTheyGrow(PretendStore):
    def _open(self, path: str, mode: str = "rb", block_size: int = 0, **options: Any) -> Any:
        objects = self.objects
        objects[path] = b""

        class GrowingFile(io.RawIOBase):
            def write(self, data: Any) -> int:
                objects[path] += bytes(data)
                return len(data)

        return GrowingFile()


def test_where_files_grow_in_sight_a_cut_off_one_is_removed(register: Register) -> None:
    store = register(ShowsFilesWhileTheyGrow)

    def parts() -> Iterator[bytes]:
        yield bytes(20 * MIB)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_new().write("large", parts())
    assert store.objects == {}


def test_a_large_read_is_many_small_requests(store: type[PretendStore]) -> None:
    storage = open_new()
    content = bytes(range(256)) * (1 << 18) + b"tail"
    storage.write("large", [content])
    store.calls.clear()
    target = bytearray(len(content) - 1)
    storage.readinto("large", memoryview(target), start=1)
    assert target == content[1:]
    assert store.calls.count("cat_file") == 5


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("pretend://me:hunter2/with+slash@bucket/run", {}),
        ("pretend://bucket/run?sig=hunter2/with+slash", {}),
        ("pretend://bucket/run", {"secret": "hunter2/with+slash"}),
        ("pretend://bucket/run", {"client_kwargs": {"aws_session_token": "hunter2/with+slash"}}),
    ],
)
def test_credentials_are_never_shown(
    store: type[PretendStore], caplog: pytest.LogCaptureFixture, url: str, options: dict[str, Any]
) -> None:
    storage = open_storage(url, storage_options=options)
    assert storage.url == "pretend://bucket/run"
    store.errors["cat_file"] = [TimeoutError(f"GET {url} {options}")] * 3
    with caplog.at_level(logging.DEBUG, "ckptmgr"), pytest.raises(StorageError) as caught:
        storage.read("a")
    shown = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("ckptmgr"))
    for text in (repr(storage), caught.value.report(), shown):
        assert "hunter2" not in text
    assert "***" in str(caught.value.why)
    with pytest.raises(TypeError, match="credentials"):
        pickle.dumps(storage)


def test_an_azure_container_is_part_of_the_place() -> None:
    from ckptmgr.storage.redact import printable_url

    assert printable_url("abfs://box@account.dfs.core.windows.net/run") == "abfs://box@account.dfs.core.windows.net/run"
    assert printable_url("abfs://box:secret@host/run") == "abfs://host/run"


def test_an_exclusive_object_is_small(store: type[PretendStore]) -> None:
    with pytest.raises(UsageError, match="too large"):
        open_new().write("a", (bytes(16 * MIB) for _ in range(5)), exclusive=True)
    assert store.objects == {}
