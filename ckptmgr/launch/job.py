"""Running a job of several processes to its end: signals reach all of them, and the exit code says how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ckptmgr.errors import CkptmgrError
from ckptmgr.format.manifest import AttemptEnd
from ckptmgr.launch.relaunch import Relaunch
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record
from ckptmgr.storage.open import open_storage

__all__ = ["run_job"]

# What `errors.Preempted` exits with.
_PREEMPTED = 75
# Those that torchrun passes on to the ranks.
_PASSED_ON = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


def run_job(relaunch: Relaunch, *, run_dir: str) -> int:
    """Run torchrun and wait for it; return its exit code, or what it does not say.

    torchrun exits with 1 whatever its ranks have exited with. A job that was told to stop and has saved gives 75, as a
    process alone does, so that a scheduler starts it again.

    Args:
        relaunch: The command.
        run_dir: The run that it trains in: tells how it ended.
    """
    before = _newest_attempt(run_dir)
    sys.stdout.flush()
    sys.stderr.flush()
    with _signals() as waiting:
        # A session of its own: Ctrl-C would reach it twice, from the terminal and from here, and a second signal makes
        # torchrun leave its ranks behind.
        process = subprocess.Popen(
            relaunch.argv, cwd=relaunch.cwd, env={**os.environ, **relaunch.env}, start_new_session=True
        )
        waiting.pass_on_to(process)
        status = process.wait()
    if status == 0:
        return 0
    if _was_preempted(run_dir, since=before):
        return _PREEMPTED
    if status > 0 and waiting.received:
        return 128 + waiting.received[0]
    return 128 - status if status < 0 else status


class _Signals:
    """Passes each signal on, once: torchrun gives its ranks time to save, and a second one would end that."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if signum in self.received:
            return
        self.received.append(signum)
        if self._process is not None:
            self._process.send_signal(signum)

    def pass_on_to(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        # Those that came while it was being started.
        for signum in list(self.received):
            process.send_signal(signum)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    # Whoever started us with `nohup` does not want SIGHUP to end anything; and only the main thread gets signals.
    is_main = threading.current_thread() is threading.main_thread()
    heard = [signum for signum in _PASSED_ON if is_main and signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, signals.receive) for signum in heard}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _newest_attempt(run_dir: str) -> int:
    try:
        return max(Catalog(open_storage(run_dir)).attempts, default=0)
    except CkptmgrError:
        return 0


def _was_preempted(run_dir: str, *, since: int) -> bool:
    try:
        catalog = Catalog(open_storage(run_dir))
        newest = max(catalog.attempts, default=0)
        if newest <= since or "end" not in catalog.attempts[newest]:
            return False
        end = read_attempt_record(catalog.storage, newest, "end", AttemptEnd)
        # Who presses Ctrl-C wants no scheduler to start it again, and nothing was saved for it.
        return end.outcome == "preempted" and not (end.error or "").startswith(KeyboardInterrupt.__name__)
    except (CkptmgrError, FileNotFoundError):
        # How the job ended is then what torchrun says.
        return False
