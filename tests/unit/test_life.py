"""Whether somebody trains in a run, told from its records and the processes of a host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import datetime

import pytest
from run_samples import create_run, save, start

from ckptmgr.errors import RunInUseError
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.manifest import AttemptClaim
from ckptmgr.format.record import encode_record
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.life import Host, life_of, refuse_if_in_use, this_host
from ckptmgr.run.lineage import claim_attempt, record_end
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.memory import MemoryStorage

HERE = socket.gethostname()
CLAIMED_AT = datetime.fromisoformat("2026-03-01T12:00:00Z").timestamp()


@pytest.fixture
def storage() -> Storage:
    storage = MemoryStorage()
    create_run(storage)
    return storage


def claim(storage: Storage, attempt: int, *, host: str = "here", pid: int = 7) -> None:
    record = AttemptClaim(
        version=1, attempt=attempt, nonce="0" * 16, claimed_at="2026-03-01T12:00:00.000Z", host=host, pid=pid
    )
    storage.write(attempt_key(attempt, "claim"), [encode_record(record)])


def train(storage: Storage, attempt: int, **who: object) -> None:
    claim(storage, attempt, **who)  # type: ignore[arg-type]
    storage.write(attempt_key(attempt, "start"), [b"{}"])


def host(started_at: float | None) -> Host:
    return Host("here", lambda pid: started_at if pid == 7 else None)


def state(storage: Storage, started_at: float | None = None) -> str:
    return life_of(Catalog(storage), host(started_at)).state


def test_a_process_that_was_there_before_its_claim_is_running(storage: Storage) -> None:
    train(storage, 1)
    assert state(storage, started_at=CLAIMED_AT - 10) == "running"


def test_a_process_that_is_gone_without_a_word_has_crashed(storage: Storage) -> None:
    train(storage, 1)
    assert state(storage) == "crashed"


def test_a_younger_process_of_that_number_is_another_one(storage: Storage) -> None:
    train(storage, 1)
    assert state(storage, started_at=CLAIMED_AT + 60) == "crashed"


@pytest.mark.parametrize("outcome", ["finished", "failed", "preempted"])
def test_an_end_that_was_recorded_counts_whatever_processes_there_are(storage: Storage, outcome: str) -> None:
    train(storage, 1)
    record_end(storage, 1, outcome, step=5, error="Boom: x\nmore")  # type: ignore[arg-type]
    life = life_of(Catalog(storage), host(0.0))
    assert (life.state, life.step, life.detail, life.attempt) == (outcome, 5, "Boom: x", 1)


@pytest.mark.parametrize("name", ["elsewhere", "localhost", ""])
def test_of_another_host_nothing_is_known_but_its_name(storage: Storage, name: str) -> None:
    train(storage, 1, host=name)
    life = life_of(Catalog(storage), Host(name if name != "elsewhere" else "here", lambda pid: None))
    assert life.state == "unknown"
    assert f"process 7 on {name}" in life.detail


def test_the_newest_start_tells_and_not_what_came_before_it(storage: Storage) -> None:
    train(storage, 1)
    record_end(storage, 1, "finished", step=5)
    train(storage, 2)
    assert state(storage) == "crashed"


def test_an_attempt_that_only_pruned_tells_nothing(storage: Storage) -> None:
    train(storage, 1)
    record_end(storage, 1, "preempted", step=5)
    claim(storage, 2, pid=8)
    record_end(storage, 2, "finished", step=None)
    claim(storage, 3, pid=9)
    assert state(storage) == "preempted"


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_records_that_cannot_be_read_leave_the_state_unknown(storage: Storage, damage: bytes | None) -> None:
    train(storage, 1)
    storage.delete(attempt_key(1, "claim"))
    if damage is not None:
        storage.write(attempt_key(1, "claim"), [damage])
    assert state(storage, started_at=0.0) == "unknown"
    assert life_of(Catalog(MemoryStorage())).state == "unknown"


def test_a_run_in_which_somebody_trains_is_refused_also_by_force(storage: Storage) -> None:
    train(storage, 1)
    for force in (False, True):
        with pytest.raises(RunInUseError, match=r"is in use(.|\n)*process 7 on here.* is training"):
            refuse_if_in_use(Catalog(storage), host(0.0), force=force)


def test_a_run_in_which_somebody_may_train_is_refused_unless_forced(storage: Storage) -> None:
    train(storage, 1, host="elsewhere")
    with pytest.raises(RunInUseError, match=r"may be in use(.|\n)*process 7 on elsewhere(.|\n)*--force"):
        refuse_if_in_use(Catalog(storage), host(0.0))
    refuse_if_in_use(Catalog(storage), host(0.0), force=True)


def test_a_claim_that_cannot_be_read_may_be_anybodys(storage: Storage) -> None:
    storage.write(attempt_key(1, "claim"), [b"torn"])
    with pytest.raises(RunInUseError, match="may be in use"):
        refuse_if_in_use(Catalog(storage), host(None))
    refuse_if_in_use(Catalog(storage), host(None), force=True)


def test_only_the_newest_attempt_can_be_in_the_way(storage: Storage) -> None:
    train(storage, 1)
    claim(storage, 2, pid=8)
    record_end(storage, 2, "finished", step=None)
    refuse_if_in_use(Catalog(storage), host(0.0))


def test_this_very_process_is_running_and_one_that_was_killed_is_not(storage: Storage) -> None:
    save(storage, start(storage), 10)
    life = life_of(Catalog(storage))
    assert (life.state, life.detail) == ("running", f"process {os.getpid()} on {HERE}")
    with pytest.raises(RunInUseError):
        refuse_if_in_use(Catalog(storage))

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        alive = this_host().started_at(child.pid)
        assert alive is not None
        assert alive >= (this_host().started_at(os.getpid()) or 0.0) - 1
    finally:
        child.kill()
        # Dead, but its parent has not looked yet.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert this_host().started_at(child.pid) is None
        child.communicate()
    assert this_host().started_at(child.pid) is None
    assert [this_host().started_at(pid) for pid in (0, -1, 1 << 80)] == [None, None, None]


def test_whoever_claims_next_is_seen_before_it_has_recorded_anything_else(storage: Storage) -> None:
    train(storage, 1)
    record_end(storage, 1, "finished", step=5)
    claim_attempt(storage, [1])
    assert life_of(Catalog(storage)).state == "running"
    with pytest.raises(FileExistsError):
        claim_attempt(storage, [1], is_patient=False)
