"""The judge of a cell sees whatever a resume could get wrong; and the README shows what the judge found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import TOLERANCE, judge
from launches import Failure
from table import BEGIN, README, RECORD, render, with_table
from topologies import TOPOLOGIES, digest

# Steps 1 to 5 are an epoch of 40 samples, in batches of 8.
BATCHES = {step: list(range((step - 1) % 5 * 8, (step - 1) % 5 * 8 + 8)) for step in range(1, 7)}


def a_run(steps: range, moments: list[str], ranks: int = 2) -> dict[str, Any]:
    states = {
        moment: {"weight": torch.arange(4.0), "weight/exp_avg": torch.full((4,), 0.5), "progress": torch.ones(3)}
        for moment in moments
    }
    digests = {moment: digest(state) for moment, state in states.items()}
    return {
        "states": states,
        "is_tied": True,
        "losses": {step: 5.0 - step / 10 for step in steps},
        "rates": {step: [0.1 / step] for step in steps},
        "ranks": [
            {
                "data_rank": rank,
                "samples": {step: BATCHES[step][rank::ranks] for step in steps},
                "draws": {step: rank + step / 100 for step in steps},
                "digests": dict(digests),
            }
            for rank in range(ranks)
        ],
    }


SAVED = a_run(range(1, 7), ["saved", "final"])
RESUMED = a_run(range(4, 7), ["restored", "final"])


def swap_moments(run: dict[str, Any]) -> None:
    run["states"]["restored"]["weight/exp_avg"] = run["states"]["restored"]["weight"].clone()


def lose_a_name(run: dict[str, Any]) -> None:
    del run["states"]["restored"]["progress"]


def add_a_name(run: dict[str, Any]) -> None:
    run["states"]["restored"]["more"] = torch.zeros(1)


def cast(run: dict[str, Any]) -> None:
    run["states"]["restored"]["weight"] = run["states"]["restored"]["weight"].double()


def negate_a_zero(run: dict[str, Any]) -> None:
    run["states"]["restored"]["weight"][0] = -0.0


def untie(run: dict[str, Any]) -> None:
    run["is_tied"] = False


def stop_early(run: dict[str, Any]) -> None:
    del run["losses"][6]


def repeat_a_sample(run: dict[str, Any]) -> None:
    run["ranks"][1]["samples"][4] = run["ranks"][0]["samples"][4]


def begin_the_epoch_again(run: dict[str, Any]) -> None:
    for rank, part in enumerate(run["ranks"]):
        part["samples"] = {step: BATCHES[step - 3][rank::2] for step in part["samples"]}


def forget_the_schedule(run: dict[str, Any]) -> None:
    run["rates"][4] = [0.1]


def go_astray(run: dict[str, Any]) -> None:
    run["losses"][6] += 10 * TOLERANCE


def restore_rank_0_only(run: dict[str, Any]) -> None:
    run["ranks"][1]["digests"]["restored"] = "another"


WRONG = [
    swap_moments,
    lose_a_name,
    add_a_name,
    cast,
    negate_a_zero,
    untie,
    stop_early,
    repeat_a_sample,
    begin_the_epoch_again,
    forget_the_schedule,
    go_astray,
    restore_rank_0_only,
]


def differ_a_little(run: dict[str, Any]) -> None:
    run["losses"][6] += TOLERANCE / 10


def end_otherwise(run: dict[str, Any]) -> None:
    run["states"]["final"]["weight"] += 1e-7


def draw_otherwise(run: dict[str, Any]) -> None:
    run["ranks"][1]["draws"][5] = 0.0


def exchange_ranks(run: dict[str, Any]) -> None:
    first, second = run["ranks"]
    first["samples"], second["samples"] = second["samples"], first["samples"]


@pytest.mark.parametrize("is_same", [True, False])
def test_a_resume_that_goes_on_is_well(is_same: bool) -> None:
    cell = judge(SAVED, RESUMED, is_same=is_same)
    assert cell.problems == ()
    assert cell.loss_difference == 0.0


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_seen(spoil: Callable[[dict[str, Any]], None], is_same: bool) -> None:
    run = copy.deepcopy(RESUMED)
    spoil(run)
    assert judge(SAVED, run, is_same=is_same).problems


@pytest.mark.parametrize(
    "spoil", [differ_a_little, end_otherwise, draw_otherwise, exchange_ranks], ids=lambda spoil: spoil.__name__
)
def test_what_only_another_topology_may_do_is_seen_on_the_same(spoil: Callable[[dict[str, Any]], None]) -> None:
    run = copy.deepcopy(RESUMED)
    spoil(run)
    assert judge(SAVED, run, is_same=False).problems == ()
    assert judge(SAVED, run, is_same=True).problems


def test_another_number_of_ranks_may_share_the_samples_otherwise() -> None:
    on_four = a_run(range(4, 7), ["restored", "final"], ranks=4)
    assert judge(SAVED, on_four, is_same=False).problems == ()


def test_a_failure_names_its_error() -> None:
    cell = judge(SAVED, Failure("TopologyError: no", "Traceback"), is_same=True)
    assert cell.problems[0] == "the resume failed: TopologyError: no"
    assert cell.loss_difference is None


def test_the_readme_shows_what_the_record_says() -> None:
    text = README.read_text()
    titles = {name: topology.title for name, topology in TOPOLOGIES.items()}
    assert text.count(BEGIN) == 1
    assert with_table(text, render(json.loads(RECORD.read_text()), titles)) == text, "`make matrix` writes it anew"


def test_a_table_has_a_footnote_for_each_problem() -> None:
    well, bad = (
        {"is_well": True, "loss_difference": 4.8e-7},
        {"is_well": False, "loss_difference": None, "problem": "x"},
    )
    face = {
        "date": "2000-01-01",
        "versions": {"torch": "2"},
        "notes": ["n"],
        "cells": {"a": {"a": well, "b": bad}, "b": {"a": well, "b": bad}},
    }
    lines = render({"plain": face}, {"a": "A", "b": "B"}).splitlines()
    assert lines[0].endswith("2 of 4 are well.")
    assert lines[-5:] == ["| A | identical | ✗1 |", "| B | 4.8e-07 | ✗1 |", "", "- ✗1: x", "- n"]
