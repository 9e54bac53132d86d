"""Random trainings, killed again and again at random points. Another seed: ``CKPTMGR_CAMPAIGN_SEED=7``."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from cases import CADENCES, PLAIN_LOADERS, options_of
from faults import Fault
from ingredients import Setup
from runner import Runner

SEED = int(os.environ.get("CKPTMGR_CAMPAIGN_SEED", "0"))
NCHAINS = int(os.environ.get("CKPTMGR_CAMPAIGN_CHAINS", "200"))
POINTS = ("fetched", "forward", "stepped", "epoch-hooks", "validating", "turn-end", "manifest", "committed")


def random_setup(draw: random.Random) -> Setup:
    loader, workers = draw.choice(PLAIN_LOADERS)
    return Setup(
        loader=loader,
        workers=workers,
        optimizer=draw.choice(["adamw", "adamw-fused", "sgd", "two"]),
        scheduler=draw.choice(["none", "onecycle", "plateau"]),
        accumulate=draw.choice([1, 2, 3]),
        precision=draw.choice(["float32", "bf16"]),
        ema=draw.choice([False, True]),
        max_steps=draw.choice([None, 6]),
        flush=draw.choice([True, True, False]),
        validate_every=0 if loader in ("stream", "countless") else draw.choice([0, 2, 3]),
    )


def random_faults(draw: random.Random) -> list[Fault]:
    faults: list[Fault] = []
    turn = 0
    for _ in range(draw.randint(1, 6)):
        turn += draw.randint(0, 6)
        point = draw.choice(POINTS)
        if draw.random() < 0.3:
            faults.append(Fault("any", draw.randint(20, 500)))
        else:
            in_step = point in ("manifest", "committed")
            faults.append(Fault(point, 1 if in_step else turn, draw.choice(["kill", "kill", "terminate"])))
    return faults


@pytest.fixture(params=["plain", "lightning"])
def face(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def runner(request: pytest.FixtureRequest, face: str) -> Runner:
    return request.getfixturevalue(face)  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", range(3))
def test_a_run_goes_on_wherever_a_timer_has_killed_it(runner: Runner, face: str, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    faults = [Fault("any", draw.randint(50, 500)) for _ in range(5)]
    options = options_of(face, {"every_n_steps": 1})
    runner.check_chain(random_setup(draw), tmp_path / "run", faults, options=options, must_fire=False)


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(NCHAINS))
def test_a_random_run_killed_at_random_points_is_exact(runner: Runner, face: str, tmp_path: Path, number: int) -> None:
    draw = random.Random(f"{SEED}:{number}")
    setup, faults = random_setup(draw), random_faults(draw)
    options = options_of(face, draw.choice(list(CADENCES.values())))
    # A process may come to its end before its fault.
    runner.check_chain(setup, tmp_path / "run", faults, options=options, reseed=draw.random() < 0.5, must_fire=False)
