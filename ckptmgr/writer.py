"""One background save in flight: training goes on while the last snapshot is written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ckptmgr.errors import CkptmgrError, Fenced, SaveFailedError

__all__ = ["BackgroundWriter"]

_log = logging.getLogger("ckptmgr")


class BackgroundWriter:
    """Runs one job at a time on a thread of its own, and never swallows a failure.

    A failure surfaces at the next `submit` or `wait`, once. The thread is no daemon: an interpreter that exits without
    `wait` still finishes the save that was under way.

    Args:
        background: False runs every job at once, on the caller's thread.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._name = ""
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, name: str, job: Callable[[], object]) -> None:
        """Start a job, after the one before it has ended.

        Args:
            name: What the job is, for messages: ``the save of step 1200``.
            job: Runs on the writer's thread.

        Raises:
            SaveFailedError, Fenced: The job before this one failed; this one is not started.
        """
        self.wait()
        self._name = name
        if not self._background:
            self._run(job)
            self.wait()
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"ckptmgr: {name}", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            SaveFailedError: The last job failed; its error is the cause.
            Fenced: A newer attempt owns the run.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if isinstance(failure, Fenced):
            raise failure
        if not isinstance(failure, Exception):
            raise failure
        own = failure if isinstance(failure, CkptmgrError) else None
        raise SaveFailedError(
            f"{self._name} failed",
            why=": ".join(filter(None, (own.what, own.why))) if own else f"{type(failure).__name__}: {failure}",
            next="; ".join(filter(None, ("the checkpoint before it is untouched", own.next if own else None))),
        ) from failure

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._failure = error
            _log.error("%s failed: %s", self._name, error)
