"""Corners of the plain loop: pending gradients, exceptions, signals, changed workers, and what cannot be exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from ingredients import NSAMPLES, Setup
from results import first_difference, read_result
from runner import SEED, Runner

SCRIPT = Path(__file__).parent / "plain_script.py"
RARELY = {"every_n_steps": 100}
EACH_STEP = {"every_n_steps": 1, "background": False}


@pytest.mark.parametrize("loader", ["countless", "stream", "shuffle"])
def test_gradients_that_are_pending_when_an_epoch_ends_are_not_lost(plain: Runner, tmp_path: Path, loader: str) -> None:
    # 7 batches, a step after each second one: the gradient of the seventh waits for the next epoch.
    setup = Setup(loader=loader, accumulate=2, flush=False)
    options = {"every_n_epochs": 1, "background": False}
    faults = [Fault("forward", 8), Fault("forward", 9), Fault("forward", 17)]
    log = plain.check_chain(setup, tmp_path / "run", faults, options=options)
    # What is due at the end of the epoch is saved with the step that uses the gradient.
    assert steps_of(log) == ["None", "None", "4", "7"]


def test_a_finished_run_is_started_again_and_stays_as_it_is(plain: Runner, tmp_path: Path) -> None:
    setup = Setup(scheduler="onecycle")
    plain.check_chain(setup, tmp_path / "run", [Fault("forward", 9)])
    log = plain.check_chain(setup, tmp_path / "run", [])
    assert "is finished: all 3 epochs were trained by step 21" in log


def test_interpreters_that_share_nothing_give_the_same_bits(plain: Runner, tmp_path: Path) -> None:
    setup = Setup(loader="augmented", optimizer="two")
    result = tmp_path / "result"
    job = {
        "setup": asdict(setup),
        "run_dir": str(tmp_path / "run"),
        "options": {"every_n_steps": 3},
        "result": str(result),
        "seed": SEED,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    for fault, exit_code in ((asdict(Fault("forward", 11)), -9), (None, 0)):
        argv = [sys.executable, str(SCRIPT), json.dumps({**job, "fault": fault})]
        assert subprocess.run(argv, env=environment).returncode == exit_code
    assert first_difference(plain.reference(setup), read_result(result)) is None


EXCEPTION_SETUPS = [
    Setup(optimizer="two", scheduler="onecycle", ema=True),
    Setup(loader="augmented", workers=2, optimizer="adamw-fused", precision="bf16"),
    Setup(loader="stateful", workers=2, accumulate=2, scheduler="plateau"),
    Setup(loader="countless", accumulate=2, optimizer="sgd"),
    Setup(loader="sample-seed", workers=2, optimizer="sgd", accumulate=2, ema=True),
]


@pytest.mark.parametrize("setup", EXCEPTION_SETUPS, ids=str)
def test_an_exception_in_forward_saves_the_step_before_it(plain: Runner, tmp_path: Path, setup: Setup) -> None:
    options = {**RARELY, "save_on_exception": True}
    faults = [Fault("forward", 5, "raise"), Fault("fetched", 8, "raise"), Fault("forward", 13, "raise")]
    log = plain.check_chain(setup, tmp_path / "run", faults, options=options)
    # With gradient accumulation, the last step lies before the batches whose gradients were pending.
    expected = {1: ["None", "4", "7", "12"], 2: ["None", "2", "4", "6"]}[setup.accumulate]
    if setup.loader == "countless":
        expected = ["None", "2", "3", "5"]
    assert steps_of(log) == expected


@pytest.mark.parametrize("point", ["optimizing", "stepped", "validating"])
def test_an_exception_after_parameters_have_moved_saves_nothing(plain: Runner, tmp_path: Path, point: str) -> None:
    options = {"every_n_steps": 4, "save_on_exception": True}
    log = plain.check_chain(Setup(ema=True), tmp_path / "run", [Fault(point, 7, "raise")], options=options)
    # Step 4 was saved because it was due.
    assert "from step 4)" in log
    assert "nothing is saved" in log


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (Fault("fetched", 1, "terminate"), 1),
        (Fault("forward", 5, "terminate"), 5),
        (Fault("stepped", 7, "terminate"), 7),
        (Fault("validating", 7, "terminate"), 7),
        (Fault("turn-end", 7, "terminate"), 8),
        (Fault("manifest", 6, "terminate"), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("setup", [Setup(ema=True), Setup(loader="augmented", workers=2)], ids=str)
def test_sigterm_saves_at_the_step_boundary_and_exits_with_75(
    plain: Runner, tmp_path: Path, setup: Setup, fault: Fault, step: int | None
) -> None:
    options = RARELY if step else {"every_n_steps": 3}
    log = plain.check_chain(setup, tmp_path / "run", [fault], options=options)
    if step:
        assert f"from step {step})" in log


def test_sigterm_with_pending_gradients_saves_after_the_step_that_uses_them(plain: Runner, tmp_path: Path) -> None:
    log = plain.check_chain(Setup(accumulate=2), tmp_path / "run", [Fault("forward", 3, "terminate")], options=RARELY)
    assert "from step 2)" in log


@pytest.mark.parametrize("workers", [(0, 2, 0), (2, 1, 2)], ids=str)
def test_per_sample_seeds_make_the_number_of_workers_irrelevant(
    plain: Runner, tmp_path: Path, workers: tuple[int, ...]
) -> None:
    setup = Setup(loader="sample-seed", workers=2)
    faults = [Fault("forward", 5), Fault("forward", 12)]
    log = plain.check_chain(setup, tmp_path / "run", faults, workers=workers, options={"every_n_steps": 2})
    assert "exact" not in log
    assert "replay" not in log


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("turn", [5, 12])
def test_an_epoch_keeps_its_order_when_workers_are_kept_no_more(
    plain: Runner, tmp_path: Path, workers: tuple[int, ...], turn: int
) -> None:
    # Workers that live on are not seeded again: from the second epoch on, less is drawn when an epoch begins.
    setup = Setup(loader="kept-workers", workers=workers[0])
    expected = plain.reference(setup)
    result, log = plain.run_chain(setup, tmp_path / "run", [Fault("forward", turn)], workers=workers, options=EACH_STEP)
    end = 7 if turn < 7 else 14
    assert samples_of(result)[:end] == samples_of(expected)[:end]
    assert "not exact: persistent_workers has changed" in log


@pytest.mark.parametrize(("first", "workers"), [(2, (0, 2, 0, 2)), (2, (2, 0, 2, 0)), (9, (2, 0, 2, 0))], ids=str)
def test_the_number_of_workers_may_change_again_and_again_in_one_epoch(
    plain: Runner, tmp_path: Path, first: int, workers: tuple[int, ...]
) -> None:
    setup = Setup(loader="sample-seed", workers=workers[0])
    faults = [Fault("forward", first + number) for number in range(3)]
    log = plain.check_chain(setup, tmp_path / "run", faults, workers=workers, options=EACH_STEP)
    assert "exact" not in log


def test_what_was_true_of_kept_workers_is_forgotten_with_them(plain: Runner, tmp_path: Path) -> None:
    setup = Setup(loader="kept-workers", workers=2)
    kills = [Fault("forward", 12), Fault("forward", 14), Fault("forward", 17)]
    how: dict[str, Any] = {"workers": (2, 0, 0, 0), "options": EACH_STEP}
    once, _ = plain.run_chain(setup, tmp_path / "once", kills[:1], **how)
    often, log = plain.run_chain(setup, tmp_path / "often", kills, **how)
    assert first_difference(once, often) is None, log


def test_a_replay_says_what_it_costs_and_what_would_avoid_it(plain: Runner, tmp_path: Path) -> None:
    setup = Setup(loader="augmented", workers=2)
    log = plain.check_chain(setup, tmp_path / "run", [Fault("forward", 13)], options=EACH_STEP)
    assert "replaying 5 batches of epoch 1" in log
    assert "PerSampleSeed" in log


@pytest.mark.parametrize(
    ("setup", "workers", "how", "warning"),
    [
        (Setup(loader="augmented", workers=2), (2, 0), {}, "num_workers was 2 and is 0"),
        (Setup(loader="augmented", workers=0), (0, 2), {}, "num_workers was 0 and is 2"),
        (Setup(loader="augmented", workers=2), (2,), {"on_resume": "skip"}, "on_resume='skip'"),
        (Setup(loader="augmented-kept-workers", workers=2), (2,), {}, "the workers had lived through earlier epochs"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_exact_is_said_by_name_and_trains_each_sample_once(
    plain: Runner, tmp_path: Path, setup: Setup, workers: tuple[int, ...], how: dict[str, str], warning: str
) -> None:
    expected = plain.reference(setup)
    result, log = plain.run_chain(
        setup, tmp_path / "run", [Fault("forward", 12)], workers=workers, options=EACH_STEP, batches=how
    )
    assert "not exact" in log
    assert warning in log
    # What differs is what is drawn: noise, and with it the order of later epochs.
    assert samples_of(result)[:14] == samples_of(expected)[:14]
    for first in (0, 7, 14):
        epoch = samples_of(result)[first : first + 7]
        assert sorted(number for batch in epoch for number in batch) == list(range(NSAMPLES))


def steps_of(log: str) -> list[str]:
    """Return the steps from which the starts began, as their log tells."""
    return [line.split("from step ")[1].split(")")[0] for line in log.splitlines() if line.startswith("--- start")]


def samples_of(result: dict[str, Any]) -> list[list[int]]:
    return [row["samples"] for row in result["trace"]]


def test_kept_workers_are_exact_while_they_live_in_their_first_epoch(plain: Runner, tmp_path: Path) -> None:
    setup = Setup(loader="augmented-kept-workers", workers=2)
    log = plain.check_chain(setup, tmp_path / "run", [Fault("forward", 5)], options={"every_n_steps": 2})
    assert "not exact" not in log
