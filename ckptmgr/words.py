"""Sizes, times and places as people read them, the same in every message."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["format_nbytes", "format_progress", "format_seconds", "printable_place", "where_it_begins"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def format_nbytes(nbytes: int) -> str:
    """Return a size: ``1.2 MiB``."""
    power = _power(nbytes)
    return f"{_scaled(nbytes, power)} {_UNITS[power]}"


def format_progress(done: int, total: int) -> str:
    """Return how much of a size is done, in the unit of the whole: ``3.1 of 12.0 GiB``.

    Example:
        >>> format_progress(512 << 20, 2 << 30)
        '0.5 of 2.0 GiB'
    """
    power = _power(total)
    return f"{_scaled(done, power)} of {_scaled(total, power)} {_UNITS[power]}"


def format_seconds(seconds: float) -> str:
    """Return a duration: ``8 ms``, ``2.4 s``, ``3 min 05 s``, ``2 h 10 min``.

    Example:
        >>> [format_seconds(seconds) for seconds in (0.0083, 2.41, 59.97, 185, 7803)]
        ['8 ms', '2.4 s', '1 min 00 s', '3 min 05 s', '2 h 10 min']
    """
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def printable_place(run_dir: str) -> str:
    """Return a run directory as a user would type it: without credentials, and from here if it lies below.

    Example:
        >>> printable_place("s3://key:secret@bucket/run?token=1")
        's3://bucket/run'
    """
    url = _URL.fullmatch(run_dir)
    if url:
        scheme, rest = url.groups()
        # With a colon before it, even a late `@` ends the credentials: secret keys hold slashes.
        user, at, host = rest.rpartition("@")
        if at and (":" in user or ("/" not in user and not scheme.startswith(("abfs", "az", "adl", "wasb")))):
            rest = host
        return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}"
    path = Path(run_dir)
    try:
        here = Path.cwd()
    except OSError:
        return run_dir
    if path.is_absolute() and path.is_relative_to(here) and path != here:
        return os.path.relpath(path, here)
    return run_dir


def where_it_begins(run_dir: str, step: int | None, *, epoch: int | None = None, nbatches: int | None = None) -> str:
    """Return what a manager says when training begins.

    Args:
        run_dir: The run.
        step: The step that was restored; None where nothing was.
        epoch: The epoch that it lies in, from 0; None where nobody counts.
        nbatches: How many batches of that epoch are trained.

    Example:
        >>> where_it_begins("runs/x", 100, epoch=2, nbatches=40)
        'resuming runs/x from step 100 (epoch 2, 40 batches trained)'
        >>> where_it_begins("runs/x", None)
        'saving in runs/x: training starts from nothing'
    """
    place = printable_place(run_dir)
    if step is None:
        return f"saving in {place}: training starts from nothing"
    position = "" if epoch is None else f" (epoch {epoch}, {nbatches} batch{'' if nbatches == 1 else 'es'} trained)"
    return f"resuming {place} from step {step}{position}"


def _power(nbytes: int) -> int:
    power = 0
    # 1023.95 KiB would be printed as 1024.0 KiB.
    while power < len(_UNITS) - 1 and nbytes / 1024**power >= (1024 if power == 0 else 1023.95):
        power += 1
    return power


def _scaled(nbytes: int, power: int) -> str:
    return f"{nbytes / 1024**power:.{0 if power == 0 else 1}f}"
