"""Being told to stop: the signal only sets a flag, and the training loop acts on it at its next step boundary."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

__all__ = ["StopSignal"]

_log = logging.getLogger("ckptmgr")


class StopSignal:
    """Notices signals that ask the process to stop.

    A handler that was there before is called as well, if it is a Python function.

    Forked children inherit handlers. In them the signal does what it does by default, with one exception: schedulers
    send it to every process of a job, and a data loader worker that dies of it would end the training before its next
    step boundary. A worker lets the first one pass; the loader itself ends its workers without signals, and sends
    further ones to those that hang.

    Args:
        signals: What to listen to.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,)) -> None:
        self._signals = tuple(signals)
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self._spared_pid = 0
        self.received: int | None = None

    def install(self) -> None:
        """Start to listen. Only the main thread can; elsewhere this says so and does nothing. Idempotent."""
        if self._previous:
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if _is_loader_worker() and self._spared_pid != os.getpid():
                self._spared_pid = os.getpid()
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        previous: Callable[[int, FrameType | None], Any] | int | None = self._previous.get(number)
        if callable(previous):
            previous(number, frame)


def _is_loader_worker() -> bool:
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None
