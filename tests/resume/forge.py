"""Starts training processes in a second instead of ten: forks them from a server that has torch and Lightning imported.

The server (``python -m forge MODULE...``) never trains, never draws a random number and has one thread, so that a
forked process is like a fresh one. `Forge` is the client's side.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Forge"]

DEADLINE_S = 90.0
ROOM = Path(__file__).parent
MODULES = ("lightning.pytorch", "lightning_script", "logger_script", "plain_script")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exit_code: As `subprocess` gives it: negative for a signal.
        log: What it wrote to stdout and stderr.
    """

    exit_code: int
    log: str


class Forge:
    """A fork server of this test session.

    Args:
        modules: What it imports: the scripts, and what takes long.
        room: Folder of the scripts.
    """

    def __init__(self, modules: Sequence[str] = MODULES, room: Path = ROOM) -> None:
        path = os.pathsep.join([str(room), str(ROOM), *sys.path])
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "forge", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Ended]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, script: str, job: Mapping[str, Any], *, log: Path) -> Ended:
        """Run ``script.main(job)`` in a forked process; wait until it has ended. May be called from several threads."""
        future: Future[Ended] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
            assert self._server.stdin is not None
            request = {"number": number, "script": script, "job": dict(job), "log": str(log)}
            print(json.dumps(request), file=self._server.stdin, flush=True)
        return future.result(timeout=DEADLINE_S + 30)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=DEADLINE_S)
        self._reader.join(timeout=DEADLINE_S)
        assert self._server.stdout is not None
        self._server.stdout.close()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            reply = json.loads(line)
            future = self._waiting.pop(reply["number"])
            future.set_result(Ended(reply["exit_code"], Path(reply["log"]).read_text(errors="replace")))
        for future in self._waiting.values():
            future.set_exception(RuntimeError("the fork server has ended"))


def _serve() -> None:
    import torch

    for module in sys.argv[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a fork would lose these threads"
    # What the collector does not look at is not copied by the forked processes.
    gc.collect()
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fork = multiprocessing.get_context("fork")
    running: list[tuple[Any, dict[str, Any], float]] = []
    is_open = True
    buffered = b""
    while is_open or running:
        # Not the sentinels of the processes: their workers hold these open for seconds after they were killed.
        ready = multiprocessing.connection.wait([0] if is_open else [], timeout=0.01 if running else None)
        if ready:
            received = os.read(0, 65536)
            is_open = bool(received)
            *lines, buffered = (buffered + received).split(b"\n")
            for line in lines:
                request = json.loads(line)
                process = fork.Process(target=_child, args=(request,))
                process.start()
                running.append((process, request, time.monotonic()))
        for item in running.copy():
            process, request, began = item
            if process.exitcode is None:
                if time.monotonic() - began > DEADLINE_S:
                    process.kill()
                continue
            with contextlib.suppress(ProcessLookupError):
                # Workers of a killed process would only notice after some seconds. They belong to its session.
                os.killpg(process.pid, signal.SIGKILL)
            running.remove(item)
            reply = {"number": request["number"], "exit_code": process.exitcode, "log": request["log"]}
            print(json.dumps(reply), file=replies, flush=True)


def _child(request: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    sys.modules[request["script"]].main(request["job"])


if __name__ == "__main__":
    _serve()
