"""Durations and sizes as people write them: ``"7d"``, ``"10min"``, ``"500GB"``."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from ckptmgr.errors import UsageError
from ckptmgr.policy.arguments import whole_number

__all__ = ["SECONDS_OF_UNIT", "parse_duration", "parse_nbytes", "split_quantity"]

SECONDS_OF_UNIT = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
    **dict.fromkeys(("w", "week", "weeks"), 7 * 86400),
}
_NBYTES_OF_UNIT = {
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t", "p"))},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t", "p"), start=1)},
}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)


def split_quantity(text: str) -> tuple[float, str] | None:
    """Split text into a number and the unit behind it, in lower case; None if it is not of that form."""
    match = _QUANTITY.fullmatch(text)
    return None if match is None else (float(match.group(1)), match.group(2).lower())


def parse_duration(value: object, *, of: str) -> float:
    """Return a duration in seconds.

    Args:
        value: A positive number of seconds, a `timedelta`, or text: a number and one of ``s``, ``min``, ``h``, ``d``,
            ``w``, written out or not.
        of: The policy and argument, for the message.

    Raises:
        UsageError: It is none of these, or not positive.
    """
    seconds = math.nan
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        quantity = split_quantity(value)
        if quantity is not None and quantity[1] in SECONDS_OF_UNIT:
            seconds = quantity[0] * SECONDS_OF_UNIT[quantity[1]]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    if not math.isfinite(seconds) or seconds <= 0:
        raise UsageError(
            f"{of} was given {value!r}",
            why="it is a positive duration: a number of seconds, a timedelta, or a number with s, min, h, d or w",
            next="give for example 600, '10min', '2h' or '7d'",
        )
    return seconds


def parse_nbytes(value: object, *, of: str) -> int:
    """Return a size in bytes.

    Args:
        value: A whole number of bytes, or text: a number and one of ``B``, ``KB``, ``MB``, ``GB``, ``TB``, ``PB``
            (powers of 1000) or ``KiB`` to ``PiB`` (powers of 1024).
        of: The policy and argument, for the message.

    Raises:
        UsageError: It is none of these, or less than a byte.
    """
    if not isinstance(value, str):
        return whole_number(value, of=of, unit="bytes")
    quantity = split_quantity(value)
    size = 0.0 if quantity is None else quantity[0] * _NBYTES_OF_UNIT.get(quantity[1] or "b", 0)
    if not 1 <= size < math.inf:
        raise UsageError(
            f"{of} was given {value!r}",
            why="it is a size: a number of bytes, or a number with MB, GB, TB (powers of 1000) or MiB, GiB, TiB (1024)",
            next="give for example '500GB' or '1.5TiB'",
        )
    return round(size)
