"""Killed at any point and started again, `CheckpointManager` gives the uninterrupted run, bit by bit."""

from __future__ import annotations

import pytest
from cases import Case, lightning_cases
from runner import Runner

CASES = lightning_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(lightning: Runner, case: Case) -> None:
    log = lightning.check_case(case)
    assert "not exact" not in log.replace("perhaps not exact", ""), log
