"""Random trainings, killed again and again at random points. Another seed: ``CKPTMGR_CAMPAIGN_SEED=7``."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from cases import CADENCES, PLAIN_LOADERS
from faults import Fault
from ingredients import Setup
from runner import Runner

SEED = int(os.environ.get("CKPTMGR_CAMPAIGN_SEED", "0"))
NCHAINS = int(os.environ.get("CKPTMGR_CAMPAIGN_CHAINS", "200"))
POINTS = ("fetched", "forward", "stepped", "validating", "turn-end", "manifest", "committed")


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
        max_steps=draw.choice([None, 5]),
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


@pytest.mark.parametrize("number", range(6))
def test_a_run_goes_on_wherever_a_timer_has_killed_it(plain: Runner, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    faults = [Fault("any", draw.randint(50, 400)) for _ in range(5)]
    setup = random_setup(draw)
    plain.check_chain(setup, tmp_path / "run", faults, options={"every_n_steps": 1}, must_fire=False)


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(NCHAINS))
def test_a_random_run_killed_at_random_points_is_exact(plain: Runner, tmp_path: Path, number: int) -> None:
    draw = random.Random(f"{SEED}:{number}")
    setup, faults = random_setup(draw), random_faults(draw)
    options = draw.choice(list(CADENCES.values()))
    # A terminated process may also have come to its end, and one that is killed may come to its end before.
    plain.check_chain(setup, tmp_path / "run", faults, options=options, reseed=draw.random() < 0.5, must_fire=False)
