"""SIGTERM as schedulers send it: to every process of the job, from outside."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage

SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader
from ckptmgr import Checkpointer

run_dir, place = sys.argv[1:]
model = torch.nn.Linear(1, 1)
loader = DataLoader(torch.zeros(400, 1), batch_size=4, num_workers=2)

def wait_to_be_told():
    print("now", flush=True)
    sys.stdin.readline()
    for worker in ckpt._data._iterator._workers:
        worker.join()

def fetch(*args, **kwargs):
    wait_to_be_told()
    raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

with Checkpointer(run_dir, {"model": model}, every_n_steps=1000) as ckpt:
    step = ckpt.resume()
    for _ in ckpt.batches(loader, epochs=1):
        step += 1
        if step == 3 and place == "step":
            wait_to_be_told()
            model(torch.zeros(1, 1)).backward()
        ckpt.step(step)
        if step == 3 and place == "fetch":
            ckpt._data._iterator._next_data = fetch
"""


@pytest.mark.parametrize("place", ["step", "fetch"])
def test_a_signal_to_every_process_of_the_job_saves_the_step_and_exits_with_75(tmp_path: Path, place: str) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), place],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert job.stdout is not None
    if job.stdout.readline() == "now\n":
        # The job leads a session of its own, so this reaches nobody else.
        os.killpg(job.pid, signal.SIGTERM)
    _, errors = job.communicate("go on\n", timeout=60)
    assert job.returncode == 75, errors
    latest = Catalog(LocalStorage(tmp_path / "run")).latest()
    assert (latest.step, latest.reason) == (3, "signal")


def test_a_process_that_was_told_to_stop_exits_with_its_own_code_when_it_is_told_again() -> None:
    script = (
        "import os, signal; from ckptmgr.preemption import StopSignal; stop = StopSignal(); stop.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); assert stop.received; stop.ignore()\n"
        "os.kill(os.getpid(), signal.SIGTERM); raise SystemExit(75)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 75
