"""Kill `ckptmgr prune` at every storage operation: each checkpoint is whole or gone, and pruning again finishes."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import torch

from ckptmgr.format.layout import CheckpointId
from ckptmgr.policy.retention import KeepAll, KeepLast
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.upkeep import judge, prune_run
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.capture import capture_state
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.training_run import TrainingRun


def make_run(root: Path) -> None:
    """Five checkpoints, and a save that was cut off."""
    run = TrainingRun.open(str(root), retention=KeepAll(), background=False)
    run.accept()
    for step in range(1, 6):
        run.save(capture_state({"a": {"x": torch.full((300,), float(step))}}), step=step, reason="test")
    run.close("preempted")
    torn = root / CheckpointId(6, 1, 9).folder
    torn.mkdir()
    (torn / "a.safetensors").write_bytes(b"half")
    (torn / ".tmp-1-0123456789abcdef").write_bytes(b"half")


def prune(storage: Storage) -> None:
    catalog = Catalog(storage)
    prune_run(catalog, [verdict.id for verdict in judge(catalog, KeepLast(2)) if not verdict.is_kept])


def killed_at(point: int, root: Path) -> None:
    child = os.fork()
    if child == 0:
        # The child of a fork must never return into pytest.
        with contextlib.suppress(BaseException):
            prune(FaultyStorage(LocalStorage(root), kill_at=point))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child was not killed at point {point}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_prune_that_is_killed_anywhere_leaves_each_checkpoint_whole_or_gone(tmp_path: Path) -> None:
    made = tmp_path / "made"
    make_run(made)
    shutil.copytree(made, tmp_path / "count")
    counting = FaultyStorage(LocalStorage(tmp_path / "count"))
    prune(counting)
    assert len(counting.points) > 20
    for number, name in enumerate(counting.points, start=1):
        root = tmp_path / str(number)
        shutil.copytree(made, root)
        killed_at(number, root)
        catalog = Catalog(LocalStorage(root))
        assert {4, 5} <= {id.step for id in catalog.on_line} <= {1, 2, 3, 4, 5}, name
        assert all(verify_checkpoint(catalog, id) == [] for id in catalog.committed), name

        prune(LocalStorage(root))
        catalog = Catalog(LocalStorage(root))
        assert [id.step for id in catalog.on_line] == [4, 5], name
        assert catalog.torn == [], name
        assert [path for path in root.rglob("*") if path.name.startswith(".")] == [], name
