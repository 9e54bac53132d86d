"""Write the golden run of version 3: with a tokenizer's own file, and golden samples. Run once; never touched again.

python tests/golden/write_golden_files.py tests/golden/v3
"""

import os
import socket
import sys
from pathlib import Path

from golden_chain import SAMPLES, predict, tokenizer
from golden_state import STEP, golden_state
from write_golden import Start

from ckptmgr import claim
from ckptmgr.golden.record import capture_golden
from ckptmgr.golden.samples import Golden
from ckptmgr.policy.retention import KeepAll
from ckptmgr.preprocess.handler import PREPROCESSOR
from ckptmgr.state.capture import capture_state
from ckptmgr.training_run import Monitor, TrainingRun


def main(folder: str) -> None:
    if Path(folder).exists():
        raise SystemExit(f"{folder} exists, and golden files are never written twice")
    claim.describe_start = lambda **_: Start()  # type: ignore[assignment, return-value]
    socket.gethostname, os.getpid = (lambda: "golden"), (lambda: 1)
    run = TrainingRun.open(folder, retention=KeepAll(), monitor=Monitor("loss"), background=False)
    run.accept()
    state = golden_state()
    entries = capture_state({**state, PREPROCESSOR: tokenizer()})
    entries.append(capture_golden("ckptmgr_golden", Golden(SAMPLES, predict=predict), state["model"], tokenizer()))
    run.save(entries, step=STEP - 1, reason="golden", metrics={"loss": 0.25})
    last = run.save(entries, step=STEP, reason="golden", epoch=1, metrics={"loss": 0.5, "bad": float("nan")})
    run.annotate(last, metrics={"loss": 0.125}, tags=["pinned"])
    run.close("finished", step=STEP)


if __name__ == "__main__":
    main(sys.argv[1])
