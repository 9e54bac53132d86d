"""What a cell of the matrix is worth: a resumed training beside the run that it went on with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jobs import END, SAVE_AT
from launches import Failure
from model import GLOBAL_BATCH, SAMPLES

__all__ = ["TOLERANCE", "Cell", "judge", "loss_difference"]

TOLERANCE = 1e-5
"""By how much losses may differ between topologies, absolutely: they are sums of the same numbers in another order.

Losses lie between 4 and 6, where neighbouring float32 numbers are 4.8e-7 apart; by two such distances uninterrupted
runs of different topologies differ. With moments or weights that were not restored, they differ by more than 1e-2.
"""

AFTER = range(SAVE_AT + 1, END + 1)


@dataclass(frozen=True)
class Cell:
    """The outcome of one resume.

    Attributes:
        problems: What is not as it has to be; empty if all is well.
        loss_difference: The largest difference of a loss to the uninterrupted run's; None if it did not get that far.
    """

    problems: tuple[str, ...]
    loss_difference: float | None = None


def judge(saved: dict[str, Any] | Failure, resumed: dict[str, Any] | Failure, *, is_same: bool) -> Cell:
    """Compare a resume with the run that it went on with, which was not interrupted after its save.

    Args:
        saved: What that run found.
        resumed: What the resume found.
        is_same: Both have the same topology: everything has to be the same, bit for bit. Else the state that was
            restored has to be, and what is trained from there only nearly.
    """
    for which, found in (("the run that saves", saved), ("the resume", resumed)):
        if isinstance(found, Failure):
            return Cell((f"{which} failed: {found.first_line}", found.report))
    assert isinstance(saved, dict)
    assert isinstance(resumed, dict)
    problems = [f"restored: {line}" for line in _differences(saved["states"]["saved"], resumed["states"]["restored"])]
    problems += _disagreements(resumed)
    if saved["is_tied"] != resumed["is_tied"]:
        problems.append("embedding and head are tied in one of the two only")
    if sorted(resumed["losses"]) != list(AFTER):
        problems.append(f"the steps {sorted(resumed['losses'])} were trained, and not {list(AFTER)}")
        return Cell(tuple(problems))
    problems += [f"samples: {line}" for line in _sample_problems(saved, resumed)]
    if _after(saved["rates"]) != resumed["rates"]:
        problems.append(f"learning rates are {resumed['rates']}, and were {_after(saved['rates'])}")
    difference = loss_difference(saved, resumed)
    if is_same:
        problems += [
            f"at the end: {line}" for line in _differences(saved["states"]["final"], resumed["states"]["final"])
        ]
        if difference:
            problems.append(f"losses are {resumed['losses']}, and were {_after(saved['losses'])}")
        for rank, (then, now) in enumerate(zip(saved["ranks"], resumed["ranks"], strict=True)):
            if _after(then["samples"]) != now["samples"]:
                problems.append(f"rank {rank} trained {now['samples']}, and {_after(then['samples'])} before")
            if _after(then["draws"]) != now["draws"]:
                problems.append(f"rank {rank} drew other random numbers")
    elif difference > TOLERANCE:
        problems.append(f"losses differ by up to {difference:.1e}: {resumed['losses']}, were {_after(saved['losses'])}")
    return Cell(tuple(problems), difference)


def loss_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between the losses of the steps after the save."""
    return max(abs(one["losses"][step] - other["losses"][step]) for step in AFTER)


def _after(by_step: Mapping[int, Any]) -> dict[int, Any]:
    return {step: by_step[step] for step in AFTER}


def _differences(then: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if missing := sorted(then.keys() - now.keys()):
        yield f"missing are {', '.join(missing)}"
    if new := sorted(now.keys() - then.keys()):
        yield f"new are {', '.join(new)}"
    for name in sorted(then.keys() & now.keys()):
        a, b = then[name], now[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name} is {b.dtype} {tuple(b.shape)}, and was {a.dtype} {tuple(a.shape)}"
        elif a.contiguous().numpy().tobytes() != b.contiguous().numpy().tobytes():
            yield f"{name} has other values, by up to {(a - b).abs().max().item():.1e}"


def _disagreements(found: dict[str, Any]) -> Iterator[str]:
    """Yield the moments at which not all ranks have the same whole state; what was compared is rank 0's."""
    for moment, first in found["ranks"][0]["digests"].items():
        others = [rank for rank, part in enumerate(found["ranks"]) if part["digests"][moment] != first]
        if others:
            yield f"{moment}: ranks {others} have another state than rank 0"


def _sample_problems(saved: dict[str, Any], resumed: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the order of samples: steps 1 to 5 are an epoch, of which two are trained after it."""
    before = _samples_by_step(saved)
    steps = {step: before[step] for step in range(1, SAVE_AT + 1)} | _samples_by_step(resumed)
    for step, numbers in steps.items():
        if len(numbers) != GLOBAL_BATCH:
            yield f"step {step} has {len(numbers)} of them"
        if sorted(numbers) != sorted(before[step]):
            yield f"step {step} trained {sorted(numbers)}, and {sorted(before[step])} in the uninterrupted run"
    epoch = Counter(number for step in range(1, SAMPLES // GLOBAL_BATCH + 1) for number in steps[step])
    if epoch != Counter(range(SAMPLES)):
        yield f"the epoch trained these more than once: {sorted(n for n in epoch if epoch[n] > 1)}"


def _samples_by_step(found: dict[str, Any]) -> dict[int, list[int]]:
    """Return the samples of each step, on all ranks together; ranks that take the same part count once."""
    parts = {rank["data_rank"]: rank["samples"] for rank in found["ranks"]}
    for rank in found["ranks"]:
        assert rank["samples"] == parts[rank["data_rank"]], "ranks of one part of the data trained different samples"
    return {step: [number for part in parts.values() for number in part[step]] for step in found["losses"]}
