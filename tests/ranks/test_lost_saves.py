"""A rank that fails in a save, dies in it, or hangs in it: what the others learn, and what is left on storage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_launcher import Launcher, Outcome

from ckptmgr.run.catalog import Catalog
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.local import LocalStorage
from ckptmgr.training_run import load_checkpoint

CAUSES = {"storage error": "the cable is out", "disk full": "No space left on device", "bug": "a defect"}


def committed(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints, each of them verified and loaded."""
    catalog = Catalog(LocalStorage(run_dir))
    steps = [checkpoint.step for checkpoint in catalog.on_line]
    for checkpoint in catalog.on_line:
        assert not verify_checkpoint(catalog, checkpoint), checkpoint
        assert load_checkpoint(f"{run_dir}@{checkpoint}").manifest.step == checkpoint.step
    return steps


def faults_of(victims: list[int]) -> dict[str, dict[str, Any]]:
    """Return faults at every second step: of each kind, at each point, on each victim; and one in the commit."""
    plans = [
        ("storage error", ": start"),
        ("disk full", ": part 1"),
        ("disk full", ": publish"),
        ("bug", ": done"),
    ]
    faults = [{"kind": kind, "point": point, "rank": victim} for kind, point in plans for victim in victims]
    faults.append({"kind": "disk full", "point": "manifest.json: publish", "rank": 0})
    return {str(2 * number): fault for number, fault in enumerate(faults, start=1)}


@pytest.mark.parametrize(
    ("kind", "victims"), [("ddp", [0, 1]), ("fsdp2", [0, 1]), ("ddp", [0, 3])], ids=["ddp 2", "fsdp2 2", "ddp 4"]
)
def test_a_rank_that_fails_in_a_save_costs_that_save_only(
    launcher: Launcher, tmp_path: Path, kind: str, victims: list[int]
) -> None:
    faults, run_dir = faults_of(victims), tmp_path / "run"
    steps, world_size = 2 * len(faults) + 1, 2 if max(victims) == 1 else 4
    outcomes = launcher(
        "saves_with_faults", world_size=world_size, run_dir=str(run_dir), kind=kind, steps=steps, faults=faults
    )
    for outcome in outcomes:
        assert (outcome.exit_code, outcome.noted("end")) == (0, ["finished"]), outcome.log
        assert [note["step"] for note in outcome.notes if "saved" in note] == list(range(1, steps + 1, 2))
        failed = {note["step"]: note["error"] for note in outcome.notes if "error" in note}
        assert sorted(failed) == sorted(map(int, faults))
        for step, error in failed.items():
            fault = faults[str(step)]
            assert error["classes"][0] == "SaveFailedError"
            assert f"step {step}" in error["text"]
            assert f"rank {fault['rank']}" in error["text"]
            assert CAUSES[fault["kind"]] in error["text"]
    assert committed(run_dir) == list(range(1, steps + 1, 2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="a tmpfs is mounted")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_disk_that_is_full_costs_that_save_only(launcher: Launcher, small_disk: Path, kind: str) -> None:
    run_dir = small_disk / "run"
    for outcome in launcher("fills_the_disk", world_size=2, run_dir=str(run_dir), kind=kind):
        assert outcome.exit_code == 0, outcome.log
        assert "SaveFailedError" in outcome.error()["classes"]
        assert "rank" in outcome.error()["text"]
        assert "No space left on device" in outcome.error()["text"]
        assert [note["step"] for note in outcome.notes if "saved" in note] == [1, 3]
    assert committed(run_dir) == [1, 3]


def lose(launcher: Launcher, run_dir: Path, world_size: int, kind: str, victim: int) -> list[Outcome]:
    """Lose a rank in the save of step 2; return what became of the others."""
    outcomes = launcher(
        "loses_a_rank",
        world_size=world_size,
        run_dir=str(run_dir),
        fault={"kind": kind, "point": ": part 1", "rank": victim},
        stopped=victim if kind == "stop" else None,
        timeout_s=3 if kind == "stop" else 60,
    )
    assert outcomes[victim].exit_code == -9
    return [outcome for outcome in outcomes if outcome.rank != victim]


@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_a_rank_that_is_lost_in_a_save_ends_the_job_with_its_name_and_the_save_before_stays(
    launcher: Launcher, tmp_path: Path, world_size: int, victim: int, kind: str
) -> None:
    run_dir = tmp_path / "run"
    for outcome in lose(launcher, run_dir, world_size, kind, victim):
        error = outcome.error()
        assert "SaveFailedError" in error["classes"]
        assert f"rank {victim}" in error["text"]
        assert ("it is gone" if kind == "kill" else "has not answered") in error["text"]
        (ended,) = outcome.noted("ended")
        assert "RankFailure" in ended["classes"]
        assert outcome.exit_code == 1
    assert committed(run_dir) == [1]


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.parametrize("repetition", range(20))
def test_a_rank_is_lost_many_times(launcher: Launcher, tmp_path: Path, kind: str, repetition: int) -> None:
    for victim in (0, 1):
        run_dir = tmp_path / f"run-{victim}"
        for outcome in lose(launcher, run_dir, 2, kind, victim):
            assert f"rank {victim}" in outcome.error()["text"]
            assert outcome.exit_code == 1
        assert committed(run_dir) == [1]
