"""Which parameters' state a live optimizer takes from a checkpoint, and which groups' options: decided by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ckptmgr.errors import StateMismatchError

__all__ = ["LIVE_FLAGS", "LIVE_OPTIONS", "Carry", "GroupNames", "listed_names", "plan_carry", "same_value"]

GroupNames: TypeAlias = Sequence[Sequence[str]]
"""Names of the parameters of each group, in the order of the group."""

LIVE_FLAGS = ("fused", "foreach", "capturable", "differentiable")
"""Options that say how the live optimizer computes on its devices; they stay as they are."""

LIVE_OPTIONS = (*LIVE_FLAGS, "name")
"""What no checkpoint changes: how the live optimizer computes, and what the program calls a group."""

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Carry:
    """What becomes of the state when a live optimizer takes it over.

    Attributes:
        carried: Parameters that both have: their state goes on.
        initialised: Parameters that only the live optimizer has: their state stays as it is, which is mostly empty.
        dropped: Parameters that only the checkpoint has.
        sources: For each live group, the index of the group of the checkpoint whose options it takes; None where it
            holds new parameters only and keeps its own.
        mixed: Sentences about live groups that hold parameters of groups with different options.
        is_in_place: The groups are the same, in the same order.
    """

    carried: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]
    sources: tuple[int | None, ...]
    mixed: tuple[str, ...]
    is_in_place: bool

    @property
    def is_complete(self) -> bool:
        """Nothing is initialised, nothing is dropped."""
        return not self.initialised and not self.dropped

    def __str__(self) -> str:
        total = len(self.carried) + len(self.initialised)
        parts = [f"carried by name for {len(self.carried)} of {total} parameters"]
        if self.initialised:
            parts.append(f"initialised for {listed_names(self.initialised)}, which the checkpoint has not")
        if self.dropped:
            parts.append(f"dropped for {listed_names(self.dropped)}, which the live optimizer has not")
        return "; ".join(parts)


def listed_names(names: Sequence[str]) -> str:
    """Return how many names there are, and the first few: ``2 (a, b)``."""
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"{len(names)} ({shown})"


def plan_carry(
    tree: Mapping[str, Any], live_group_param_names: GroupNames, *, follows_live: Iterable[str] = ()
) -> Carry:
    """Match the parameters of a checkpoint's optimizer with those of a live one.

    A live group takes the options of the group that most of its parameters were in; of the first one of several.

    Args:
        tree: State by name.
        live_group_param_names: The names of each live group's parameters, in its order.
        follows_live: Options that stay as they are in any case, beside `LIVE_OPTIONS`.

    Raises:
        StateMismatchError: The state fits only the same list of parameters, and this is another; or no parameter is in
            both.
    """
    saved_groups = tree["groups"]
    saved_orders = [list(group["params"]) for group in saved_groups]
    live_orders = [list(names) for names in live_group_param_names]
    _check_list(tree, saved_orders, live_orders)
    before = {name: index for index, names in enumerate(saved_orders) for name in names}
    live_names = [name for names in live_orders for name in names]
    carried = [name for name in live_names if name in before]
    known = set(live_names)
    if before and live_names and not carried:
        raise StateMismatchError(
            "no parameter of the live optimizer is in the checkpoint's",
            why=f"the live one has {listed_names(live_names)}, the checkpoint's {listed_names(list(before))}: "
            "no state would be carried over",
            next="call the entries and the layers as in the run that saved; to train other parameters, start a new run "
            "from these weights",
        )
    sources: list[int | None] = []
    mixed: list[str] = []
    # An empty group has no parameter to go by.
    empty = iter([index for index, names in enumerate(saved_orders) if not names])
    skipped = {*LIVE_OPTIONS, *follows_live}
    for position, names in enumerate(live_orders):
        counts = Counter(before[name] for name in names if name in before)
        source = min(counts, key=lambda index: (-counts[index], index)) if counts else None
        sources.append(next(empty, None) if not names else source)
        if source is not None:
            mixed.extend(_mixed(position, source, counts, saved_groups, skipped))
    return Carry(
        carried=tuple(carried),
        initialised=tuple(name for name in live_names if name not in before),
        dropped=tuple(name for name in before if name not in known),
        sources=tuple(sources),
        mixed=tuple(mixed),
        is_in_place=saved_orders == live_orders,
    )


def same_value(one: Any, other: Any) -> bool:
    """Say whether two options are equal; a tensor of one element is its number."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same_value(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        first, second = torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu()
        return first.numel() == second.numel() and bool((first.reshape(-1) == second.reshape(-1)).all())
    return bool(one == other)


def _mixed(
    position: int,
    source: int,
    counts: Mapping[int, int],
    saved_groups: Sequence[Mapping[str, Any]],
    skipped: Iterable[str],
) -> Iterable[str]:
    taken = saved_groups[source]
    for index in sorted(counts.keys() - {source}):
        other = saved_groups[index]
        differing = [
            key
            for key in taken
            if key != "params" and key not in skipped and not (key in other and same_value(taken[key], other[key]))
        ]
        if differing:
            values = ", ".join(f"{key}={_shown(taken[key])} and not {_shown(other.get(key))}" for key in differing)
            yield (
                f"group {position} mixes parameters of the checkpoint's groups {source} ({counts[source]}) and "
                f"{index} ({counts[index]}): it goes on with the options of group {source}, {values}"
            )


def _shown(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _check_list(tree: Mapping[str, Any], saved: list[list[str]], live: list[list[str]]) -> None:
    if not (tree["positional"] or tree["flat"]) or saved == live:
        return
    raise StateMismatchError(
        "the optimizer of the checkpoint has another list of parameters than the live one",
        why="its state belongs to all parameters together, in their order; " + _list_difference(saved, live)
        if tree["flat"]
        else f"its parameters have no names, only positions: {_sizes(saved)} in the checkpoint, {_sizes(live)} now",
        next="build the optimizer over the same parameters in the same order"
        if tree["flat"]
        else "build the same groups; for names, put the module into the state, or give the optimizer "
        "module.named_parameters()",
    )


def _list_difference(saved: list[list[str]], live: list[list[str]]) -> str:
    before, now = ([name for names in groups for name in names] for groups in (saved, live))
    lines = []
    for label, names in (
        ("only the live one has", [name for name in now if name not in set(before)]),
        ("only the checkpoint's has", [name for name in before if name not in set(now)]),
    ):
        if names:
            lines.append(f"{label} {', '.join(names)}")
    if not lines:
        lines.append("their order or their groups differ")
    return "; ".join(lines)


def _sizes(groups: Iterable[Sequence[str]]) -> str:
    return "groups of " + ", ".join(str(len(names)) for names in groups)
