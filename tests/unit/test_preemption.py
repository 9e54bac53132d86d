"""SIGTERM as schedulers send it: to one process, to all of them, and again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage

SCRIPT = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader
from ckptmgr import Checkpointer

run_dir, target = sys.argv[1:]
model = torch.nn.Linear(1, 1)
loader = DataLoader(torch.zeros(40, 1), batch_size=4, num_workers=2, multiprocessing_context="fork")
with Checkpointer(run_dir, {"model": model}, every_n_steps=100) as ckpt:
    step = ckpt.resume()
    for _ in ckpt.batches(loader, epochs=1):
        step += 1
        if step == 3:
            if target == "group":
                os.killpg(0, signal.SIGTERM)
            elif os.fork() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            else:
                assert os.WTERMSIG(os.wait()[1]) == signal.SIGTERM
        ckpt.step(step)
"""


@pytest.mark.parametrize(("target", "status", "saved"), [("group", 75, 3), ("another child", 0, 10)])
def test_a_signal_to_every_process_of_the_job_saves_at_the_step(
    tmp_path: Path, target: str, status: int, saved: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), target],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert Catalog(LocalStorage(tmp_path / "run")).latest().step == saved
