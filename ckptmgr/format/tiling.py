"""Whether the shards of a tensor make the whole: in time that grows with their number alone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from random import Random

__all__ = ["MAX_CUT_DIMS", "covers_once"]

MAX_CUT_DIMS = 8
"""A dimension of a mesh cuts one dimension of a tensor, and meshes have few."""

_PRIME = 2**61 - 1


def covers_once(whole: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Say whether boxes cover a whole, each element once.

    How often elements are covered follows from the corners of the boxes alone: with the sign of its parity, each corner
    of the whole is left over, and all others cancel out. A box in d dimensions has 2^d corners, so they are not listed,
    but drawn: each edge of each dimension gets a random number, and a box the product, over its dimensions, of the
    difference of its two, which is the signed sum of its corners. Boxes that do not cover the whole add up to its
    number in one of 2^58 draws, and whoever made them up cannot know the draw.

    Args:
        whole: Shape of the whole.
        boxes: Offset and shape of each, within the whole.

    Returns:
        Whether they do; False too where they cut more than `MAX_CUT_DIMS` dimensions.
    """
    cut = [dim for dim, size in enumerate(whole) if any(shape[dim] != size for _, shape in boxes)]
    if len(cut) > MAX_CUT_DIMS:
        return False
    random = Random(secrets.randbits(128))
    numbers: dict[tuple[int, int], int] = {}

    def edge(dim: int, place: int) -> int:
        if (dim, place) not in numbers:
            numbers[dim, place] = random.randrange(_PRIME)
        return numbers[dim, place]

    def number(offset: Sequence[int], shape: Sequence[int]) -> int:
        product = 1
        for dim in cut:
            product = product * (edge(dim, offset[dim] + shape[dim]) - edge(dim, offset[dim])) % _PRIME
        return product

    return sum(number(*box) for box in boxes) % _PRIME == number((0,) * len(whole), whole)
