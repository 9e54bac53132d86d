"""Kill `ckptmgr import` at every storage operation: there is a whole checkpoint, or the next import makes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

from ckptmgr.errors import RunInUseError, UsageError
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.manifest import AttemptClaim
from ckptmgr.format.record import FORMAT_VERSION, encode_record
from ckptmgr.interop.import_run import import_run
from ckptmgr.interop.new_run import create_run, open_empty
from ckptmgr.interop.state_dicts import module_entry
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.clock import utc_now
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.faulty import FaultyStorage

STATE = {"a": torch.arange(300.0), "b": torch.ones(2, 2)}


def make(storage: Storage) -> None:
    entries = [module_entry(STATE)]
    create_run(storage, entries, step=3, epoch=None, reason="imported from m.pt", environment={"source.name": "m.pt"})


def killed_at(point: int, root: Path) -> None:
    child = os.fork()
    if child == 0:
        # The child of a fork must never return into pytest.
        with contextlib.suppress(BaseException):
            make(FaultyStorage(open_empty(str(root)), kill_at=point))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child was not killed at point {point}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def refusal(source: Path, root: Path) -> UsageError | None:
    try:
        import_run(str(source), str(root))
    except UsageError as error:
        return error
    return None


def test_an_import_that_is_killed_anywhere_is_whole_or_is_made_by_the_next_one(tmp_path: Path) -> None:
    counting = FaultyStorage(LocalStorage(tmp_path / "count"))
    make(counting)
    assert len(counting.points) > 10
    torch.save(STATE, tmp_path / "m.pt")
    outcomes = set()
    for number, name in enumerate(counting.points, start=1):
        root = tmp_path / str(number)
        root.mkdir()
        killed_at(number, root)
        is_whole = bool(Catalog(LocalStorage(root)).committed)
        error = refusal(tmp_path / "m.pt", root)
        outcomes.add("made" if error is None else "whole" if is_whole else "removed")
        if error is not None and not is_whole:
            # Nothing was published yet but a temporary file, so that nobody knows whose it is.
            assert str(error.next).endswith(f"rm -r {root}"), name
            shutil.rmtree(root)
            import_run(str(tmp_path / "m.pt"), str(root))
        catalog = Catalog(LocalStorage(root))
        (checkpoint,) = catalog.committed
        assert verify_checkpoint(catalog, checkpoint) == [], name
        if not is_whole:
            assert not any(path.name.startswith(".tmp-") for path in root.rglob("*")), name
    assert outcomes == {"made", "whole", "removed"}


def begun(root: Path, *, host: str, pid: int) -> None:
    claim = AttemptClaim(version=FORMAT_VERSION, attempt=1, nonce="0", claimed_at=utc_now(), host=host, pid=pid)
    LocalStorage(root).write(attempt_key(1, "claim"), [encode_record(claim)])


def test_an_import_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    begun(tmp_path / "run", host=socket.gethostname(), pid=os.getpid())
    with pytest.raises(RunInUseError, match="is importing into it"):
        import_run(str(tmp_path / "m.pt"), str(tmp_path / "run"))
    assert (tmp_path / "run" / attempt_key(1, "claim")).exists()


def test_an_import_of_another_host_is_left_alone_and_the_command_that_removes_it_is_said(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    begun(tmp_path / "run", host="elsewhere", pid=1)
    with pytest.raises(UsageError, match=f"rm -r {tmp_path / 'run'}"):
        import_run(str(tmp_path / "m.pt"), str(tmp_path / "run"))
    assert (tmp_path / "run" / attempt_key(1, "claim")).exists()


def test_a_training_that_was_killed_before_its_first_save_is_no_import(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    begun(tmp_path / "run", host="elsewhere", pid=1)
    LocalStorage(tmp_path / "run").write(attempt_key(1, "start"), [b"{}"])
    with pytest.raises(UsageError, match="it holds attempts/000001"):
        import_run(str(tmp_path / "m.pt"), str(tmp_path / "run"))
