"""A plain loop's hold on its run: the other ranks, the attempt, the signal to stop, the copy of the last boundary."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ckptmgr.boundary import BoundaryCopy
from ckptmgr.errors import Preempted, UsageError
from ckptmgr.format.manifest import Outcome
from ckptmgr.joint_save import prove_state
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.loop_state import LoopObjects
from ckptmgr.preemption import STOPPED, StopSignal
from ckptmgr.ranks.group import Ranks
from ckptmgr.run.reference import Reference
from ckptmgr.schedule import Schedule
from ckptmgr.state.capture import CapturedEntry
from ckptmgr.state.selection import Selection
from ckptmgr.topology.join import join_ranks
from ckptmgr.training_run import TrainingRun
from ckptmgr.words import where_it_begins

__all__ = ["LoopRun"]

_log = logging.getLogger("ckptmgr")

_AFTER_EXCEPTION_S = 30.0


class LoopRun:
    """Opens a run, saves into it, and ends the attempt.

    Args:
        run_dir: The run, as the user named it.
        open_run: `TrainingRun.open`, but for what is given to `open`.
        loop: The user's objects.
        schedule: Asked when to save.
        saves_on_exception: Keep a copy of each step boundary.
        saves_on_signal: Listen to SIGTERM.
        ranks_timeout_s: How long a rank may be waited for.
    """

    def __init__(
        self,
        run_dir: str,
        open_run: Callable[..., TrainingRun],
        loop: LoopObjects,
        schedule: Schedule,
        *,
        saves_on_exception: bool,
        saves_on_signal: bool,
        ranks_timeout_s: float,
    ) -> None:
        self._run_dir = run_dir
        self._open_run = open_run
        self._loop = loop
        self._schedule = schedule
        self._saves_on_exception = saves_on_exception
        self._signal = StopSignal([signal.SIGTERM] if saves_on_signal else [])
        self._ranks_timeout_s = ranks_timeout_s
        self._ranks: Ranks | None = None
        self._run: TrainingRun | None = None
        self._boundary: BoundaryCopy | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is an attempt."""
        return self._run is not None

    @property
    def run(self) -> TrainingRun:
        """The open run.

        Raises:
            UsageError: It is not open.
        """
        self.require_open()
        assert self._run is not None
        return self._run

    @property
    def is_alone(self) -> bool:
        """Whether the job has one rank."""
        return self._ranks is None or self._ranks.world_size == 1

    def require_open(self) -> None:
        """Raise if the run is not open.

        Raises:
            UsageError: It is not.
        """
        if self._run is None:
            raise UsageError(
                f"the run in {self._run_dir} is not open",
                why="resume() was not called yet, or the checkpointer was closed",
                next="call step = ckpt.resume() once, before the loop: it returns 0 on a fresh run",
            )

    @property
    def is_told_to_stop(self) -> bool:
        """Whether this process got the signal."""
        return self._signal.received is not None

    def open(
        self,
        resume: str,
        *,
        prove: Callable[[], list[CapturedEntry]],
        capture: Callable[[], list[CapturedEntry]],
        restore: Callable[[LoadedCheckpoint], bool],
    ) -> None:
        """Join the other ranks, claim the run, and restore what it continues.

        Args:
            resume: ``auto``, ``must``, ``never``, or a selector.
            prove: Captures all that a save would hold.
            capture: Captures what it takes to go on.
            restore: Restores it; returns whether the line begins anew.

        Raises:
            CkptmgrError: As `TrainingRun.open`. Nothing is open then.
        """
        ranks = self._ranks = join_ranks(timeout_s=self._ranks_timeout_s)
        self._schedule.agree_with(ranks)
        try:
            # A state that could never be saved takes no run over, and creates none.
            prove_state(ranks, prove)
            run = self._open_run(resume=resume, ranks=ranks, shards=self._loop.shards(), classes=self._loop.classes())
        except BaseException as error:
            self._part(error)
            raise
        try:
            if run.continued is None:
                _log.info("%s", where_it_begins(self._run_dir, None))
            elif restore(run.continued):
                run.continued = None
            run.accept()
        except BaseException as error:
            run.abandon(error)
            self._part(error)
            raise
        run.continued = None
        self._run = run
        self._signal.install()
        if self._saves_on_exception:
            self._boundary = BoundaryCopy(self._loop.optimizers)
            self._boundary.keep(capture())

    def restore_alone(
        self, reference: Reference, storage_options: Mapping[str, Any] | None, selection: Selection | None
    ) -> int:
        """Put another run's checkpoint into the user's objects alone, on all ranks; return its step."""
        ranks = self._ranks or join_ranks(timeout_s=self._ranks_timeout_s)
        try:
            return self._loop.restore_alone(reference, storage_options, selection, ranks=ranks)
        finally:
            if ranks is not self._ranks:
                ranks.close()

    def keep(self, capture: Callable[[], list[CapturedEntry]]) -> None:
        """Keep a copy of this step boundary, if that is wanted."""
        if self._boundary is not None:
            self._boundary.keep(capture())

    def save(
        self,
        entries: list[CapturedEntry],
        reason: str,
        *,
        step: int,
        epoch: int | None,
        metrics: Mapping[str, float],
        tags: Sequence[str] = (),
    ) -> None:
        """Save, on all ranks."""
        self.run.save(entries, step=step, epoch=epoch, reason=reason, metrics=metrics, tags=tags)
        self._schedule.saved(step)
        if self._ranks is not None and self._ranks.leads:
            self.run.tell_missing_monitor(metrics)

    def boundary_after(self, kind: str, *, step: int) -> list[CapturedEntry] | None:
        """Return the state of the last boundary after an exception, if all ranks have one; else None, and say why.

        Args:
            kind: Class of the exception.
            step: The step that was completed last.
        """
        saved = self._schedule.saved_step
        if step <= saved:
            return None
        entries = self._boundary.entries() if self._boundary else None
        why = "an optimizer step was under way" if self._boundary else "save_on_exception is off"
        if self._boundary is not None and self._ranks is not None and self._ranks.world_size > 1:
            # A rank that goes on training has other things to do than to answer.
            self._ranks.hurry(_AFTER_EXCEPTION_S)
            what = f"saving step {step} after an exception"
            is_kept = entries is not None
            if not self._ranks.loop.exchange(what, lambda: is_kept, all):
                entries = None
        if entries is None:
            what = "steps %d to %d are lost: %s left the loop, and nothing is saved, because %s"
            _log.warning(what, saved + 1, step, kind, why)
        return entries

    def agree_to_stop(self) -> bool:
        """Say, at the end of the loop, whether any rank was told to stop."""
        if self._ranks is None:
            return self.is_told_to_stop
        return self._ranks.loop.exchange("the end of the loop", lambda: self.is_told_to_stop, any)

    def stop(self, step: int) -> NoReturn:
        """End the attempt as preempted, also on ranks that got no signal: the job ends as one.

        Raises:
            Preempted: Always, unless the last save failed.
        """
        leads = self._ranks is None or self._ranks.leads
        self.end("preempted", step=step)
        if leads:
            _log.warning(STOPPED, self._run_dir, step)
        raise Preempted

    def end(self, outcome: Outcome, *, step: int, error: str | None = None) -> None:
        """Wait for the last save, record how the attempt ended, let go of the run and of the other ranks. Idempotent.

        Raises:
            SaveFailedError, Fenced, RankFailure: The last save failed.
        """
        run, self._run = self._run, None
        if self._boundary is not None:
            self._boundary.close()
            self._boundary = None
        is_one_of_several = self._ranks is not None and self._ranks.world_size > 1
        try:
            if run is not None:
                run.close(outcome, step=step, error=error)
        finally:
            self._part(sys.exception())
            # Last: a second signal must not end the process while the save that the first one asked for is written.
            if outcome == "preempted" and is_one_of_several:
                # As soon as one rank has exited, launchers signal the others: they are on their way out already.
                self._signal.ignore()
            else:
                self._signal.uninstall()

    def _part(self, error: BaseException | None) -> None:
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close(error)
