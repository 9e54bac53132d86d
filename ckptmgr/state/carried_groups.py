"""Which groups of the checkpoint a live optimizer's groups come from, for what is kept by group: schedules.

An LR scheduler keeps a list with a value for each group. Where the groups have changed places, or were split or merged,
such a list is put into the live order; else the base rate of one group would become that of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

__all__ = ["note_sources", "regrouped", "sources_of"]

PER_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})

# Noted when an optimizer is checked, which is before anything is restored.
_SOURCES: WeakKeyDictionary[Optimizer, tuple[int, tuple[int | None, ...]]] = WeakKeyDictionary()


def note_sources(optimizer: Optimizer, nsaved: int, sources: Sequence[int | None]) -> None:
    """Remember where the groups of an optimizer come from.

    Args:
        optimizer: The live optimizer.
        nsaved: Number of groups in the checkpoint.
        sources: For each live group the index of the checkpoint's, or None.
    """
    _SOURCES[optimizer] = (nsaved, tuple(sources))


def sources_of(optimizer: object, nsaved: int) -> tuple[int | None, ...] | None:
    """Return what was noted; None where nothing was, or of a checkpoint with another number of groups."""
    noted = _SOURCES.get(optimizer) if isinstance(optimizer, Optimizer) else None
    return noted[1] if noted is not None and noted[0] == nsaved else None


def regrouped(state: Mapping[str, Any], nsaved: int, sources: Sequence[int | None]) -> dict[str, Any]:
    """Return a scheduler's state or options with a value for each live group, also of the schedulers inside of it.

    Args:
        state: By name; not changed.
        nsaved: Number of groups in the checkpoint.
        sources: For each live group the index of the checkpoint's; none of them is None.
    """
    result = dict(state)
    for key, value in state.items():
        if key in PER_GROUP and isinstance(value, (list, tuple)) and len(value) == nsaved:
            result[key] = type(value)(value[source] for source in sources if source is not None)
        elif key in ("_schedulers", "schedulers") and isinstance(value, (list, tuple)):
            result[key] = type(value)(regrouped(inner, nsaved, sources) for inner in value)
        elif key == "options" and isinstance(value, Mapping):
            result[key] = regrouped(value, nsaved, sources)
    return result
