"""Killed at any point and started again, `Checkpointer` gives the uninterrupted run, bit by bit."""

from __future__ import annotations

import pytest
from cases import Case, plain_cases
from runner import Runner

CASES = plain_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(plain: Runner, case: Case) -> None:
    log = plain.check_case(case)
    assert "not exact" not in log.replace("perhaps not exact", ""), log
