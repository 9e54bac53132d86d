"""`Checkpointer`: saves and resumes a plain PyTorch training loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch

from ckptmgr.errors import CkptmgrError, Preempted, UsageError
from ckptmgr.golden.samples import Golden, as_golden
from ckptmgr.launch.requested import requested_run
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.loop_run import LoopRun
from ckptmgr.loop_state import RESERVED, LoopObjects, SavedPosition, meant_reference
from ckptmgr.policy.arguments import check_metrics, check_state, check_step, check_switch
from ckptmgr.policy.from_keywords import retention_from, trigger_from
from ckptmgr.policy.intervals import Triggers
from ckptmgr.policy.quantities import parse_duration
from ckptmgr.policy.retention import RetentionPolicy
from ckptmgr.preemption import is_wanted_end
from ckptmgr.ranks.group import DEFAULT_TIMEOUT_S
from ckptmgr.schedule import Schedule
from ckptmgr.state.capture import CapturedEntry
from ckptmgr.state.changed_options import OptionChange
from ckptmgr.state.data_position import DataPosition, OnResume
from ckptmgr.state.divergence import OnDivergence, checked_divergence
from ckptmgr.state.selection import Selection
from ckptmgr.state.training_options import OnChangedOptions
from ckptmgr.training_run import Monitor, TrainingRun
from ckptmgr.words import where_it_begins

__all__ = ["Checkpointer"]

_log = logging.getLogger("ckptmgr")


class Checkpointer:
    """Saves everything that a training loop needs to go on, and puts it back.

    Args:
        run_dir: Directory or fsspec URL of one training run. ``ckptmgr resume`` overrides it.
        state: Name → object: modules, optimizers, LR schedulers, gradient scalers, anything with ``state_dict`` and
            ``load_state_dict``, and dicts of plain values, tensors and arrays (these are restored in place). RNG state,
            and the position in the data of `batches`, are added by themselves. What turns raw input into what the model
            takes (a tokenizer, a scaler, transforms) goes under the name ``preprocessor``.
        every_n_steps: Save whenever this many steps have passed.
        every_n_epochs: Save at the end of every n-th epoch of `batches`.
        time_interval: Save when the last save is this old. In seconds, or a `timedelta`.
        every: Intervals as text, besides those above: ``"500ba"`` (steps), ``"1ep"``, ``"10min"``, or a list of them.
        monitor: Name of the metric, as given to `step`, that says which checkpoint is best.
        mode: Whether a smaller (``min``) or a larger (``max``) value is better.
        keep_last: How many of the newest checkpoints to keep.
        save_top_k: How many of the best to keep besides, with ``monitor``. 0: none; -1: keep every checkpoint.
        keep_every_n_steps: Keep forever the checkpoints that are the first at or after each multiple of this.
        save_on_signal: Save and exit with code 75 at the next step after SIGTERM.
        save_on_exception: Save the last completed step when an exception leaves the ``with`` block. Costs a copy of
            buffers, RNG and counters at each step.
        triggers: Decides when to save, instead of the intervals above: a trigger, an interval as text, or a list.
        retention: Decides what to keep, instead of the numbers above: a policy, or a list of them.
        golden: A few raw inputs, or `Golden`, whose predictions are kept with each checkpoint: whoever loads it can
            prove that preprocessing and model are what they were. A save after an exception has none.
        resume: ``auto`` goes on where the run stopped, if it ever saved; ``must`` wants a checkpoint; ``never`` starts
            from nothing; anything else names one of this run: ``best``, a step, a tag, an id. For another run's, see
            `restore`.
        on_changed_options: ``keep`` goes on with the learning rates, weight decay, betas and schedules of the
            checkpoint, and names those that the program builds otherwise; ``apply`` goes on with the program's.
        storage_options: Passed to the storage. Never recorded.
        background: Write while training goes on. False makes each save wait until it is durable.
        strict_environment: Refuse to go on where versions or code have changed since the checkpoint in a way that may
            matter. By default that is told, and training goes on.
        on_divergence: In a job of several ranks: ``warn`` compares digests of parameters and moments that all ranks
            should hold alike, at each save, and names what differs; ``raise`` saves nothing then; ``off`` never looks.
        ranks_timeout: How long a rank may be waited for. In seconds, or a `timedelta`.

    Raises:
        UsageError: An argument cannot be meant as it was given.

    Example:
        >>> with Checkpointer("runs/digits", {"model": model, "optimizer": optimizer}, every_n_steps=100) as ckpt:
        ...     step = ckpt.resume()
        ...     for batch in ckpt.batches(loader, epochs=10):
        ...         loss = train(batch)
        ...         step += 1
        ...         ckpt.step(step, metrics={"loss": loss})  # doctest: +SKIP
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        state: Mapping[str, object],
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        time_interval: timedelta | float | None = None,
        every: str | Sequence[str] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_last: int = 3,
        save_top_k: int = 1,
        keep_every_n_steps: int | None = None,
        save_on_signal: bool = True,
        save_on_exception: bool = False,
        triggers: Triggers | None = None,
        retention: RetentionPolicy | Sequence[RetentionPolicy] | None = None,
        golden: Golden | Sequence[Any] | None = None,
        resume: str = "auto",
        on_changed_options: OnChangedOptions = "keep",
        storage_options: Mapping[str, Any] | None = None,
        background: bool = True,
        strict_environment: bool = False,
        on_divergence: OnDivergence = "warn",
        ranks_timeout: timedelta | float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._loop = LoopObjects(check_state(state, reserved=RESERVED), on_changed_options, as_golden(golden))
        chosen, self._resume = requested_run(run_dir or "", resume, takes_references=False)  # "" is refused
        self._run_dir = str(chosen)
        trigger = trigger_from(
            every=every,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            time_interval=time_interval,
            on_signal=save_on_signal,
            on_exception=save_on_exception,
            instead=triggers,
        )
        kept = retention_from(
            keep_last=keep_last,
            save_top_k=save_top_k,
            keep_every_n_steps=keep_every_n_steps,
            monitor=monitor,
            mode=mode,
            instead=retention,
        )
        self._monitor = None if monitor is None else Monitor(monitor, mode)
        self._storage_options = storage_options
        open_run = partial(
            TrainingRun.open,
            self._run_dir,
            retention=kept,
            monitor=self._monitor,
            storage_options=storage_options,
            background=check_switch(background, of="background"),
            check=lambda loaded: self._loop.check(loaded, self._selection),
            check_fresh=lambda: self._loop.golden.check(None),
            on_divergence=checked_divergence(on_divergence),
            strict_environment=check_switch(strict_environment, of="strict_environment"),
        )
        self._selection: Selection | None = None
        self._schedule = Schedule(trigger)
        self._held = LoopRun(
            self._run_dir,
            open_run,
            self._loop,
            self._schedule,
            saves_on_exception=save_on_exception,
            saves_on_signal=save_on_signal,
            ranks_timeout_s=parse_duration(ranks_timeout, of="Checkpointer(ranks_timeout)"),
        )
        self._data: DataPosition | None = None
        self._position: SavedPosition | None = None
        self._step = 0
        self._metrics: dict[str, float] = {}

    @property
    def run_dir(self) -> str:
        """The run directory in force."""
        return self._run_dir

    @property
    def epoch(self) -> int:
        """Index of the epoch that `batches` is in, from 0."""
        return self._data.epoch if self._data else 0

    @property
    def is_last_batch(self) -> bool | None:
        """Whether the batch handed out last ends its epoch; None where the loader has no length."""
        return self._data.is_last_batch if self._data else None

    @property
    def changes(self) -> list[OptionChange]:
        """What this process trains with otherwise than the checkpoint did: options that were applied, batch size."""
        return self._loop.options.applied

    def resume(self) -> int:
        """Claim the run, and go on where it stopped.

        Returns:
            The step to continue from: optimizer updates completed; 0 on a fresh run.

        Raises:
            StateMismatchError: The checkpoint does not fit the live objects; nothing was changed.
            CheckpointNotFoundError, CorruptCheckpointError: There is nothing (whole) to resume from.
            UnsupportedStateError: A value in the state could never be saved.
        """
        if self._held.is_open:
            raise UsageError("resume() was called twice", next="use restore(reference) to go back within one process")
        return self._open(self._resume)

    def restore(self, reference: str, *, selection: Selection | None = None) -> int:
        """Put a checkpoint's state into the live objects.

        A selector alone (``best``, ``1200``, a tag) means this run. After `resume`, training then continues from there
        on a new line, and `batches` must be called anew. Before `resume`, or with a reference to another run, only the
        user's entries are restored; that writes nothing and disturbs no process that trains in the run.

        Args:
            reference: A selector, or a reference to a checkpoint of any run.
            selection: What of it to restore; all by default. What is not restored is logged.

        Returns:
            The checkpoint's step.

        Raises:
            StateMismatchError, CheckpointNotFoundError, CorruptCheckpointError: As `resume`.
        """
        own, is_own = meant_reference(reference, self._run_dir, self._storage_options)
        if not (self._held.is_open and is_own):
            return self._held.restore_alone(own, self._storage_options, selection)
        # Before the attempt is ended: what is not there must not cost the run.
        self._held.run.wait()
        self._held.run.refuse_missing(own.selector)
        self._held.end("preempted", step=self._step)
        self._data = None
        self._schedule.postpone(None)
        self._selection = selection
        try:
            return self._open(own.selector)
        finally:
            self._selection = None

    def batches(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        on_resume: OnResume = "auto",
    ) -> Iterator[Any]:
        """Yield the batches of several epochs, from the first one that was not trained yet.

        The position counts batches whose turn of the loop came to its end (or reached `step`), not batches that workers
        fetched ahead. Do everything that belongs to a step, also validation at ``is_last_batch``, before calling
        `step`.

        Args:
            loader: A DataLoader, a StatefulDataLoader, or anything that can be iterated anew for each epoch.
            epochs: How many in all, counted from the run's start; None for no end.
            on_resume: How to get to the position: ``skip`` without reading, ``replay`` by reading what was trained, or
                ``auto``: skip where that is exactly the same. ``restart`` gives up a position in mid-epoch: that epoch
                begins anew.

        Raises:
            StateMismatchError: The loader is not the one that the position was saved with.
            UsageError: It was called before, in this process.
        """
        self._held.require_open()
        if self._data is not None:
            raise UsageError(
                "batches() was called twice",
                why="the position is kept for one loop: a resume could not tell the first from the second",
                next="call it once, with epochs=N for all of them; iterate over validation data without it",
            )
        self._data, is_over = self._loop.position_in(
            loader, self._position, epochs=epochs, on_resume=on_resume, on_epoch_end=self._save_at_epoch_end
        )
        self._position = None
        if is_over:
            _log.warning("%s is finished: all %d epochs were trained by step %d", self._run_dir, epochs, self._step)
        return iter(self._data)

    def step(self, step: int, *, metrics: Mapping[str, float | torch.Tensor] | None = None) -> None:
        """Tell that an optimizer update has been completed, and save if that is due.

        Args:
            step: Optimizer updates completed in this run. A repeated number (gradient accumulation) does nothing.
            metrics: Values known at this step.

        Raises:
            SaveFailedError, Fenced: An earlier save failed, or the run was taken over.
            Preempted: The process was told to stop; the state is saved. Exits with code 75 if nobody catches it.
        """
        self._held.require_open()
        step = check_step(step, after=self._step)
        is_new = step > self._step
        self._metrics = {**({} if is_new else self._metrics), **check_metrics(metrics)}
        if not is_new:
            return
        self._step = step
        if self._data is not None:
            self._data.mark_step()
        reason, is_told_to_stop = self._reason_to_save(is_epoch_end=bool(self.is_last_batch))
        if reason is not None:
            self._save(reason)
        else:
            self._held.keep(self._capture)
        if is_told_to_stop:
            self._held.stop(self._step)

    def save(self, *, tags: Sequence[str] = (), metrics: Mapping[str, float | torch.Tensor] | None = None) -> None:
        """Save now, at the step that was completed last. Call it right after `step`.

        Args:
            tags: Names for the checkpoint. A tagged one is pinned: retention never drops it.
            metrics: Values known now, beside those of the last `step`.
        """
        self._held.require_open()
        self._warn_of_pending("call save() right after step()")
        self._metrics.update(check_metrics(metrics))
        self._save("asked for", tags=tags)

    def add_metrics(self, metrics: Mapping[str, float | torch.Tensor], *, step: int | None = None) -> None:
        """Add metrics that became known after a save, such as those of a validation that runs on its own.

        They count for what is best and what is kept, as if they had been given with the save. Waits for the save to be
        durable.

        Args:
            metrics: Values by name. One that has a value already is replaced.
            step: The step that they belong to; by default that of the newest save.

        Raises:
            UsageError: No checkpoint of that step is on the line: it was never saved, or retention has dropped it.
            SaveFailedError, Fenced: The last save failed, or the run was taken over.
        """
        self._held.run.annotate_step(step, check_metrics(metrics))

    def wait(self) -> None:
        """Wait until the last save is durable.

        Raises:
            SaveFailedError, Fenced: It failed.
        """
        if self._held.is_open:
            self._held.run.wait()

    def close(self) -> None:
        """End the attempt as finished: save what was not saved yet, wait for it, and let go of the run. Idempotent.

        Raises:
            SaveFailedError, Fenced: The last save failed.
            Preempted: The process was told to stop meanwhile; the state is saved.
        """
        if not self._held.is_open:
            return
        try:
            must_stop = self._held.agree_to_stop()
            if self._step > self._schedule.saved_step:
                if not (self._data and self._data.is_over):
                    self._warn_of_pending("leave the loop right after step()")
                self._save("signal" if must_stop else "end of training")
        except BaseException as error:
            with suppress(CkptmgrError):
                self._held.end("failed", step=self._step, error=f"{type(error).__name__}: {error}")
            raise
        self._held.end("preempted" if must_stop else "finished", step=self._step)
        if must_stop:
            raise Preempted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._held.is_open:
            return
        # The signal that tells the job to stop ends the loader's workers too; between two steps nothing is lost by it.
        has_lost_workers = self._data is not None and self._data.has_lost_workers and not self._data.is_pending
        if error is None or (has_lost_workers and self._held.is_told_to_stop):
            self.close()
            return
        try:
            self._save_after(error)
        except Exception as failure:
            # The user's exception goes on; ours is told beside it.
            error.add_note(f"ckptmgr: nothing was saved after this exception: {failure}")
            _log.exception("nothing was saved after the exception")

    def _open(self, resume: str) -> int:
        self._held.open(resume, prove=self._capture_first, capture=self._capture, restore=self._restore)
        self._schedule.saved(self._step)
        return self._step

    def _restore(self, loaded: LoadedCheckpoint) -> bool:
        restored = self._loop.restore(loaded, self._selection)
        self._loop.golden.prove_restored(is_alone=self._held.is_alone)
        self._step, self._metrics, self._position = restored.step, restored.metrics, restored.position
        data = self._position.tree if self._position else {"epoch": None, "batch": None}
        _log.info("%s", where_it_begins(self._run_dir, self._step, epoch=data["epoch"], nbatches=data["batch"]))
        return restored.starts_anew

    def _reason_to_save(self, *, is_epoch_end: bool) -> tuple[str | None, bool]:
        epoch, seen = self._data.epoch if self._data else None, self._held.run.seen
        return self._schedule.reason_to_save(
            self._step,
            epoch=epoch,
            is_epoch_end=is_epoch_end,
            metrics=self._metrics,
            seen=seen,
            signalled=self._held.is_told_to_stop,
        )

    def _save_at_epoch_end(self, epoch: int) -> None:
        if self._data is not None and self._data.is_pending:
            # Gradients are in no checkpoint. The next step uses them up; what is due now is due then.
            self._schedule.postpone(epoch)
        elif self.is_last_batch is None and self._step > self._schedule.saved_step:
            # A loader without a length shows the end of an epoch only when it is asked for one batch more.
            reason, _ = self._reason_to_save(is_epoch_end=True)
            if reason is not None:
                self._save(reason)

    def _warn_of_pending(self, remedy: str) -> None:
        if self._data is not None and self._data.is_pending:
            where = f"batch {self._data.batch} of epoch {self._data.epoch}"
            _log.warning("not exact: %s counts as trained, and no step() followed it; %s", where, remedy)

    def _capture(self) -> list[CapturedEntry]:
        return self._loop.capture(step=self._step, metrics=self._metrics, data=self._data, position=self._position)

    def _capture_first(self) -> list[CapturedEntry]:
        return [*self._capture(), *self._loop.golden.first_entries(is_alone=self._held.is_alone)]

    def _save(self, reason: str, *, tags: Sequence[str] = (), entries: list[CapturedEntry] | None = None) -> None:
        if entries is None:
            captured = self._capture()
            self._held.keep(lambda: captured)
            entries = [*captured, *self._loop.golden.entries(is_alone=self._held.is_alone)]
        epoch = self._data.epoch if self._data else None
        self._held.save(entries, reason, step=self._step, epoch=epoch, metrics=self._metrics, tags=tags)

    def _save_after(self, error: BaseException) -> None:
        kind = type(error).__name__
        try:
            entries = self._held.boundary_after(kind, step=self._step)
            if entries is not None:
                self._save(f"exception: {kind}", entries=entries)
        finally:
            outcome: Literal["preempted", "failed"] = "preempted" if is_wanted_end(error) else "failed"
            self._held.end(outcome, step=self._step, error=f"{kind}: {error}")
