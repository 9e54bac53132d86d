"""Checks of what a user hands to a policy: at construction, before any hour of training is spent."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Literal, TypeAlias

from ckptmgr.errors import UsageError

__all__ = [
    "Mode",
    "check_metric",
    "check_metrics",
    "check_mode",
    "check_state",
    "check_step",
    "check_switch",
    "is_better",
    "whole_number",
]

Mode: TypeAlias = Literal["min", "max"]


def whole_number(value: object, *, of: str, unit: str) -> int:
    """Return a count of at least 1 as a plain int.

    Args:
        value: What the user gave. Integers of NumPy count; booleans and floats do not, whatever their value.
        of: The policy and argument, for the message: ``EverySteps(n)``.
        unit: What is counted, for the message.

    Raises:
        UsageError: It is not a whole number of at least 1.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(
            f"{of} was given {value!r}",
            why=f"it counts {unit}, so it is a whole number, not a {type(value).__name__}",
            next="give a whole number of at least 1",
        ) from error
    if number < 1:
        raise UsageError(
            f"{of} was given {number}",
            why=f"it counts {unit}, and fewer than 1 has no meaning here",
            next="give a whole number of at least 1, or leave the policy out",
        )
    return number


def check_switch(value: object, *, of: str) -> bool:
    """Return what is either on or off.

    Raises:
        UsageError: It is neither True nor False. Text is not read: ``"no"`` would count as true.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{of}={value!r}", why=f"it is True or False, not a {type(value).__name__}")
    return value


def check_metric(metric: object, *, of: str) -> str:
    """Return the name of a metric.

    Raises:
        UsageError: It is not a name.
    """
    if not isinstance(metric, str) or not metric:
        raise UsageError(
            f"{of} was given the metric {metric!r}",
            why="a metric is named by a string that is not empty",
            next="give the name under which the metric is logged, such as 'val_loss'",
        )
    return metric


def check_mode(mode: object, *, of: str) -> Mode:
    """Return the direction in which a metric is better.

    Raises:
        UsageError: Neither ``"min"`` nor ``"max"``.
    """
    if mode == "min":
        return "min"
    if mode == "max":
        return "max"
    raise UsageError(
        f"{of} was given mode={mode!r}",
        why="a metric is better when it is smaller ('min') or larger ('max'); there is no third way",
        next="use mode='min' for a loss, mode='max' for an accuracy",
    )


def is_better(value: float, than: float, mode: Mode) -> bool:
    """Say whether a value beats another strictly. NaN beats nothing, and everything but NaN beats NaN."""
    if math.isnan(value):
        return False
    if math.isnan(than):
        return True
    return value < than if mode == "min" else value > than


def check_metrics(metrics: object) -> dict[str, float]:
    """Return metrics as plain floats. Tensors and NumPy numbers of one element count; None is no metric.

    Raises:
        UsageError: They are not names with a number each.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UsageError(f"metrics={metrics!r}", why="it is a dict of names and numbers", next="metrics={'loss': 0.5}")
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        check_metric(name, of="metrics")
        # A loss as it comes from forward: torch warns when a tensor with a gradient is converted.
        detached = value.detach() if hasattr(value, "detach") else value
        try:
            if isinstance(value, str | bytes):
                raise TypeError(f"{value!r} is text")
            numbers[name] = float(detached)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UsageError(
                f"the metric {name!r} is no number but a {type(value).__name__}", why=str(error), next="give one number"
            ) from error
    return numbers


def check_state(state: object, *, reserved: str) -> dict[str, object]:
    """Return the objects of a state by name.

    Args:
        state: What the user gave.
        reserved: Beginning of the names that are the manager's own.

    Raises:
        UsageError: It is no dict, it is empty, or a name cannot be used.
    """
    example = 'for example state={"model": model, "optimizer": optimizer}'
    if not isinstance(state, Mapping) or not state:
        what = "state is empty" if isinstance(state, Mapping) else f"state is a {type(state).__name__}"
        raise UsageError(what, why="it is a dict: a name for each object that is saved", next=example)
    for name in state:
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise UsageError(f"state has the name {name!r}", why="names are text that can be printed", next=example)
        if name.startswith(reserved):
            raise UsageError(
                f"state has the reserved name {name!r}",
                why=f"those with {reserved} are the manager's own",
                next=example,
            )
    return dict(state)


def check_step(step: object, *, after: int) -> int:
    """Return the number of a step that is not before ``after``. Integers of NumPy and torch count.

    Raises:
        UsageError: It is no whole number, or it goes back.
    """
    number = None
    if not isinstance(step, bool) and hasattr(step, "__index__"):
        number = operator.index(step)
    if number is None or number < after:
        raise UsageError(
            f"step({step!r}) after step {after}",
            why="steps are whole numbers that count optimizer updates and never go back",
            next="continue from the number that resume() or restore() returned",
        )
    return number
