"""How long work shows that it goes on: a bar on a terminal, now and then a line elsewhere, nothing if it is short.

Everything goes to stderr. A terminal that has gone away, or is closed, stops the showing and never the work.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TextIO

from ckptmgr.words import format_nbytes, format_progress, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["is_quiet", "progress", "set_quiet"]

_BAR_AFTER_S = 0.5
_REFRESH_S = 0.1
_LINE_EVERY_S = 10.0

_is_quiet = False
_showing = threading.Lock()


def set_quiet(quiet: bool) -> None:
    """Show nothing from now on, or show again. For the whole process."""
    global _is_quiet
    _is_quiet = quiet


def is_quiet() -> bool:
    """Return whether nothing but errors is to be told."""
    return _is_quiet


@contextmanager
def progress(
    what: str, total_nbytes: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Show how some work goes on, if it takes long.

    Of several that run at once, in one thread or in many, the first is shown: two would write over each other.

    Args:
        what: The work, such as ``verifying step 100``.
        total_nbytes: How much there is to do.
        stream: Where to show it; stderr by default.
        clock: Seconds that never go back.

    Yields:
        A function to call with the number of bytes that were done since the last call. It never raises.

    Example:
        >>> with progress("verifying step 100", 3) as advance:
        ...     advance(3)
    """
    if _is_quiet or not _showing.acquire(blocking=False):
        yield lambda nbytes: None
        return
    try:
        stream = sys.stderr if stream is None else stream
        shown = _Shown(_Bar(what, total_nbytes, stream, clock) if _is_terminal(stream) else _Lines(what, stream), clock)
        try:
            shown.begin(total_nbytes)
            yield shown.advance
        except BaseException:
            shown.end(is_done=False)
            raise
        shown.end(is_done=True)
    finally:
        _showing.release()


class _View(Protocol):
    """One way of showing."""

    def show(self, done: int, total: int, seconds: float) -> None:
        """Show how far the work is. Called whenever some of it was done."""
        ...

    def end(self, total: int, seconds: float, *, is_done: bool) -> None:
        """Leave the screen as it should stay."""
        ...


class _Shown:
    """Counts, and keeps every failure to show away from the work."""

    def __init__(self, view: _View, clock: Callable[[], float]) -> None:
        self._view: _View | None = view
        self._clock = clock
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._began = 0.0

    def begin(self, total: int) -> None:
        self._total = total
        self._began = self._clock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._view is not None:
                try:
                    self._view.show(self._done, self._total, self._clock() - self._began)
                except Exception:
                    self._drop()

    def end(self, *, is_done: bool) -> None:
        with self._lock:
            view, self._view = self._view, None
            if view is not None:
                with suppress(Exception):
                    view.end(self._done, self._clock() - self._began, is_done=is_done)

    def _drop(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            # A bar has hidden the cursor.
            with suppress(Exception):
                view.end(self._done, 0.0, is_done=False)


class _Lines:
    """A line every ten seconds, and one at the end if there was one before."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._next_s = _LINE_EVERY_S

    def show(self, done: int, total: int, seconds: float) -> None:
        if seconds >= self._next_s:
            self._print(f"{self._what}: {format_progress(done, max(done, total))}")
            self._next_s = seconds + _LINE_EVERY_S

    def end(self, total: int, seconds: float, *, is_done: bool) -> None:
        if is_done and self._next_s > _LINE_EVERY_S:
            self._print(f"{self._what}: {format_nbytes(total)} in {format_seconds(seconds)}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _Bar:
    """A bar that is gone when the work is done."""

    def __init__(self, what: str, total: int, stream: TextIO, clock: Callable[[], float]) -> None:
        self._what = what
        self._total = total
        self._stream = stream
        self._clock = clock
        self._bar: Progress | None = None
        self._next_s = _BAR_AFTER_S

    def show(self, done: int, total: int, seconds: float) -> None:
        if seconds < self._next_s:
            return
        if self._bar is None:
            self._bar = self._new_bar()
            self._bar.add_task(self._what, total=self._total or None)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)
        self._bar.refresh()
        self._next_s = seconds + _REFRESH_S

    def end(self, total: int, seconds: float, *, is_done: bool) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _new_bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class SpeedColumn(ProgressColumn):
            def render(self, task: Task) -> Text:
                # In the units of the sizes; rich's own column has other ones.
                speed = task.finished_speed or task.speed
                return Text("" if speed is None else f"{format_nbytes(int(speed))}/s")

        class BarConsole(Console):
            def on_broken_pipe(self) -> None:
                # rich would end the process, and throw its stdout away.
                raise BrokenPipeError

        # Names may hold what rich takes for markup. Drawn by whoever works: a thread that draws could fail by itself.
        text = TextColumn("{task.description}", markup=False)
        return Progress(
            *(text, BarColumn(), DownloadColumn(binary_units=True), SpeedColumn(), TimeRemainingColumn()),
            console=BarConsole(file=self._stream, force_jupyter=False),
            get_time=self._clock,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )


def _is_terminal(stream: TextIO | None) -> bool:
    # No stderr at all (pythonw), a closed one, or a terminal that cannot go back to the start of a line.
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except ValueError:
        return False
