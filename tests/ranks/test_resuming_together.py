"""What all ranks do alike when they begin, stop and resume; and what is each rank's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from job_launcher import Launcher, Outcome
from torch import nn

from ckptmgr import load_inference
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage


def steps_of(run_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Catalog(LocalStorage(run_dir)).on_line]


def finished(outcomes: list[Outcome]) -> list[Outcome]:
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.log
        assert outcome.noted("error") == [], outcome.log
    return outcomes


def file_of(run_dir: Path, step: int, name: str) -> Path:
    (path,) = run_dir.glob(f"checkpoints/{step:010d}-*/{name}")
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit in the state of rank 1": ("state-rank-00001.json", flip),
    "no state of rank 1": ("state-rank-00001.json", Path.unlink),
    "a truncated shard of rank 1": ("model-rank-00001.safetensors", truncate),
    "a flipped bit in the shard of rank 1": ("model-rank-00001.safetensors", flip),
    "a flipped bit in what rank 0 has for itself": ("own.safetensors", flip),
    "a flipped bit in what rank 1 has for itself": ("own-rank-00001.safetensors", flip),
}


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_what_one_rank_finds_damaged_is_set_aside_by_all_and_all_resume_the_same(
    launcher: Launcher, tmp_path: Path, kind: str
) -> None:
    run_dir = tmp_path / "run"
    saved = finished(launcher("trains", world_size=2, run_dir=str(run_dir), kind=kind, steps=3))
    run_dirs = []
    for number, (name, damage) in enumerate(DAMAGES.values()):
        damaged = shutil.copytree(run_dir, tmp_path / f"damaged-{number}")
        damage(file_of(damaged, 3, name))
        run_dirs.append(damaged)
    # Each of the two newest ones is damaged on another rank.
    twice = shutil.copytree(run_dir, tmp_path / "twice")
    flip(file_of(twice, 3, "own-rank-00001.safetensors"))
    flip(file_of(twice, 2, "own.safetensors"))
    run_dirs.append(twice)
    outcomes = finished(
        launcher("resumes", world_size=2, run_dir="", run_dirs=[str(path) for path in run_dirs], kind=kind)
    )
    for outcome, before in zip(outcomes, saved, strict=True):
        assert outcome.noted("resumed") == [2] * len(DAMAGES) + [1], outcome.log
        weights = before.noted("saved")
        assert outcome.noted("weights") == [weights[1]] * len(DAMAGES) + [weights[0]]
        assert "set aside the checkpoint of step 3" in outcomes[0].log
    # The attempts went on from where all of them resumed.
    assert steps_of(run_dirs[0]) == [1, 2]
    assert steps_of(twice) == [1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_one_step_which_is_saved(
    launcher: Launcher, tmp_path: Path, victim: int
) -> None:
    outcomes = launcher("is_told_to_stop", world_size=2, run_dir=str(tmp_path / "run"), victim=victim)
    assert [outcome.exit_code for outcome in outcomes] == [75, 75], outcomes[0].log + outcomes[1].log
    (steps,) = {tuple(outcome.noted("preempted")) for outcome in outcomes}
    assert steps[0] >= 40
    assert steps_of(tmp_path / "run") == list(steps)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_loop_is_shorter_ends_the_job_with_an_error_that_says_so(
    launcher: Launcher, tmp_path: Path, victim: int
) -> None:
    outcomes = launcher("ends_early", world_size=2, run_dir=str(tmp_path / "run"), kind="plain", victim=victim)
    for outcome in outcomes:
        assert outcome.exit_code == 1
        (ended,) = outcome.noted("ended")
        assert "RankFailure" in ended["classes"]
    told = "\n".join(outcome.noted("ended")[0]["text"] for outcome in outcomes)
    assert "the ranks do not do the same" in told
    assert "same number of batches" in told


def test_a_model_that_differs_on_one_rank_is_refused_on_all_and_creates_no_run(
    launcher: Launcher, tmp_path: Path
) -> None:
    outcomes = launcher("trains", world_size=2, run_dir=str(tmp_path / "run"), kind="plain", steps=1, widths={"1": 17})
    for outcome in outcomes:
        assert outcome.exit_code == 1
        (ended,) = outcome.noted("ended")
        assert ended["classes"][0] == "StateMismatchError"
        assert "(16, 8) on rank 0, F32 (17, 8) on rank 1" in ended["text"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_checkpoint_that_does_not_fit_one_rank_is_refused_on_all_before_anything_changes(
    launcher: Launcher, tmp_path: Path, victim: int
) -> None:
    run_dir = tmp_path / "run"
    finished(launcher("trains", world_size=2, run_dir=str(run_dir), steps=1))
    outcomes = launcher("resumes", world_size=2, run_dir="", run_dirs=[str(run_dir)], counts=victim)
    for outcome in outcomes:
        error = outcome.error()
        assert error["classes"][0] == "StateMismatchError"
        assert f"rank {victim}" in error["text"]
        assert outcome.noted("untouched") == [True]
    assert [path.name for path in (run_dir / "attempts").iterdir()] == ["000001"]


def test_replicas_that_have_diverged_are_named_and_saved_with_a_warning(launcher: Launcher, tmp_path: Path) -> None:
    outcomes = finished(launcher("trains", world_size=2, run_dir=str(tmp_path / "run"), steps=3, perturbed=1))
    assert "WARNING the replicas have diverged, at the save of step 2" in outcomes[0].log
    assert "model/0.weight on rank 1" in outcomes[0].log
    assert "at the save of step 1:" not in outcomes[0].log
    assert "diverged" not in outcomes[1].log
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_replicas_that_have_diverged_are_not_saved_where_that_is_asked_for(launcher: Launcher, tmp_path: Path) -> None:
    outcomes = launcher(
        "trains", world_size=2, run_dir=str(tmp_path / "run"), steps=2, perturbed=1, on_divergence="raise"
    )
    for outcome in outcomes:
        error = outcome.error()
        assert error["classes"][0] == "StateMismatchError"
        assert "1 of 6 tensors differ" in error["text"] or "model/0.weight on rank 1" in error["text"]
    assert steps_of(tmp_path / "run") == [1]


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_running_statistics_are_rank_0s_where_ddp_broadcasts_them_else_each_ranks_own(
    launcher: Launcher, tmp_path: Path, broadcast_buffers: bool
) -> None:
    run_dir = tmp_path / "run"
    fields = {"has_buffers": True, "broadcast_buffers": broadcast_buffers}
    saved = finished(launcher("trains", world_size=2, run_dir=str(run_dir), steps=2, **fields))
    buffers = [outcome.noted("buffers")[-1] for outcome in saved]
    assert buffers[0] != buffers[1], "each rank trained on other batches"
    on_four = shutil.copytree(run_dir, tmp_path / "on-four")
    resumed = finished(launcher("resumes", world_size=2, run_dir="", run_dirs=[str(run_dir)], **fields))
    back = [outcome.noted("buffers")[0] for outcome in resumed]
    assert back == ([buffers[0]] * 2 if broadcast_buffers else buffers)
    resumed = finished(launcher("resumes", world_size=4, run_dir="", run_dirs=[str(on_four)], **fields))
    assert [outcome.noted("buffers")[0] for outcome in resumed] == [buffers[0]] * 4


def test_each_rank_draws_on_as_it_would_have_and_new_ranks_draw_numbers_of_their_own(
    launcher: Launcher, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    saved = finished(launcher("trains", world_size=2, run_dir=str(run_dir), steps=1))
    goes_on = [outcome.noted("draws")[0] for outcome in saved]
    assert goes_on[0] != goes_on[1]
    copies = [str(shutil.copytree(run_dir, tmp_path / f"copy-{number}")) for number in range(4)]
    resumed = finished(launcher("resumes", world_size=2, run_dir="", run_dirs=copies[:1]))
    assert [outcome.noted("draws")[0] for outcome in resumed] == goes_on
    resumed = finished(launcher("resumes", world_size=4, run_dir="", run_dirs=copies[1:3]))
    draws = [outcome.noted("draws") for outcome in resumed]
    assert [first for first, _ in draws[:2]] == goes_on
    assert all(first == again for first, again in draws), "the same whenever it is asked for"
    for generator in range(3):
        assert len({first[generator] for first, _ in draws}) == 4
    resumed = finished(launcher("resumes", world_size=1, run_dir="", run_dirs=copies[3:], kind="plain"))
    assert resumed[0].noted("draws") == goes_on[:1]


@pytest.mark.parametrize(("kind", "has_buffers"), [("ddp", True), ("fsdp2", False)])
def test_golden_samples_leave_no_trace_on_any_rank_and_prove_the_whole_model_on_one(
    launcher: Launcher, tmp_path: Path, kind: str, has_buffers: bool
) -> None:
    jobs = []
    for name, golden in (("plain", None), ("watched", [[[0.5] * 8], [[-1.0] * 8]])):
        run_dir = str(tmp_path / name)
        fields = {"run_dir": run_dir, "kind": kind, "steps": 3, "has_buffers": has_buffers, "golden": golden}
        jobs.append(finished(launcher("trains", world_size=2, **fields)))
    for plain, watched in zip(*jobs, strict=True):
        assert watched.noted("saved") == plain.noted("saved")
        assert watched.noted("draws") == plain.noted("draws")
        assert watched.noted("buffers") == plain.noted("buffers")
    norm = [nn.BatchNorm1d(16)] if has_buffers else []
    module = nn.Sequential(nn.Linear(8, 16), *norm, nn.Linear(16, 64), nn.Linear(64, 1))
    assert load_inference(f"{tmp_path / 'watched'}@2", model=module).ngolden == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_run_the_golden_samples_costs_no_checkpoint(
    launcher: Launcher, tmp_path: Path, rank: int
) -> None:
    run_dir = str(tmp_path / "run")
    golden = [[[0.5] * 8]]
    fields = {"run_dir": run_dir, "steps": 2, "golden": golden, "cannot_predict": rank}
    saved = finished(launcher("trains", world_size=2, **fields))
    assert [outcome.noted("error") for outcome in saved] == [[], []]
    resumed = finished(launcher("resumes", world_size=2, run_dir="", run_dirs=[run_dir], golden=golden))
    assert [outcome.noted("resumed") for outcome in resumed] == [[2], [2]]
    assert [o.noted("weights")[0] for o in resumed] == [o.noted("saved")[-1] for o in saved]
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 64), nn.Linear(64, 1))
    loaded = load_inference(f"{run_dir}@2", model=module, predict=lambda model, inputs: model(inputs))
    assert loaded.ngolden == (None if rank == 0 else 1)
