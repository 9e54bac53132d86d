"""Kill a training with SIGKILL in mid-epoch, resume it from the shell, and prove that nothing was lost."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

PROJECT = Path(__file__).parents[1]
EPOCHS, STEPS_PER_EPOCH, KILL_AFTER = 5, 45, 100
started: list[subprocess.Popen] = []


def ckptmgr(*words: str, log: Path | None = None) -> subprocess.Popen:
    print("\n$ ckptmgr", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "ckptmgr", *words]
    output = None if log is None else log.open("a")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    started.append(subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output, stderr=output))
    return started[-1]


def kill_when_saved(training: subprocess.Popen, run_dir: Path, log: Path) -> None:
    while not any(run_dir.glob(f"checkpoints/{KILL_AFTER:010d}-*/manifest.json")):
        assert training.poll() is None, log.read_text()
        time.sleep(0.002)
    training.kill()
    assert training.wait() == -signal.SIGKILL
    epoch = KILL_AFTER // STEPS_PER_EPOCH + 1
    print(f"killed with SIGKILL soon after step {KILL_AFTER}, in the middle of epoch {epoch} of {EPOCHS}")


def last_state(run_dir: Path) -> dict[str, bytes]:
    files = sorted(max((run_dir / "checkpoints").iterdir()).glob("*.safetensors"))
    return {f"{file.stem}/{name}": value.tobytes() for file in files for name, value in load_file(file).items()}


def losses(run_dir: Path) -> list[tuple[str, str]]:
    with next(run_dir.glob("lightning_logs/*/metrics.csv")).open() as log:
        return [(row["step"], row["loss"]) for row in csv.DictReader(log) if row["loss"]]


def prove(folder: Path) -> None:
    log, runs = folder / "log", (folder / "uninterrupted", folder / "killed")
    whole, killed = (str(run_dir.relative_to(PROJECT)) for run_dir in runs)
    options = ["configs/digits.yaml", f"trainer.max_epochs={EPOCHS}"]
    reference = ckptmgr("run", *options, f"run_dir={whole}", log=log)
    print("goes on beside what follows, undisturbed")
    kill_when_saved(ckptmgr("run", *options, f"run_dir={killed}", log=log), runs[1], log)
    assert ckptmgr("resume", killed, log=log).wait() == 0, log.read_text()
    assert reference.wait() == 0, log.read_text()
    assert ckptmgr("show", killed).wait() == 0
    assert ckptmgr("ls", killed).wait() == 0

    (tensors, same_tensors), (curve, same_curve) = map(last_state, runs), map(losses, runs)
    print(f"\nlast checkpoint: {len(tensors)} tensors (weights, running means, Adam's moments, RNG)")
    print(f"  bit-identical to the uninterrupted run: {'yes' if same_tensors == tensors else 'NO'}")
    print(f"loss at each of {len(curve)} steps, none logged twice, none missing")
    print(f"  bit-identical to the uninterrupted run: {'yes' if same_curve == curve else 'NO'}")
    assert same_tensors == tensors
    assert same_curve == curve
    assert [step for step, _ in same_curve] == [str(step) for step in range(EPOCHS * STEPS_PER_EPOCH)]


if __name__ == "__main__":
    (PROJECT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-", dir=PROJECT / "runs") as folder:
        try:
            prove(Path(folder))
        finally:
            for process in started:
                process.kill()
                process.wait()
