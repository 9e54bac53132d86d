"""Kill the process at every storage operation of saving, retaining and deleting, and look at what is left.

Acknowledged means: `wait` returned. After each death: acknowledged ≤ restored ≤ acknowledged + 1, the state is that of
its step in every byte, the next start saves, and nothing is left over when it has closed.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptmgr import training_run
from ckptmgr.errors import CkptmgrError, StorageError
from ckptmgr.policy.retention import KeepLast
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.capture import capture_state
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.training_run import TrainingRun

NSAVES = 4
Wrap = Callable[[Storage], Storage]


def state_at(step: int) -> dict[str, object]:
    return {"a": {"x": torch.full((300,), float(step)), "step": step}, "b": {"y": torch.arange(5) + step}}


def work(root: Path, wrap: Wrap, acknowledge: Callable[[int], None], *, background: bool) -> None:
    """Continue the run in ``root`` by a few saves, keeping one checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "open_storage", lambda *_, **__: wrap(LocalStorage(root)))
        run = TrainingRun.open(str(root), retention=KeepLast(1), background=background)
        begin = run.continued.manifest.step if run.continued else 0
        run.accept()
        for step in range(begin + 1, begin + 1 + NSAVES):
            run.save(capture_state(state_at(step)), step=step, reason="test")
            run.wait()
            acknowledge(step)
        run.close("finished")


def points(root: Path, *, background: bool) -> list[str]:
    storages: list[FaultyStorage] = []

    def wrap(storage: Storage) -> Storage:
        storages.append(FaultyStorage(storage))
        return storages[-1]

    work(root, wrap, lambda step: None, background=background)
    return storages[0].points


def killed_at(point: int, root: Path, *, background: bool) -> int:
    """Run the work in a child that dies at a point; return the last step that it acknowledged."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        # The child of a fork must never return into pytest.
        with contextlib.suppress(BaseException):
            os.close(read_end)
            work(
                root,
                lambda storage: FaultyStorage(storage, kill_at=point),
                lambda step: os.write(write_end, bytes([step])) and None,
                background=background,
            )
        os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        acknowledged = list(pipe.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child was not killed at point {point}"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return max(acknowledged, default=0)


def check_what_is_left(root: Path, acknowledged: int, where: str) -> None:
    catalog = Catalog(LocalStorage(root))
    restored = 0
    if acknowledged or catalog.on_line:
        latest = catalog.latest()
        restored = latest.step
        assert verify_checkpoint(catalog, latest.id) == [], where
        loaded = training_run.load_checkpoint(str(root))
        for name, expected in state_at(restored).items():
            found = loaded.entries[name].tree
            assert found.keys() == expected.keys(), where  # type: ignore[attr-defined]
            assert all(torch.equal(torch.as_tensor(found[k]), torch.as_tensor(v)) for k, v in expected.items()), where  # type: ignore[attr-defined]
    assert acknowledged <= restored <= acknowledged + 1, where

    work(root, lambda storage: storage, lambda step: None, background=True)
    catalog = Catalog(LocalStorage(root))
    assert catalog.latest().step == restored + NSAVES, where
    assert catalog.torn == [], where
    leftovers = [path for path in root.rglob("*") if path.name.startswith(".")]
    assert leftovers == [], where
    on_line = [id.step for id in catalog.on_line]
    assert on_line == [restored + NSAVES], where


def test_a_kill_at_every_storage_operation_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path) -> None:
    names = points(tmp_path / "count", background=False)
    assert len(names) > 100
    for number, name in enumerate(names, start=1):
        root = tmp_path / str(number)
        acknowledged = killed_at(number, root, background=bool(number % 2))
        check_what_is_left(root, acknowledged, f"point {number}: {name}")


def test_a_failure_at_every_storage_operation_is_told_and_loses_nothing(tmp_path: Path) -> None:
    names = points(tmp_path / "count", background=False)
    for number, name in enumerate(names, start=1):
        root = tmp_path / str(number)
        acknowledged: list[int] = []
        failure: CkptmgrError | None = None
        fault = FaultyStorage(LocalStorage(root), fail_at=number)
        try:
            work(root, lambda storage, fault=fault: fault, acknowledged.append, background=bool(number % 2))
        except CkptmgrError as error:
            failure = error
        # What fails after a commit is only the clearing up, which is tried again; everything else must be told.
        is_clearing = name.startswith("delete")
        assert (failure is not None) or is_clearing, f"point {number}: {name} failed in silence"
        if failure is not None:
            causes = (failure, failure.__cause__)
            assert any(isinstance(cause, StorageError) for cause in causes), f"{name}: {failure!r}"
        check_what_is_left(root, max(acknowledged, default=0), f"point {number}: {name}")
