"""The instrument of the crash tests must itself be trusted."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptmgr.errors import StorageError
from ckptmgr.storage import Storage
from ckptmgr.storage.local import LocalStorage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.testing.memory import MemoryStorage

POINTS = [
    "write a: start",
    "write a: part 1",
    "write a: part 2",
    "write a: publish",
    "write a: done",
    "delete a: start",
    "delete a: done",
]
STORED = [0, 0, 0, 0, 1, 1, 0]


def work(storage: Storage) -> None:
    storage.write("a", [b"1", b"2"])
    storage.list()
    storage.read("a")
    storage.delete("a")


def test_points_are_named_and_without_a_fault_nothing_happens() -> None:
    storage = FaultyStorage(MemoryStorage())
    work(storage)
    assert storage.points == POINTS


def test_reads_count_when_asked() -> None:
    storage = FaultyStorage(MemoryStorage(), count_reads=True)
    work(storage)
    assert storage.points == [*POINTS[:5], "list ", "read a", *POINTS[5:]]


@pytest.mark.parametrize("number", range(1, len(POINTS) + 1))
def test_a_failure_at_a_point_comes_once_and_nothing_follows_it(number: int) -> None:
    inner = MemoryStorage()
    storage = FaultyStorage(inner, fail_at=number)
    with pytest.raises(StorageError) as caught:
        work(storage)
    assert caught.value.errno == errno.ENOSPC
    assert POINTS[number - 1] in caught.value.what
    assert storage.points == POINTS[:number]
    assert len(inner.objects) == STORED[number - 1]
    storage.write("b", [b"later"])
    assert inner.read("b") == b"later"


def test_a_failure_can_last_and_be_of_any_kind() -> None:
    storage = FaultyStorage(MemoryStorage(), fail_at=2, keep_failing=True, error=RuntimeError)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            storage.write("a", [b"1"])


def test_a_hook_sees_every_point() -> None:
    seen: list[tuple[int, str]] = []
    work(FaultyStorage(MemoryStorage(), on_point=lambda number, name: seen.append((number, name))))
    assert seen == list(enumerate(POINTS, start=1))


KILLED = """
import sys
from ckptmgr.storage.local import LocalStorage
from ckptmgr.testing.faulty import FaultyStorage
storage = FaultyStorage(LocalStorage(sys.argv[1]), kill_at=int(sys.argv[2]))
storage.write("a", [b"1", b"2"])
storage.delete("a")
"""


@pytest.mark.parametrize("number", [1, 4, 5, 7])
def test_a_kill_at_a_point_leaves_what_was_done_before(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(number)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    assert len(LocalStorage(tmp_path / "run").list()) == STORED[number - 1]
