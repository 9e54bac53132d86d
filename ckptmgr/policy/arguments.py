"""Checks of what a user hands to a policy: at construction, before any hour of training is spent."""

from __future__ import annotations

import math
import operator
from typing import Literal, TypeAlias

from ckptmgr.errors import UsageError

__all__ = ["Mode", "check_metric", "check_mode", "is_better", "whole_number"]

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
