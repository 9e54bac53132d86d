"""Cover every pair of values of any two factors with few rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["pairwise"]

Row = dict[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]], *, is_possible: Callable[[Row], bool] = lambda row: True, seed: int = 0
) -> list[Row]:
    """Return rows such that each possible pair of values stands in one of them. The same for the same arguments.

    Greedy: of some random rows around a pair that is still missing, the one that covers the most missing pairs.

    Args:
        factors: Values by factor.
        is_possible: Says whether a complete row makes sense.
        seed: Of the random choices.
    """
    draw = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows: list[Row] = []
    while missing:
        wanted = min(missing)
        best: dict[str, int] = {}
        gain = 0
        for _ in range(60):
            choice = {name: draw.randrange(len(factors[name])) for name in names}
            choice.update(wanted)
            covers = len(missing & _pairs(choice))
            if covers > gain and is_possible(_row(factors, choice)):
                best, gain = choice, covers
        if not best:
            # No row with this pair is possible, or none was found: then it is not a pair to cover.
            missing.discard(wanted)
            continue
        missing -= _pairs(best)
        rows.append(_row(factors, best))
    return rows


def _pairs(choice: Mapping[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    return set(itertools.combinations(choice.items(), 2))


def _row(factors: Mapping[str, Sequence[Any]], choice: Mapping[str, int]) -> Row:
    return {name: factors[name][index] for name, index in choice.items()}
