"""Tensors in units that are renamed together: a module's tensors, in all layers in which it occurs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.name_words import split_name

__all__ = ["Alignment", "Shape", "Unit", "align", "as_it_is", "as_units", "turned", "without_rows"]

Shape: TypeAlias = tuple[int, ...]
Numbers: TypeAlias = tuple[str, ...]


@dataclass(slots=True)
class Unit:
    """A module's tensors, in all layers.

    Attributes:
        skeleton: The parts of its name, with ``*`` for numbers.
        tensors: Numbers → leaf → the tensor.
        position: Of its first tensor among those of the whole model, from 0 to 1.
    """

    skeleton: tuple[str, ...]
    tensors: dict[Numbers, dict[str, TensorFacts]] = field(default_factory=dict)
    position: float = 0.0

    @property
    def nstars(self) -> int:
        """How many numbers its names have."""
        return self.skeleton.count("*")

    def signature(self, shape_of: Callable[[Shape], Shape]) -> tuple[object, ...]:
        """Return what two units must have in common to be the same: leaves and shapes, of any of its layers."""
        shapes: dict[str, set[Shape]] = defaultdict(set)
        for leaves in self.tensors.values():
            for leaf, tensor in leaves.items():
                shapes[leaf].add(shape_of(tensor.shape))
        return (self.nstars, tuple(sorted((leaf, tuple(sorted(found))) for leaf, found in shapes.items())))

    def __str__(self) -> str:
        return ".".join(self.skeleton) or "the model's own tensors"


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which layers of two units are the same.

    Attributes:
        layers: Numbers in the file and in the model.
        is_same: The numbers are the same.
        is_whole: No layer is left over on either side.
    """

    layers: tuple[tuple[Numbers, Numbers], ...]
    is_same: bool
    is_whole: bool


def as_it_is(shape: Shape) -> Shape:
    """Return a shape."""
    return shape


def without_rows(shape: Shape) -> Shape:
    """Return a shape in which tables of different lengths are alike."""
    return (-1, *shape[1:]) if shape else shape


def turned(shape: Shape) -> Shape:
    """Return a shape in which a matrix and its transposed one are alike."""
    return tuple(sorted(shape)) if len(shape) == 2 else shape


def as_units(tensors: Sequence[TensorFacts], *, whole: Mapping[str, float], nstars: int) -> list[Unit]:
    """Put tensors into units, in their order.

    Args:
        tensors: Those that are looked at.
        whole: Positions of all tensors of the model by name, from 0 to 1.
        nstars: How many numbers of a name, from the first on, do not make it another unit.
    """
    units: dict[tuple[str, ...], Unit] = {}
    for tensor in tensors:
        split = split_name(tensor.name)
        numbers = split.numbers
        skeleton = split.skeleton
        if len(numbers) > nstars:
            given = iter(enumerate(numbers))
            parts = (next(given) if part == "*" else (0, part) for part in skeleton)
            skeleton = tuple("*" if part.isdecimal() and n < nstars else part for n, part in parts)
            numbers = numbers[:nstars]
        unit = units.get(skeleton)
        if unit is None:
            unit = units[skeleton] = Unit(skeleton, position=whole.get(tensor.name, 0.0))
        # `q_weight` and `q.weight` beside each other would be one leaf: the second is left alone.
        unit.tensors.setdefault(numbers, {}).setdefault(split.leaf, tensor)
    return list(units.values())


def align(saved: Unit, live: Unit, shape_of: Callable[[Shape], Shape]) -> Alignment | None:
    """Return which layers of two units are the same; None if they cannot be, or if nothing tells which."""
    if saved.nstars != live.nstars:
        return None
    mine, others = _shapes(saved, shape_of), _shapes(live, shape_of)
    common = [numbers for numbers in mine if numbers in others]
    if common and (len(common) == len(mine) or len(common) == len(others)):
        if any(mine[numbers] != others[numbers] for numbers in common):
            return None
        return Alignment(tuple((it, it) for it in common), True, len(mine) == len(others) == len(common))
    if len(mine) != len(others):
        return None
    first, second = _in_order(mine), _in_order(others)
    if any(mine[one] != others[other] for one, other in zip(first, second, strict=True)):
        return None
    return Alignment(tuple(zip(first, second, strict=True)), False, True)


def _shapes(unit: Unit, shape_of: Callable[[Shape], Shape]) -> dict[Numbers, dict[str, Shape]]:
    return {
        numbers: {leaf: shape_of(tensor.shape) for leaf, tensor in leaves.items()}
        for numbers, leaves in unit.tensors.items()
    }


def _in_order(layers: Iterable[Numbers]) -> list[Numbers]:
    return sorted(layers, key=lambda numbers: tuple(map(int, numbers)))
