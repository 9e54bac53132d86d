"""Runs a case: a chain of processes that die, the last one that ends, and the run that was never interrupted."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cases import KILLS, LIGHTNING_KILLS, Case
from faults import Fault
from forge import Ended, Forge
from ingredients import Setup
from results import first_difference, read_result

from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage

__all__ = ["EXIT_CODES", "Runner"]

SEED = 5
EXIT_CODES = {"kill": -9, "raise": 1, "terminate": 75}


class Runner:
    """Runs scripts of one face, and remembers the uninterrupted runs."""

    def __init__(self, forge: Forge, folder: Path, script: str, cases: Iterable[Case]) -> None:
        self._forge = forge
        self._folder = folder
        self._script = script
        self._numbers = itertools.count()
        self._references: dict[Setup, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        # The cases of the matrix run while other tests do.
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._chains = {case: self._pool.submit(self._run_case, case) for case in cases}

    def close(self) -> None:
        """Start no further chains."""
        self._pool.shutdown(cancel_futures=True)

    def check_case(self, case: Case) -> str:
        """Check a case of the matrix that was begun; return the logs."""
        return self._chains[case].result()

    def _run_case(self, case: Case) -> str:
        run_dir = self._folder / f"run-{next(self._numbers):05d}"
        faults = (LIGHTNING_KILLS if case.face == "lightning" else KILLS)[case.kills]
        return self.check_chain(case.setup, run_dir, faults, options=case.options, reseed=case.reseed)

    def start(
        self,
        setup: Setup,
        run_dir: Path | None,
        *,
        fault: Fault | None = None,
        options: Mapping[str, Any] | None = None,
        batches: Mapping[str, Any] | None = None,
        seed: int = SEED,
    ) -> tuple[Ended, dict[str, Any] | None]:
        """Start one process and wait until it has ended; return its result if it came to its end."""
        name = f"{next(self._numbers):05d}"
        result = self._folder / f"{name}.result"
        job = {
            "setup": asdict(setup),
            "fault": asdict(fault) if fault else None,
            "run_dir": str(run_dir) if run_dir else None,
            "options": dict(options or {}),
            "batches": dict(batches or {}),
            "result": str(result),
            "seed": seed,
        }
        ended = self._forge.run(self._script, job, log=self._folder / f"{name}.log")
        # A process that was killed may have left half of it.
        return ended, read_result(result) if ended.exit_code == 0 else None

    def reference(self, setup: Setup) -> dict[str, Any]:
        """Return the result of the same training without a manager."""
        # Per-sample seeds give the same whatever the number of workers: one reference for all, so that this is seen.
        is_same = self._script == "plain_script" and setup.loader in ("sample-seed", "shuffle")
        canonical = replace(setup, workers=0) if is_same else setup
        with self._lock:
            is_first = canonical not in self._references
            future = self._references.setdefault(canonical, Future())
        if is_first:
            ended, result = self.start(canonical, None)
            if result is None:
                future.set_exception(AssertionError(f"the reference of {canonical} failed\n{ended.log}"))
            else:
                future.set_result(result)
        return future.result(timeout=200)

    def check_chain(self, setup: Setup, run_dir: Path, faults: Sequence[Fault], **how: Any) -> str:
        """Run a chain; fail unless its result is that of the uninterrupted run, bit for bit.

        Args:
            setup: What to train.
            run_dir: Where.
            faults: One for each start but the last.
            how: As `run_chain`.

        Returns:
            Everything that the processes wrote to their logs.
        """
        expected = self.reference(setup)
        result, log = self.run_chain(setup, run_dir, faults, **how)
        difference = first_difference(expected, result)
        assert difference is None, f"{difference}\n{log}"
        return log

    def run_chain(
        self,
        setup: Setup,
        run_dir: Path,
        faults: Sequence[Fault],
        *,
        options: Mapping[str, Any] | None = None,
        batches: Mapping[str, Any] | None = None,
        reseed: bool = False,
        workers: Sequence[int] = (),
        must_fire: bool = True,
    ) -> tuple[dict[str, Any], str]:
        """Start, die, start again, and so on; the last start comes to its end.

        Args:
            setup: What to train.
            run_dir: Where.
            faults: One for each start but the last.
            options: Of the manager.
            batches: Options of `Checkpointer.batches`.
            reseed: Seed otherwise at each start that has something to resume, as scripts without a fixed seed do.
            workers: Numbers of workers of the starts, in turn; by default that of the setup.
            must_fire: Fail if a process came to its end before its fault.

        Returns:
            The result of the last start, and the logs of all.
        """
        log = ""
        result: dict[str, Any] | None = None
        for number, fault in enumerate([*faults, None]):
            chosen = replace(setup, workers=workers[number % len(workers)]) if workers else setup
            saved = newest_step(run_dir)
            seed = SEED + number if reseed and saved is not None else SEED
            ended, result = self.start(chosen, run_dir, fault=fault, options=options, batches=batches, seed=seed)
            what = f"start {number + 1} ({fault or 'to the end'}, from step {saved}) exited with {ended.exit_code}"
            log += f"--- {what}\n{ended.log}"
            if ended.exit_code == 0 and not must_fire:
                break
            wanted = 0 if fault is None else -signal.SIGALRM if fault.point == "any" else EXIT_CODES[fault.act]
            assert ended.exit_code == wanted, f"{what} instead of {wanted}\n{log}"
        assert result is not None, log
        return result, log


def newest_step(run_dir: Path) -> int | None:
    """Return the step of the checkpoint that a new process would resume from; None where there is none."""
    if not run_dir.exists():
        return None
    catalog = Catalog(LocalStorage(run_dir))
    return catalog.on_line[-1].step if catalog.is_run and catalog.on_line else None
