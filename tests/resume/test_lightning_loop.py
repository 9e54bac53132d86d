"""Corners of Lightning's loop: exceptions, signals, changed workers, and what cannot be exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from ingredients import Setup
from results import first_difference
from runner import Runner

RARELY = {"every_n_train_steps": 100}
EACH_STEP = {"every_n_train_steps": 1, "background": False}


def steps_of(log: str) -> list[str]:
    """Return the steps from which the starts began, as their log tells."""
    return [line.split("from step ")[1].split(")")[0] for line in log.splitlines() if line.startswith("--- start")]


def test_a_finished_run_is_started_again_and_stays_as_it_is(lightning: Runner, tmp_path: Path) -> None:
    setup = Setup(scheduler="onecycle")
    lightning.check_chain(setup, tmp_path / "run", [Fault("forward", 9)])
    lightning.check_chain(setup, tmp_path / "run", [])


@pytest.mark.parametrize(
    ("setup", "steps"),
    [
        (Setup(scheduler="onecycle"), ["None", "4", "7", "12"]),
        (Setup(ema=True), ["None", "4", "7", "12"]),
        (Setup(optimizer="two", scheduler="onecycle"), ["None", "8", "14", "24"]),
        (Setup(loader="augmented", workers=2, optimizer="adamw-fused", precision="bf16"), ["None", "4", "7", "12"]),
        (Setup(loader="stateful", workers=2, accumulate=2, scheduler="plateau"), ["None", "2", "4", "6"]),
        (Setup(loader="countless", accumulate=2, optimizer="sgd"), ["None", "2", "4", "6"]),
        (Setup(optimizer="two", accumulate=2), ["None", "4", "8", "12"]),
    ],
    ids=str,
)
def test_an_exception_in_forward_saves_the_step_before_it(
    lightning: Runner, tmp_path: Path, setup: Setup, steps: list[str]
) -> None:
    options = {**RARELY, "save_on_exception": True}
    faults = [Fault("forward", 5, "raise"), Fault("fetched", 8, "raise"), Fault("forward", 13, "raise")]
    log = lightning.check_chain(setup, tmp_path / "run", faults, options=options)
    assert steps_of(log) == steps


@pytest.mark.parametrize("point", ["optimizing", "stepped"])
@pytest.mark.parametrize("optimizer", ["adamw", "two"])
def test_an_exception_inside_of_a_step_saves_nothing(
    lightning: Runner, tmp_path: Path, point: str, optimizer: str
) -> None:
    options = {**RARELY, "save_on_exception": True}
    log = lightning.check_chain(
        Setup(optimizer=optimizer, ema=True), tmp_path / "run", [Fault(point, 5, "raise")], options=options
    )
    assert steps_of(log) == ["None", "None"]
    assert "is not saved" in log


@pytest.mark.parametrize("setup", [Setup(ema=True), Setup(optimizer="two"), Setup(validate_every=3)], ids=str)
def test_an_exception_in_validation_saves_the_step_before_it(lightning: Runner, tmp_path: Path, setup: Setup) -> None:
    options = {**RARELY, "save_on_exception": True}
    log = lightning.check_chain(setup, tmp_path / "run", [Fault("validating", 7, "raise")], options=options)
    assert steps_of(log)[1] in ("7", "9", "10", "14")


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (Fault("fetched", 1, "terminate"), "1"),
        (Fault("forward", 5, "terminate"), "5"),
        (Fault("stepped", 7, "terminate"), "7"),
        (Fault("validating", 7, "terminate"), "7"),
        (Fault("epoch-hooks", 7, "terminate"), "7"),
        (Fault("turn-end", 7, "terminate"), "8"),
        (Fault("manifest", 6, "terminate"), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("setup", [Setup(ema=True), Setup(loader="augmented", workers=2)], ids=str)
def test_sigterm_saves_at_the_step_boundary_and_exits_with_75(
    lightning: Runner, tmp_path: Path, setup: Setup, fault: Fault, step: str | None
) -> None:
    options = RARELY if step else {"every_n_train_steps": 3}
    log = lightning.check_chain(setup, tmp_path / "run", [fault], options=options)
    if step:
        assert steps_of(log)[1] == step


@pytest.mark.parametrize("optimizer", ["adamw", "two"])
def test_sigterm_with_pending_gradients_saves_after_the_step_that_uses_them(
    lightning: Runner, tmp_path: Path, optimizer: str
) -> None:
    setup = Setup(accumulate=2, optimizer=optimizer)
    log = lightning.check_chain(setup, tmp_path / "run", [Fault("forward", 3, "terminate")], options=RARELY)
    assert steps_of(log)[1] == {"adamw": "2", "two": "4"}[optimizer]


@pytest.mark.parametrize("loader", ["countless", "shuffle"])
def test_gradients_that_are_pending_when_an_epoch_ends_are_not_lost(
    lightning: Runner, tmp_path: Path, loader: str
) -> None:
    setup = Setup(loader=loader, optimizer="two", accumulate=2, flush=False)
    options = {"every_n_epochs": 1, "background": False}
    faults = [Fault("forward", 8), Fault("forward", 9), Fault("forward", 17)]
    log = lightning.check_chain(setup, tmp_path / "run", faults, options=options)
    assert steps_of(log) == ["None", "None", "8", "14"]


@pytest.mark.parametrize("workers", [(0, 2, 0), (2, 1, 2)], ids=str)
def test_per_sample_seeds_make_the_number_of_workers_irrelevant(
    lightning: Runner, tmp_path: Path, workers: tuple[int, ...]
) -> None:
    setup = Setup(loader="sample-seed", workers=workers[0])
    faults = [Fault("forward", 5), Fault("forward", 12)]
    log = lightning.check_chain(setup, tmp_path / "run", faults, workers=workers, options=EACH_STEP)
    assert "exact" not in log
    assert "replay" not in log


@pytest.mark.parametrize(("first", "workers"), [(2, (0, 2, 0, 2)), (2, (2, 0, 2, 0)), (9, (2, 0, 2, 0))], ids=str)
def test_the_number_of_workers_may_change_again_and_again_in_one_epoch(
    lightning: Runner, tmp_path: Path, first: int, workers: tuple[int, ...]
) -> None:
    setup = Setup(loader="sample-seed", workers=workers[0])
    faults = [Fault("forward", first + number) for number in range(3)]
    log = lightning.check_chain(setup, tmp_path / "run", faults, workers=workers, options=EACH_STEP)
    assert "exact" not in log


def test_what_was_true_of_kept_workers_is_forgotten_with_them(lightning: Runner, tmp_path: Path) -> None:
    setup = Setup(loader="kept-workers", workers=2)
    kills = [Fault("forward", 12), Fault("forward", 14), Fault("forward", 17)]
    how: dict[str, Any] = {"workers": (2, 0, 0, 0), "options": EACH_STEP}
    once, _ = lightning.run_chain(setup, tmp_path / "once", kills[:1], **how)
    often, log = lightning.run_chain(setup, tmp_path / "often", kills, **how)
    assert first_difference(once, often) is None, log


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("turn", [5, 12])
def test_an_epoch_keeps_its_order_when_workers_are_kept_no_more(
    lightning: Runner, tmp_path: Path, workers: tuple[int, ...], turn: int
) -> None:
    setup = Setup(loader="kept-workers", workers=workers[0])
    expected = lightning.reference(setup)
    faults = [Fault("forward", turn)]
    result, log = lightning.run_chain(setup, tmp_path / "run", faults, workers=workers, options=EACH_STEP)
    end = 7 if turn < 7 else 14
    assert samples_of(result)[:end] == samples_of(expected)[:end]
    assert "not exact: persistent_workers has changed" in log


@pytest.mark.parametrize(
    ("setup", "workers", "warning"),
    [
        (Setup(loader="augmented", workers=2), (2, 0), "num_workers was 2 and is 0"),
        (Setup(loader="augmented-kept-workers", workers=2), (2,), "the workers had lived through earlier epochs"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_exact_is_said_by_name_and_trains_each_sample_once(
    lightning: Runner, tmp_path: Path, setup: Setup, workers: tuple[int, ...], warning: str
) -> None:
    expected = lightning.reference(setup)
    result, log = lightning.run_chain(
        setup, tmp_path / "run", [Fault("forward", 12)], workers=workers, options=EACH_STEP
    )
    assert "not exact" in log
    assert warning in log
    assert samples_of(result)[:14] == samples_of(expected)[:14]


def samples_of(result: dict[str, Any]) -> list[list[int]]:
    return [row["samples"] for row in result["trace"]]
