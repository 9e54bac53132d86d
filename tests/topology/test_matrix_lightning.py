"""Saved on one topology, resumed on another, with Lightning: real processes that torchrun starts, over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
from cells import TOLERANCE, loss_difference
from launches import Failure
from lightning.pytorch.strategies import FSDPStrategy
from matrix import NOT_WHOLE, WRITES, Matrix, differing_cells, write_record
from topologies import TOPOLOGIES

# The first tests wait for their launches.
pytestmark = pytest.mark.timeout(900)

# Lightning has no strategy for nn.DataParallel.
NAMES = [name for name in TOPOLOGIES if name != "dp"]
ACROSS = [(saved, resumed) for resumed in NAMES for saved in NAMES if saved != resumed]


def fsdp_refusal(strategy: Any) -> str:
    """Return with which words Lightning refuses FSDP on the CPU."""
    with pytest.raises(ValueError) as caught:
        L.Trainer(accelerator="cpu", devices=2, strategy=strategy)
    return str(caught.value)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    found = Matrix("train_lightning.py", NAMES, tmp_path_factory.mktemp("matrix"))
    yield found
    write_record(
        "lightning", found, {"lightning": L.__version__}, notes=[f"Lightning's `FSDPStrategy`: {fsdp_refusal('fsdp')}"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_topology_trains_to_the_losses_of_one_process(matrix: Matrix, name: str) -> None:
    one, other = matrix.saved("one"), matrix.saved(name)
    assert not isinstance(one, Failure), one
    assert not isinstance(other, Failure), other
    assert loss_difference(one, other) <= TOLERANCE
    assert other["is_tied"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_topology_goes_on_bit_for_bit(matrix: Matrix, name: str) -> None:
    cell = matrix.cell(name, name)
    assert not cell.problems, "\n".join(cell.problems)


@pytest.mark.parametrize(("saved", "resumed"), ACROSS)
def test_another_topology_goes_on_with_the_same_state(matrix: Matrix, saved: str, resumed: str) -> None:
    cell = matrix.cell(saved, resumed)
    assert not cell.problems, "\n".join(cell.problems)


def test_the_record_says_what_was_found_now(matrix: Matrix) -> None:
    if not matrix.is_complete:
        pytest.skip(NOT_WHOLE)
    if WRITES in os.environ:
        pytest.skip("the record is being written")
    assert differing_cells("lightning", matrix) == [], "`make matrix` writes the record anew"


@pytest.mark.parametrize("make", [lambda: "fsdp", FSDPStrategy], ids=["name", "instance"])
def test_lightnings_fsdp_needs_a_gpu_so_it_is_not_in_the_matrix(make: Callable[[], Any]) -> None:
    assert "The strategy `fsdp` requires a GPU accelerator" in fsdp_refusal(make())
