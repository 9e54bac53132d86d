"""Long work shows that it goes on; short work shows nothing; and showing never fails the work."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.progress import is_quiet, progress, set_quiet
from ckptmgr.words import format_nbytes, format_progress, format_seconds, printable_place

GIB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads any more")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    yield
    set_quiet(False)


def work(stream: io.StringIO, clock: Clock, *, seconds: float, nbytes: int = 12 * GIB, nparts: int = 100) -> str:
    with progress("verifying step 100", nbytes, stream=stream, clock=clock) as advance:
        for _ in range(nparts):
            clock.now += seconds / nparts
            advance(nbytes // nparts)
    return stream.getvalue()


def fail_after(seconds: float, what: str, stream: io.StringIO, clock: Clock, error: type[BaseException]) -> None:
    with progress(what, GIB, stream=stream, clock=clock) as advance:
        clock.now += seconds
        advance(1 << 20)
        raise error


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_short_work_shows_nothing(stream: io.StringIO, clock: Clock) -> None:
    assert work(stream, clock, seconds=0.4) == ""


def test_work_of_some_seconds_shows_no_line(clock: Clock) -> None:
    assert work(io.StringIO(), clock, seconds=9.0) == ""


def test_long_work_shows_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock) -> None:
    lines = work(io.StringIO(), clock, seconds=34.0).splitlines()
    assert lines[0] == "verifying step 100: 3.6 of 12.0 GiB"
    assert len(lines) == 4
    assert lines[-1] == "verifying step 100: 12.0 GiB in 34.0 s"


def test_work_that_fails_has_no_line_of_its_end(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError):
        fail_after(11, "copying", stream, clock, KeyError)
    assert stream.getvalue().splitlines() == ["copying: 0.0 of 1.0 GiB"]


def test_a_terminal_shows_a_bar_which_is_gone_in_the_end(clock: Clock) -> None:
    shown = work(Terminal(), clock, seconds=20.0)
    assert "verifying step 100" in shown
    assert "614.4 MiB/s" in shown
    # The cursor is visible again, and the last thing that was done to the line is to clear it.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.rindex("\x1b[2K") > shown.rindex("verifying")


def test_a_bar_is_gone_also_when_the_work_fails(clock: Clock) -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt):
        fail_after(2, "copying [red]x", stream, clock, KeyboardInterrupt)
    shown = stream.getvalue()
    assert "copying [red]x" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_terminal_without_cursor_movement_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = work(Terminal(), clock, seconds=20.0)
    assert "\x1b" not in shown
    assert shown.endswith("GiB in 20.0 s\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_broken_stderr_does_not_stop_the_work(terminal: bool, clock: Clock) -> None:
    work_stream = Broken(terminal=terminal)
    assert work(work_stream, clock, seconds=60.0) == ""


def test_a_closed_or_missing_stderr_does_not_stop_the_work(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Terminal()
    closed.close()
    with progress("copying", GIB, stream=closed, clock=clock) as advance:
        clock.now += 60
        advance(GIB)
    monkeypatch.setattr(sys, "stderr", None)
    with progress("copying", GIB, clock=clock) as advance:
        clock.now += 60
        advance(GIB)


def test_more_than_was_expected_is_no_error(clock: Clock) -> None:
    for stream in (io.StringIO(), Terminal()):
        with progress("copying", 0, stream=stream, clock=clock) as advance:
            clock.now += 11
            advance(GIB)
        assert "copying" in stream.getvalue()


def test_quiet_shows_nothing(clock: Clock) -> None:
    set_quiet(True)
    assert is_quiet()
    assert work(Terminal(), clock, seconds=60.0) == ""
    assert work(io.StringIO(), clock, seconds=60.0) == ""


def test_within_other_work_only_the_outer_one_is_shown(clock: Clock) -> None:
    stream = io.StringIO()
    with progress("outer", GIB, stream=stream, clock=clock) as advance:
        clock.now += 11
        assert work(stream, clock, seconds=60.0) == ""
        advance(GIB)
    assert [line.partition(":")[0] for line in stream.getvalue().splitlines()] == ["outer", "outer"]
    assert "verifying" in work(stream, clock, seconds=60.0)


def test_work_in_another_thread_does_not_write_between(clock: Clock) -> None:
    inner = io.StringIO()
    with progress("outer", GIB, stream=io.StringIO(), clock=clock):
        thread = threading.Thread(target=work, args=(inner, Clock()), kwargs={"seconds": 60.0})
        thread.start()
        thread.join(30)
    assert inner.getvalue() == ""


def test_a_background_thread_may_show_its_work() -> None:
    stream = Terminal()
    thread = threading.Thread(target=work, args=(stream, Clock()), kwargs={"seconds": 60.0})
    thread.start()
    thread.join(30)
    assert "verifying step 100" in stream.getvalue()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1024**2 - 1, "1.0 MiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_are_told_in_the_unit_that_fits(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


def test_what_is_done_is_told_in_the_unit_of_the_whole() -> None:
    assert format_progress(3 << 20, 12 << 30) == "0.0 of 12.0 GiB"
    assert format_progress(3, 12) == "3 of 12 B"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0 ms"), (0.9996, "1.0 s"), (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (-1.0, "0 ms")],
)
def test_durations_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_place_is_told_as_one_would_type_it() -> None:
    here = Path.cwd()
    assert printable_place(str(here / "runs" / "x")) == "runs/x"
    assert printable_place("runs/x") == "runs/x"
    assert printable_place("/somewhere/else") == "/somewhere/else"
    assert printable_place("s3://key:sec/ret@bucket/run") == "s3://bucket/run"
    assert printable_place("sftp://me@host/run?x=1") == "sftp://host/run"
    assert printable_place("abfs://container@account.dfs.core.windows.net/run").startswith("abfs://container@account")
