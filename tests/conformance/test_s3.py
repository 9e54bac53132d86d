"""What the suite cannot ask of every storage, against a real S3 server."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from s3_server import S3Server

from ckptmgr.errors import StorageError
from ckptmgr.storage import Storage, open_storage
from ckptmgr.testing.faulty import FaultyStorage

MIB = 1 << 20


@pytest.fixture
def storage(s3_server: S3Server) -> Storage:
    return open_storage(s3_server.new_root(), storage_options=s3_server.storage_options)


def uploads_under_way(server: S3Server, storage: Storage) -> int:
    key = storage.url.removeprefix(f"s3://{server.bucket}/") + "/large"
    return server.request(f"/{server.bucket}?uploads").count(f"<Key>{key}</Key>".encode())


def test_a_cut_off_upload_leaves_neither_an_object_nor_parts(s3_server: S3Server, storage: Storage) -> None:
    seen = []

    def parts() -> Iterator[bytes]:
        for _ in range(8):
            yield bytes(16 * MIB)
        seen.append(uploads_under_way(s3_server, storage))
        raise RuntimeError("the snapshot failed")

    with pytest.raises(RuntimeError, match="snapshot"):
        storage.write("large", parts())
    assert seen == [1]
    assert storage.list() == []
    assert uploads_under_way(s3_server, storage) == 0


KILLED_WRITER = """
import sys
from ckptmgr.storage import open_storage
from ckptmgr.testing.faulty import FaultyStorage
options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": sys.argv[2]}}
storage = FaultyStorage(open_storage(sys.argv[1], storage_options=options), kill_at=int(sys.argv[3]))
storage.write("small", [b"whole"], exclusive=True)
storage.write("large", (bytes(40 << 20) for _ in range(3)))
"""


@pytest.mark.parametrize(("point", "stored"), [(3, []), (4, ["small"]), (9, ["small"]), (10, ["large", "small"])])
def test_a_killed_writer_publishes_all_or_nothing(
    s3_server: S3Server, storage: Storage, point: int, stored: list[str]
) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, storage.url, s3_server.endpoint, str(point)]
    assert subprocess.run(command, timeout=100, check=False).returncode == -signal.SIGKILL
    assert [entry.key for entry in storage.list()] == stored


def test_a_missing_bucket_is_an_empty_list_and_named_when_written_to(s3_server: S3Server) -> None:
    storage = open_storage("s3://nobody-made-it/run", storage_options=s3_server.storage_options)
    assert storage.list() == []
    for exclusive in (False, True):
        with pytest.raises(StorageError) as caught:
            storage.write("a", [b"x"], exclusive=exclusive)
        assert "create it first" in str(caught.value.next)


@pytest.fixture
def checks_credentials(s3_server: S3Server) -> Iterator[None]:
    s3_server.request("/moto-api/reset-auth", "POST", b"0")
    yield
    s3_server.request("/moto-api/reset-auth", "POST", b"inf")


@pytest.mark.usefixtures("checks_credentials")
def test_wrong_credentials_are_a_storage_error_that_does_not_show_them(storage: Storage) -> None:
    operations = [
        storage.list,
        lambda: storage.read("a"),
        lambda: storage.read("a", start=1, stop=2),
        lambda: storage.readinto("a", memoryview(bytearray(1))),
        lambda: storage.write("a", [b"x"]),
        lambda: storage.write("a", [b"x"], exclusive=True),
        lambda: storage.write("a", [bytes(20 * MIB)]),
        lambda: storage.delete("a"),
    ]
    for operation in operations:
        with pytest.raises(StorageError) as caught:
            operation()
        assert "credentials" in str(caught.value.next)
        assert "test-secret" not in caught.value.report()


def test_a_server_that_is_not_there_is_a_storage_error(s3_server: S3Server) -> None:
    import stamina

    options = {**s3_server.storage_options, "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}
    options["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    with stamina.set_testing(True, attempts=2):
        storage = open_storage("s3://bucket/run", storage_options=options)
        with pytest.raises(StorageError) as caught:
            storage.list()
    assert "network" in str(caught.value.next)


def test_a_storage_works_on_in_a_forked_process(storage: Storage) -> None:
    # In a process of its own, because a fork copies none of the threads that pytest may have.
    program = """
import os, sys
from ckptmgr.storage import open_storage
options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": sys.argv[2]}}
storage = open_storage(sys.argv[1], storage_options=options)
storage.write("parent", [b"x"])
child = os.fork()
if child == 0:
    storage.write("child", [storage.read("parent")], exclusive=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    endpoint = storage_endpoint(storage)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, storage.url, endpoint]
    subprocess.run(command, timeout=100, check=True)
    assert [entry.key for entry in storage.list()] == ["child", "parent"]


def storage_endpoint(storage: Storage) -> str:
    return str(storage._options["client_kwargs"]["endpoint_url"])  # type: ignore[attr-defined]


def test_every_failure_of_a_write_leaves_the_old_objects_alone(storage: Storage) -> None:
    def work(target: Storage) -> None:
        target.write("new/payload", [b"1", b"2"])
        target.write("new/manifest", [b"3"], exclusive=True)
        target.delete("old/manifest")

    storage.write("old/manifest", [b"old"])
    counter = FaultyStorage(storage)
    work(counter)
    storage.delete("new/payload")
    storage.delete("new/manifest")
    for number, point in enumerate(counter.points, start=1):
        storage.write("old/manifest", [b"old"]) if not storage.list("old/") else None
        with pytest.raises(StorageError, match=point.split()[1]):
            work(FaultyStorage(storage, fail_at=number))
        left = {entry.key for entry in storage.list()}
        assert left & {"old/manifest", "new/manifest"}
        assert "new/manifest" not in left or "new/payload" in left
        for key in left - {"old/manifest"}:
            storage.delete(key)
