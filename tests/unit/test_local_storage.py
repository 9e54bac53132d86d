"""How a POSIX directory keeps its word: order, durability, races, leftovers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.errors import StorageError, UsageError
from ckptmgr.storage import Entry, posix
from ckptmgr.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


@pytest.fixture
def root(storage: LocalStorage) -> Path:
    path = Path(storage.url)
    path.mkdir()
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Names of the system calls that make an object durable, each with the file's name, in order."""
    recorded: list[tuple[str, str]] = []
    fsync, link = os.fsync, os.link

    def recording_fsync(fd: int) -> None:
        recorded.append(("fsync", Path(f"/proc/self/fd/{fd}").readlink().name))
        fsync(fd)

    def recording_link(source: str, target: str, **options: object) -> None:
        recorded.append(("link", target))
        link(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "link", recording_link)
    return recorded


def test_modes_follow_the_umask(storage: LocalStorage) -> None:
    before = os.umask(0o027)
    try:
        storage.write("a/b", [b"x"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(storage.url, "a/b").stat().st_mode) == 0o640
    assert stat.S_IMODE(Path(storage.url, "a").stat().st_mode) == 0o750
    assert stat.S_IMODE(Path(storage.url).stat().st_mode) == 0o750


def test_bytes_are_synchronised_before_the_name_and_new_directories_before_both(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    LocalStorage(tmp_path / "outer" / "run").write("a/b/c", [b"x"])
    assert calls[:4] == [("fsync", tmp_path.name), ("fsync", "outer"), ("fsync", "run"), ("fsync", "a")]
    assert calls[4][1].startswith(f".tmp-{os.getpid()}-")
    assert calls[5:] == [("link", "c"), ("fsync", "b")]


def test_a_second_write_synchronises_only_its_file_and_directory(
    storage: LocalStorage, calls: list[tuple[str, str]]
) -> None:
    storage.write("a/b", [b"x"])
    calls.clear()
    storage.write("a/c", [b"x"])
    assert [name for name, _ in calls] == ["fsync", "link", "fsync"]


def test_a_directory_that_somebody_else_made_is_synchronised_once(
    storage: LocalStorage, root: Path, calls: list[tuple[str, str]]
) -> None:
    (root / "a").mkdir()
    storage.write("a/b", [b"x"])
    assert calls[:2] == [("fsync", root.parent.name), ("fsync", "run")]
    calls.clear()
    storage.write("a/c", [b"x"])
    assert ("fsync", "run") not in calls


def test_new_directories_are_synchronised_by_the_next_write_if_the_first_one_failed_to(
    tmp_path: Path, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path / "outer" / "run")

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StorageError):
            storage.write("a", [b"x"])
    storage.write("a", [b"x"])
    assert calls[:2] == [("fsync", tmp_path.name), ("fsync", "outer")]


def test_a_delete_is_synchronised(storage: LocalStorage, calls: list[tuple[str, str]]) -> None:
    storage.write("a/b", [b"x"])
    storage.write("a/c", [b"x"])
    calls.clear()
    storage.delete("a/b")
    assert calls == [("fsync", "a")]
    calls.clear()
    storage.delete("a/c")
    assert calls == [("fsync", "a"), ("fsync", "run")]


def test_directories_that_a_delete_empties_go_too_but_not_the_root(storage: LocalStorage) -> None:
    storage.write("a/b/c", [b"x"])
    storage.write("a/d", [b"x"])
    storage.delete("a/b/c")
    assert not Path(storage.url, "a/b").exists()
    storage.delete("a/d")
    assert list(Path(storage.url).iterdir()) == []
    storage.write("a/b/c", [b"again"])
    assert storage.read("a/b/c") == b"again"


def test_a_root_that_was_removed_is_made_again(storage: LocalStorage) -> None:
    storage.write("a/b", [b"x"])
    storage.delete("a/b")
    Path(storage.url).rmdir()
    assert storage.list() == []
    storage.write("a/b", [b"again"])
    assert storage.read("a/b") == b"again"


@pytest.mark.parametrize("exclusive", [False, True])
def test_no_write_replaces_an_object(storage: LocalStorage, exclusive: bool) -> None:
    storage.write("a", [b"first"])
    with pytest.raises(FileExistsError):
        storage.write("a", [b"second"], exclusive=exclusive)
    assert storage.read("a") == b"first"
    assert storage.list_temporary() == []


def _nothing_is_left(storage: LocalStorage) -> bool:
    return storage.list() == [] and storage.list_temporary() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_fsync_of_the_bytes_leaves_nothing(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError) as caught:
        storage.write("a", [b"x"])
    assert caught.value.errno == code
    assert isinstance(caught.value.__cause__, OSError)
    assert "'a'" in caught.value.what
    assert storage.url in caught.value.what
    assert caught.value.why == os.strerror(code)
    assert caught.value.next
    assert _nothing_is_left(storage)


def test_a_failed_fsync_of_the_directory_raises_and_leaves_the_whole_object(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("a/first", [b"1"])

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError):
        storage.write("a/second", [b"2"])
    assert storage.read("a/second") == b"2"
    assert storage.list_temporary() == []


def test_a_file_larger_than_the_limit_leaves_nothing(storage: LocalStorage) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(StorageError) as caught:
            storage.write("large", [bytes(1 << 15)] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert _nothing_is_left(storage)


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture
def without_rename_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(posix, "rename_noreplace", refuse)


@pytest.mark.usefixtures("without_links")
@pytest.mark.parametrize("exclusive", [False, True])
def test_without_hard_links_a_rename_is_just_as_exclusive(storage: LocalStorage, exclusive: bool) -> None:
    storage.write("a", [b"first"], exclusive=exclusive)
    with pytest.raises(FileExistsError):
        storage.write("a", [b"second"], exclusive=exclusive)
    assert storage.read("a") == b"first"
    assert storage.list_temporary() == []


@pytest.mark.usefixtures("without_links", "without_rename_flags")
def test_a_filesystem_with_neither_refuses_exclusive_writes_only(storage: LocalStorage) -> None:
    storage.write("a", [b"first"])
    with pytest.raises(FileExistsError):
        storage.write("a", [b"second"])
    with pytest.raises(StorageError, match="no exclusive create"):
        storage.write("b", [b"claim"], exclusive=True)
    assert storage.list() == [Entry("a", 5)]
    assert storage.read("a") == b"first"
    assert storage.list_temporary() == []


def test_a_link_that_succeeded_and_was_reported_as_a_conflict_is_a_success(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated_by_the_server(source: str, target: str, **options: object) -> None:
        link(source, target, **options)  # type: ignore[arg-type]
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", repeated_by_the_server)
    storage.write("a", [b"mine"], exclusive=True)
    assert storage.read("a") == b"mine"
    assert storage.list_temporary() == []


KILLED_WRITER = """
import sys
from ckptmgr.storage.local import LocalStorage
from ckptmgr.testing.faulty import FaultyStorage
storage = FaultyStorage(LocalStorage(sys.argv[1]), kill_at=int(sys.argv[2]))
storage.write("a/new", [b"1", b"2"], exclusive=True)
"""


@pytest.mark.parametrize(("point", "stored"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1)])
def test_a_killed_writer_publishes_all_or_nothing_and_its_leftover_can_be_removed(
    storage: LocalStorage, point: int, stored: int
) -> None:
    storage.write("a/old", [b"x"])
    command = [sys.executable, "-c", KILLED_WRITER, storage.url, str(point)]
    with subprocess.Popen(command) as writer:
        assert writer.wait(60) == -signal.SIGKILL
    assert [entry.key for entry in storage.list()] == ["a/new"] * stored + ["a/old"]
    leftovers = storage.list_temporary()
    assert len(leftovers) == (1 if 2 <= point <= 4 else 0)
    for entry in leftovers:
        assert entry.key.startswith(f"a/.tmp-{writer.pid}-")
        storage.delete_temporary(entry.key)
    assert storage.list_temporary() == []
    assert storage.read("a/old") == b"x"


@pytest.mark.parametrize("key", ["a", "a/b", ".tmp-1-0123456789abcdef/a", "../.tmp-1-0123456789abcdef", ".tmp-1"])
def test_only_temporary_names_are_removed_as_such(storage: LocalStorage, key: str) -> None:
    storage.write("a", [b"x"])
    with pytest.raises(UsageError):
        storage.delete_temporary(key)
    assert storage.list() == [Entry("a", 1)]


RACING_PROCESS = """
import sys
from ckptmgr.storage.local import LocalStorage
storage = LocalStorage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    try:
        storage.write(f"race/{number}/claim.json", [sys.argv[2].encode()], exclusive=True)
        print(number)
    except FileExistsError:
        pass
"""


def test_of_racing_processes_exactly_one_wins(storage: LocalStorage) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACING_PROCESS, storage.url, str(racer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for racer in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    won = {racer: process.communicate(timeout=60)[0].split() for racer, process in enumerate(processes)}
    assert [process.returncode for process in processes] == [0] * 4
    claims = sorted((int(number), racer) for racer, numbers in won.items() for number in numbers)
    assert [number for number, _ in claims] == list(range(100))
    assert all(storage.read(f"race/{number}/claim.json") == b"%d" % racer for number, racer in claims)


def test_a_directory_that_is_removed_while_a_writer_makes_it_is_made_again(storage: LocalStorage) -> None:
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for _ in range(150):
                storage.write(f"shared/inner/{worker}", [b"x"])
                storage.delete(f"shared/inner/{worker}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        storage.list()
    assert failures == []
    assert list(Path(storage.url).iterdir()) == []


def test_large_parts_are_neither_copied_nor_gathered(storage: LocalStorage) -> None:
    content = bytearray(32 << 20)
    target = memoryview(bytearray(32 << 20))
    tracemalloc.start()
    try:
        storage.write("large", [memoryview(content)] * 2)
        storage.readinto("large", target, start=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert storage.list() == [Entry("large", 64 << 20)]


def test_descriptors_are_closed_whatever_happens(storage: LocalStorage) -> None:
    def parts() -> Iterator[bytes]:
        yield b"x"
        raise RuntimeError

    storage.write("a/b", [b"x"])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(RuntimeError):
            storage.write("a/c", parts())
        with pytest.raises(FileExistsError):
            storage.write("a/b", [b"x"])
        with pytest.raises(FileNotFoundError):
            storage.read("a/none")
        with pytest.raises(FileNotFoundError):
            storage.read("none/none")
        storage.list()
        storage.delete("a/none")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
