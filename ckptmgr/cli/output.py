"""How commands print: tables and JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckptmgr.cli.printable import printable
from ckptmgr.launch.torchrun import place_in_job
from ckptmgr.progress import is_quiet
from ckptmgr.words import format_nbytes

__all__ = [
    "format_age",
    "format_metrics",
    "format_nbytes",
    "format_time",
    "is_other_rank",
    "note",
    "print_json",
    "print_pairs",
    "print_table",
    "show_log",
]

_WIDE = 10_000
_GAP = 2
_MIN_WORD, _MAX_WORD = 12, 24


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, allow_nan=False))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table on stdout, without the columns that are empty. ``right`` names those that are aligned right."""
    rows = list(rows)
    used = [index for index in range(len(headers)) if any(row[index] for row in rows)]
    columns = [[printable(cell) for cell in (headers[index], *(row[index] for row in rows))] for index in used]
    is_right = [headers[index] in right for index in used]
    widths = _widths(columns, is_right, room=_console().width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for index, width, aligned_right in zip(used, widths, is_right, strict=True):
        justify: Literal["left", "right"] = "right" if aligned_right else "left"
        table.add_column(headers[index], justify=justify, overflow="fold", width=width)
    for row in zip(*(cells[1:] for cells in columns), strict=True):
        # Text, not str: what stands in a run is no markup.
        table.add_row(*(Text(cell) for cell in row))
    # On a terminal narrower than that, lines run over: better than cells a letter wide.
    _console(at_least=_table_width(widths)).print(table)


def _widths(columns: Sequence[Sequence[str]], is_right: Sequence[bool], *, room: int) -> list[int]:
    """Return how wide to make columns, so that a table fits into a terminal if words can be kept whole."""
    full = [max(map(cell_len, cells)) for cells in columns]
    longest = [max((cell_len(word) for cell in cells for word in cell.split()), default=0) for cells in columns]
    # A cell may be broken between words; `loss=0.5` is broken in the middle only if nothing else fits.
    for whole in range(_MAX_WORD, _MIN_WORD - 1, -1):
        widths = [
            width if right else min(word, whole) for width, word, right in zip(full, longest, is_right, strict=True)
        ]
        if _table_width(widths) <= room:
            break
    spare = max(0, room - _table_width(widths))
    # Those that lack little come first: so more columns keep each cell on one line.
    for done, index in enumerate(sorted(range(len(full)), key=lambda index: full[index] - widths[index])):
        more = min(full[index] - widths[index], math.ceil(spare / (len(full) - done)))
        widths[index] += more
        spare -= more
    return widths


def _table_width(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print names and values on stdout, one pair per line, without the empty ones."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        if value:
            table.add_row(Text(name), Text(printable(value)))
    _console().print(table)


def is_other_rank() -> bool:
    """Return whether this process is one of several, and not the one that tells how things go: rank 0."""
    place = place_in_job(os.environ)
    return place is not None and place.rank > 0


def note(text: str) -> None:
    """Print a remark on stderr, unless it is to be quiet. Of several ranks, rank 0 tells it."""
    if not is_quiet() and not is_other_rank():
        print(printable(text), file=sys.stderr, flush=True)


def show_log() -> None:
    """Show what the managers log, line by line on stderr: each save, each resume, each warning.

    With ``--quiet`` errors only. Idempotent. Where the user's own code logs to the terminal, it is not said twice.
    """
    logger = logging.getLogger("ckptmgr")
    if not any(isinstance(handler, _LogHandler) for handler in logger.handlers):
        logger.addHandler(_LogHandler())
    logger.setLevel(logging.ERROR if is_quiet() else logging.WARNING if is_other_rank() else logging.INFO)


class _LogHandler(logging.Handler):
    """Prints on what is stderr at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            users = [getattr(handler, "stream", None) for handler in logging.getLogger().handlers]
            if any(stream in (sys.stderr, sys.stdout) for stream in users if stream is not None):
                return
            mark = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(f"ckptmgr: {mark}{self.format(record)}", file=sys.stderr, flush=True)
        except Exception:
            # A stderr that nobody reads any more is no reason to stop training.
            self.setLevel(logging.CRITICAL + 1)


def format_age(timestamp: str, *, now: datetime | None = None) -> str:
    """Return how long ago an RFC 3339 time is: ``5 min``. Only shown, never decided on: clocks differ."""
    try:
        seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(timestamp)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def format_time(timestamp: str) -> str:
    """Return an RFC 3339 time to the second, in UTC as it is stored: ``2026-11-23 10:00:00``."""
    return timestamp[:19].replace("T", " ")


def format_metrics(metrics: Mapping[str, object]) -> str:
    """Return metrics in one line: ``loss=0.25 acc=nan``."""
    return " ".join(
        f"{name}={float(value):.4g}" for name, value in metrics.items() if isinstance(value, float | int | str)
    )


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would exit by itself; how a command ends is decided in one place.
        raise BrokenPipeError


def _console(at_least: int = 0) -> Console:
    console = _Console(highlight=False, emoji=False, markup=False)
    # Into a pipe or file, lines are as long as they are: a program that cuts columns wants no line breaks.
    console.width = max(console.width, at_least) if sys.stdout.isatty() else _WIDE
    return console
