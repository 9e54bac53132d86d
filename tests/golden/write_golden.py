"""Write the golden run of format version 1. Run once; its files are then never touched.

python tests/golden/write_golden.py tests/golden/v1
"""

import os
import socket
import sys
from pathlib import Path

import msgspec
from golden_state import STEP, golden_state

from ckptmgr import claim
from ckptmgr.policy.retention import KeepAll
from ckptmgr.state.capture import capture_state
from ckptmgr.training_run import Monitor, TrainingRun


class Start(msgspec.Struct):
    """Nothing of the machine that wrote the files belongs into them."""

    version: int = 1
    argv: tuple[str, ...] = ("train.py",)


def main(folder: str) -> None:
    if Path(folder).exists():
        raise SystemExit(f"{folder} exists, and golden files are never written twice")
    claim.describe_start = lambda **_: Start()  # type: ignore[assignment, return-value]
    socket.gethostname, os.getpid = (lambda: "golden"), (lambda: 1)
    run = TrainingRun.open(folder, retention=KeepAll(), monitor=Monitor("loss"), background=False)
    run.accept()
    entries = capture_state(golden_state())
    run.save(entries, step=STEP - 1, reason="golden", metrics={"loss": 0.25})
    last = run.save(entries, step=STEP, reason="golden", epoch=1, metrics={"loss": 0.5, "bad": float("nan")})
    run.annotate(last, metrics={"loss": 0.125}, tags=["pinned"])
    run.close("finished", step=STEP)


if __name__ == "__main__":
    main(sys.argv[1])
