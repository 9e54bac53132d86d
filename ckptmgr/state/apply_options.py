"""Put changed options into restored optimizers and schedulers: the schedule goes on as the live program has it.

What comes out is the learning rate that a run of the live program would have at this point of its schedule:

=================================  =====================================================================================
scheduler                          what happens
=================================  =====================================================================================
none                               the rate is set; one that the loop has changed by hand is scaled in proportion
StepLR, MultiStepLR, ConstantLR,   the closed form of the schedule at this point, with the live program's options: the
LinearLR, ExponentialLR,           rate now and at every later step is that of a run from the beginning
PolynomialLR, CosineAnnealingLR
LambdaLR, CyclicLR, OneCycleLR,    the same: these compute every rate from their options and the point
CosineAnnealingWarmRestarts        (momentum that is cycled with the rate, too)
SequentialLR                       that of the scheduler whose turn it is; changed milestones give the turns anew
ChainedScheduler, and several      each one's share of the rate is replaced
schedulers of one optimizer
ReduceLROnPlateau                  reductions so far are kept: the rate is scaled in proportion. Changed ``factor``,
                                   ``patience`` and the like count from now on; what they would have done earlier is
                                   not known
MultiplicativeLR, SWALR, any       the rate is scaled in proportion, other options count from the next step on
scheduler of the program's own
=================================  =====================================================================================

A rate that somebody else has changed besides (a loop that halves it by hand) keeps that: it is scaled by what the
schedule gives now over what it gave then. From 0 it cannot be scaled, and is set.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from ckptmgr.state.changed_options import LEARNING_RATE, OptionChange
from ckptmgr.state.optimizer import unwrap_optimizer

__all__ = ["apply_options"]

# Each of these computes the rate from its options and the point alone, not from the rate of the step before.
_DIRECT = (LambdaLR, CyclicLR, OneCycleLR, CosineAnnealingWarmRestarts)
_WITHOUT_CLOSED_FORM = (ArithmeticError, ValueError, LookupError)


def apply_options(objects: Mapping[str, object], changes: Sequence[OptionChange]) -> None:
    """Put changed options into objects that were just restored.

    Args:
        objects: The live optimizers and schedulers by entry, restored.
        changes: What `changed_options` found; all of them are applied.
    """
    schedulers = {entry: value for entry, value in objects.items() if isinstance(value, LRScheduler)}
    optimizers: dict[int, tuple[str | None, Optimizer]] = {}
    for scheduler in schedulers.values():
        optimizers[id(scheduler.optimizer)] = (None, scheduler.optimizer)
    for entry, value in objects.items():
        optimizer = unwrap_optimizer(value)
        if isinstance(optimizer, Optimizer):
            optimizers[id(optimizer)] = (entry, optimizer)
    for name, optimizer in optimizers.values():
        driven = {entry: s for entry, s in schedulers.items() if s.optimizer is optimizer}
        own = [change for change in changes if change.entry == name and change.group is not None]
        theirs = [change for change in changes if change.entry in driven]
        if own or theirs:
            _apply(optimizer, own, driven, theirs)


def _apply(
    optimizer: Optimizer, own: list[OptionChange], driven: Mapping[str, Any], theirs: list[OptionChange]
) -> None:
    groups = optimizer.param_groups
    rates = {change.group: change for change in own if change.option == LEARNING_RATE}
    before = [_number(group[LEARNING_RATE]) for group in groups]
    base = [_number(group.get("initial_lr", group[LEARNING_RATE])) for group in groups]
    old_base = [float(rates[i].was) if i in rates else value for i, value in enumerate(base)]
    new_base = [float(rates[i].now) if i in rates else value for i, value in enumerate(base)]
    then = _expected(driven.values(), old_base)
    for change in own:
        if change.option != LEARNING_RATE and change.group is not None:
            _put(groups[change.group], change.option, change.now)
    for index, change in rates.items():
        if index is not None and "initial_lr" in groups[index]:
            _put(groups[index], "initial_lr", change.now)
    for scheduler in _flat(driven.values()):
        own_base = getattr(scheduler, "base_lrs", None)
        if isinstance(own_base, list) and len(own_base) == len(groups):
            scheduler.base_lrs = [
                _scaled(value, old_base[i], new_base[i]) if i in rates else value for i, value in enumerate(own_base)
            ]
    for change in theirs:
        scheduler = driven[change.entry]
        for index in change.inner:
            scheduler = scheduler._schedulers[index]
        _put(vars(scheduler), change.option, change.now)
        if change.option in ("_milestones", "T_0", "T_mult"):
            _find_turn(scheduler)
    now = _expected(driven.values(), new_base)
    for group, rate, was, becomes in zip(groups, before, then, now, strict=True):
        _put(group, LEARNING_RATE, _scaled_number(rate, was, becomes))
    for scheduler in _flat(driven.values()):
        if hasattr(scheduler, "_last_lr"):
            scheduler._last_lr = [_copy(group[LEARNING_RATE]) for group in groups]


def _expected(schedulers: Iterable[Any], base: Sequence[float]) -> list[float]:
    """Return what the schedulers make of the base rates at the point where they stand."""
    acting = [leaf for scheduler in schedulers for leaf in _acting(scheduler)]
    if len(acting) == 1:
        return _rates(acting[0], base)
    rates = list(base)
    for leaf in acting:
        own = [_number(value) for value in getattr(leaf, "base_lrs", base)]
        shares = [rate / start if start else 0.0 for rate, start in zip(_rates(leaf, own), own, strict=True)]
        rates = [rate * share for rate, share in zip(rates, shares, strict=True)]
    return rates


def _acting(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers that shape the rate at this point."""
    if isinstance(scheduler, SequentialLR):
        turn = bisect_right(scheduler._milestones, scheduler.last_epoch)
        yield from _acting(scheduler._schedulers[turn])
    elif isinstance(scheduler, ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from _acting(inner)
    else:
        yield scheduler


def _rates(scheduler: Any, base: Sequence[float]) -> list[float]:
    kind = type(scheduler)
    is_direct = any(kind.get_lr is known.get_lr for known in _DIRECT)
    has_closed_form = hasattr(scheduler, "_get_closed_form_lr")
    if not (is_direct or has_closed_form):
        return list(base)
    flag, scheduler._get_lr_called_within_step = scheduler._get_lr_called_within_step, True
    try:
        found = scheduler.get_lr() if is_direct else scheduler._get_closed_form_lr()
    except _WITHOUT_CLOSED_FORM:
        # At this point the schedule itself cannot go on; its next step says why.
        return list(base)
    finally:
        scheduler._get_lr_called_within_step = flag
    return [_number(rate) for rate in found]


def _find_turn(scheduler: Any) -> None:
    """Give counters that follow from the options and the point the values that the live options give them."""
    if isinstance(scheduler, SequentialLR):
        starts = [0, *scheduler._milestones]
        turn = bisect_right(scheduler._milestones, scheduler.last_epoch)
        for index, inner in enumerate(scheduler._schedulers[: turn + 1]):
            # Each counts from its own first step, and stops where the next one takes over.
            end = scheduler.last_epoch if index == turn else starts[index + 1] - 1
            if not hasattr(inner, "_schedulers"):
                inner.last_epoch = max(end - starts[index], -1)
    if isinstance(scheduler, CosineAnnealingWarmRestarts):
        point, period = scheduler.last_epoch, scheduler.T_0
        while point >= period:
            point, period = point - period, period * scheduler.T_mult
        scheduler.T_cur, scheduler.T_i = point, period


def _flat(schedulers: Iterable[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))


def _scaled_number(value: float, was: float, becomes: float) -> float:
    # Step by step, a rate gathers rounding errors.
    is_expected = math.isclose(value, was, rel_tol=1e-6, abs_tol=1e-300)
    return becomes if is_expected or was == 0 else value * (becomes / was)


def _scaled(value: Any, was: float, becomes: float) -> Any:
    number = _scaled_number(_number(value), was, becomes)
    return torch.full_like(value, number) if isinstance(value, torch.Tensor) else number


def _put(owner: dict[str, Any], key: str, value: Any) -> None:
    live = owner.get(key)
    if isinstance(live, torch.Tensor) and isinstance(value, int | float):
        # In place: the program or a CUDA graph may hold this very tensor.
        with torch.no_grad():
            live.fill_(value)
    elif isinstance(live, Counter) and isinstance(value, list):
        owner[key] = Counter(value)
    elif isinstance(live, tuple) and isinstance(value, list):
        owner[key] = tuple(
            torch.full_like(old, new) if isinstance(old, torch.Tensor) else new
            for old, new in zip(live, value, strict=True)
        )
    else:
        owner[key] = value


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
