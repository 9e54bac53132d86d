"""Being told to stop: the signal only sets a flag, and the training loop acts on it at its next step boundary."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

__all__ = ["STOPPED", "StopSignal", "is_wanted_end"]

_log = logging.getLogger("ckptmgr")

STOPPED = "%s: told to stop, and step %d is saved; `ckptmgr resume` with it, or the same start again, goes on"
"""What a manager says, with run directory and step, before it raises `Preempted`."""


def is_wanted_end(error: BaseException) -> bool:
    """Say whether somebody wanted the process to end: that is no failure of what was trained."""
    return isinstance(error, KeyboardInterrupt | SystemExit) and getattr(error, "code", None) in (None, 0, 75)


class StopSignal:
    """Notices signals that ask the process to stop.

    A handler that was there before is called as well, if it is a Python function. Forked children inherit handlers: in
    any process but the one that installed it, the signal does what it does by default.

    Schedulers send the signal to every process of a job, so data loader workers die of it at once. torch raises an
    error about that wherever the main process happens to be; once the signal has come, no longer.

    Args:
        signals: What to listen to.
        calls_previous: Whether a handler that was there before is called as well.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,), *, calls_previous: bool = True) -> None:
        self._signals = tuple(signals)
        self._calls_previous = calls_previous
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self.received: int | None = None

    def install(self) -> None:
        """Start to listen. Only the main thread can; elsewhere this says so and does nothing. Idempotent."""
        if self._previous or not self._signals:
            return
        if threading.current_thread() is not threading.main_thread():
            _log.warning("not on the main thread: a signal that ends this job will not be noticed, nothing saves on it")
            return
        self._pid = os.getpid()
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Put the handlers back that were there before, unless somebody has replaced ours since. Idempotent."""
        for number, previous in self._previous.items():
            # == and not `is`: a bound method is a new object each time it is looked up.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def ignore(self) -> None:
        """Ignore the signals from now on, because everything is saved and this process is about to exit.

        Whoever started the ranks of a job tells those that are left to stop as soon as the first one has exited; that
        would end them with another exit code.
        """
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        # Not put back: the dead workers would be found while the process exits, and its exit code would tell of them.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        previous: Callable[[int, FrameType | None], Any] | int | None = self._previous.get(number)
        if callable(previous) and self._calls_previous:
            previous(number, frame)
