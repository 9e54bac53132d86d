"""``--nproc`` of ``ckptmgr run`` and ``resume``: real jobs under a real torchrun, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from experiment_samples import write_project
from run_samples import create_run, save, start

from ckptmgr.cli.main import run
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import encode_record
from ckptmgr.launch.job import run_job
from ckptmgr.launch.relaunch import Relaunch
from ckptmgr.launch.start_record import describe_start
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import record_end
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]

# Each rank writes down how it was started.
REPORT = """
import json, os, pathlib, sys
rank = os.environ.get("RANK", "alone")
names = ("WORLD_SIZE", "CKPTMGR_RUN_DIR")
pathlib.Path(f"rank-{rank}.json").write_text(json.dumps([sys.argv[1:], *(os.environ.get(name) for name in names)]))
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CKPTMGR_RUN_DIR", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's project, as the current directory; its package is only imported by other processes."""
    root = write_project(tmp_path, "pkg_nproc")
    (root / "train.py").write_text(REPORT)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in _LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return root


def ckptmgr(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptmgr", *words]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False)


def run_of_a_script(project: Path, args: Sequence[str] = ()) -> Path:
    """Write a run that ``train.py`` started, with one checkpoint."""
    root = project / "runs" / "script"
    storage = open_storage(root)
    create_run(storage)
    attempt = start(storage)
    record = msgspec.structs.replace(
        describe_start(),
        kind="script",
        target="train.py",
        args=tuple(args),
        script=str(project / "train.py"),
        script_in_project="train.py",
        cwd=str(project),
        cwd_in_project=".",
        interpreter_flags=(),
        is_redacted=False,
        launcher=None,
        topology={},
    )
    storage.write(attempt_key(attempt, "start"), [encode_record(record)])
    save(storage, attempt, 5)
    record_end(storage, attempt, "finished", step=5)
    return root


def latest(run_dir: str) -> tuple[int, int]:
    """Return the step of the newest checkpoint, and how many ranks wrote it."""
    manifest = Catalog(open_storage(run_dir)).resolve("latest")
    return manifest.step, manifest.topology.world_size


def test_a_script_is_started_on_each_rank_with_its_own_arguments(project: Path) -> None:
    run_dir = run_of_a_script(project, ["--n", "5", "--nproc", "7"])
    done = ckptmgr("resume", f"{run_dir}@5", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        started = json.loads((project / f"rank-{rank}.json").read_text())
        assert started == [["--n", "5", "--nproc", "7"], "2", f"{run_dir}@5"]
    assert not (project / "rank-2.json").exists()


def test_a_job_that_fails_fails_the_command(project: Path) -> None:
    run_dir = run_of_a_script(project)
    assert ckptmgr("resume", str(run_dir), "--nproc", "2", EXIT_CODE="75").returncode == 1, "nothing was saved"


def test_one_process_needs_no_torchrun(project: Path) -> None:
    run_dir = run_of_a_script(project)
    assert ckptmgr("resume", str(run_dir), "--nproc", "1", EXIT_CODE="3").returncode == 3
    assert json.loads((project / "rank-alone.json").read_text())[1] is None


def test_a_configured_job_that_is_told_to_stop_exits_with_75_and_goes_on_elsewhere(project: Path) -> None:
    words = ["run", "loop.yaml", "--run-dir", "runs/a", "loop.epochs=1000000", "--nproc", "2"]
    told = []
    with subprocess.Popen([sys.executable, "-m", "ckptmgr", *words], stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        for line in job.stderr:
            told.append(line)
            if "saved step" in line:
                job.send_signal(signal.SIGTERM)
                break
        told += job.stderr.readlines()
        assert job.wait(120) == 75, "".join(told)
    assert sum("training starts from nothing" in line for line in told) == 1, "rank 0 alone tells"
    stopped_at, world_size = latest("runs/a")
    assert world_size == 2
    # To the end of that epoch; an epoch has 8 steps.
    epochs = stopped_at // 8 + 1
    done = ckptmgr("resume", "runs/a", f"loop.epochs={epochs}", "--json")
    assert done.returncode == 0, done.stderr
    assert "on 2 processes, as before" in done.stderr
    assert json.loads(done.stdout)["step"] == 8 * epochs
    assert latest("runs/a") == (8 * epochs, 2)
    done = ckptmgr("resume", "runs/a", f"loop.epochs={epochs + 1}", "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert latest("runs/a") == (8 * epochs + 8, 1)


# It says what its run says: torchrun exits with 1 for all of these.
ENDING = """
import sys
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, record_end
from ckptmgr.storage.open import open_storage
storage = open_storage(sys.argv[1])
attempt = claim_attempt(storage, Catalog(storage).attempts).attempt
record_end(storage, attempt, sys.argv[2], step=5, error=sys.argv[3] or None)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("outcome", "error", "status"),
    [("preempted", "", 75), ("preempted", "KeyboardInterrupt: ", 1), ("failed", "ValueError: x", 1)],
)
def test_only_a_job_that_was_told_to_stop_and_has_saved_exits_with_75(
    project: Path, outcome: str, error: str, status: int
) -> None:
    run_dir = str(run_of_a_script(project))
    job = Relaunch((sys.executable, "-c", ENDING, run_dir, outcome, error), project, {}, has_launcher=True)
    assert run_job(job, run_dir=run_dir) == status


# Without starting anything


@pytest.mark.parametrize("count", ["0", "x", "-1", "4097"])
@pytest.mark.parametrize("command", ["run", "resume", "show"])
def test_what_is_no_number_of_processes_is_wrong_usage(project: Path, command: str, count: str, capsys: Output) -> None:
    assert run([command, "loop.yaml" if command == "run" else str(run_of_a_script(project)), "--nproc", count]) == 2
    assert "--nproc" in capsys.readouterr().err


def test_the_command_of_a_job_is_printed(project: Path, capsys: Output) -> None:
    run_dir = run_of_a_script(project)
    assert run(["resume", str(run_dir), "--nproc", "4", "--print"]) == 0
    printed = capsys.readouterr().out
    assert f"CKPTMGR_RUN_DIR={run_dir}" in printed
    assert printed.rstrip().endswith("-m torch.distributed.run --standalone --nproc-per-node 4 train.py")


def test_a_rank_of_a_job_does_not_start_more(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    run_dir = run_of_a_script(project)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["resume", str(run_dir), "--nproc", "4"]) == 2
    assert "WORLD_SIZE=2" in capsys.readouterr().err


def test_a_trainer_of_several_machines_is_not_started_on_one(project: Path, capsys: Output) -> None:
    assert run(["run", "fit.yaml", "+trainer.num_nodes=2", "--nproc", "2"]) == 2
    assert "num_nodes" in capsys.readouterr().err


def test_a_trainer_gets_as_many_devices_as_there_are_ranks(project: Path, capsys: Output) -> None:
    assert run(["run", "fit.yaml", "+trainer.devices=8", "--nproc", "2", "--dry-run", "--json"]) == 0
    output = capsys.readouterr()
    assert "devices: 2" in json.loads(output.out)["config"]
    assert "trainer.devices=2" in output.err
    assert run(["run", "fit.yaml", "+trainer.devices=8"]) == 2
    assert "--nproc 8" in capsys.readouterr().err
