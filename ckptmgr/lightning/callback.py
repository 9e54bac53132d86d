"""`CheckpointManager`: the callback that saves and resumes a Lightning training."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, Self

from ckptmgr.errors import Preempted
from ckptmgr.golden.record import GoldenRecorder
from ckptmgr.golden.samples import Golden, as_golden
from ckptmgr.launch.requested import requested_run
from ckptmgr.launch.run_directory import absolute
from ckptmgr.lightning.arguments import refuse_shared_run, warn_of_unused
from ckptmgr.lightning.assemble import GOLDEN, MODEL
from ckptmgr.lightning.bases import tree_for, with_lightning_base
from ckptmgr.lightning.checkpoint_io import install_checkpoint_io
from ckptmgr.lightning.compat import check_compatible, module_of
from ckptmgr.lightning.filesystem import own_reference
from ckptmgr.lightning.loggers import Logs, begin_logs
from ckptmgr.lightning.loops import Boundary, LoopHooks
from ckptmgr.lightning.preprocessing import KeptPreprocessor
from ckptmgr.lightning.resume import Resume
from ckptmgr.lightning.run_view import RunView
from ckptmgr.lightning.saving import Saver
from ckptmgr.lightning.strategies import join_trainer, load_through, refuse_strategy
from ckptmgr.policy.arguments import check_switch
from ckptmgr.policy.from_keywords import retention_from, trigger_from
from ckptmgr.policy.intervals import Triggers
from ckptmgr.policy.quantities import parse_duration
from ckptmgr.policy.retention import RetentionPolicy
from ckptmgr.preemption import STOPPED, StopSignal
from ckptmgr.ranks.group import DEFAULT_TIMEOUT_S, Ranks
from ckptmgr.state.divergence import OnDivergence, checked_divergence
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.rng import capture_rng
from ckptmgr.state.selection import Selection, SelectionReport
from ckptmgr.state.sources import class_sources
from ckptmgr.state.training_options import OnChangedOptions, checked_mode
from ckptmgr.training_run import RUN_DIR_VARIABLE, Monitor, TrainingRun

__all__ = ["CheckpointManager"]

_log = logging.getLogger("ckptmgr")


class CheckpointManager(RunView):
    """Saves everything that a Trainer needs to go on, and resumes by itself in ``fit``.

    Works with ``lightning`` and with ``pytorch_lightning``: an instance is a ``ModelCheckpoint`` of whichever of them
    the program has imported. ``trainer.fit(model)`` goes on where the run stopped, bit-identical; ``ckpt_path`` takes
    ``"last"``, ``"best"`` and references such as ``runs/digits@1200``. SIGTERM saves at the next step boundary and
    exits with code 75.

    Args:
        run_dir: Directory or fsspec URL of one training run. By default a fresh one below
            ``<default_root_dir>/runs``; under SLURM and torchelastic that of the job. ``ckptmgr resume`` overrides it.
        every_n_train_steps: Save whenever this many optimizer steps have passed.
        every_n_epochs: Save at the end of every n-th epoch.
        train_time_interval: Save when the last save is this old. In seconds, or a `timedelta`.
        every: Intervals as text, besides those above: ``"500ba"`` (steps), ``"1ep"``, ``"10min"``, or a list of them.
        monitor: Name of the logged metric that says which checkpoint is best.
        mode: Whether a smaller (``min``) or a larger (``max``) value is better.
        save_top_k: How many of the best to keep, with ``monitor``. 0: none; -1: keep every checkpoint.
        keep_last: How many of the newest to keep.
        keep_every_n_steps: Keep forever the first checkpoint at or after each multiple of this.
        save_weights_only: Save what inference needs. Such checkpoints cannot be resumed.
        save_on_exception: Save the last completed step when an exception (or Ctrl-C) ends the training. Costs a copy of
            buffers, RNG and counters at each step.
        save_on_signal: Save and exit with code 75 at the next step boundary after SIGTERM.
        triggers: Decides when to save, instead of the intervals above: a trigger, an interval as text, or a list.
        retention: Decides what to keep, instead of the numbers above: a policy, or a list of them.
        preprocessor: What turns raw input into what the model takes: a tokenizer, a scaler, transforms. It is saved
            with the model, and compared with the checkpoint's when training goes on.
        golden: A few raw inputs, or `Golden`, whose predictions are kept with each checkpoint: whoever loads it can
            prove that preprocessing and model are what they were.
        resume: ``auto`` goes on where the run stopped, if it ever saved; ``must`` wants a checkpoint; ``never`` starts
            from nothing; a selector (``best``, a step, a tag, an id) goes back to that checkpoint; a reference to
            another run begins with its checkpoint, until this run has one of its own.
        on_changed_options: ``keep`` goes on with the learning rates, weight decay, betas and schedules of the
            checkpoint, and names those that the module builds otherwise; ``apply`` goes on with the module's.
        selection: What to restore of a checkpoint that is named, by ``resume`` or by ``ckpt_path``. What this run's own
            starts go on from by themselves is restored whole.
        storage_options: Passed to the storage. Never recorded.
        background: Write while training goes on. False makes each save wait until it is durable.
        strict_environment: Refuse to go on where versions or code have changed since the checkpoint in a way that may
            matter. By default that is told, and training goes on.
        on_divergence: In a job of several ranks: ``warn`` compares digests of parameters and moments that all ranks
            should hold alike, at each save, and names what differs; ``raise`` saves nothing then; ``off`` never looks.
        ranks_timeout: How long a rank may be waited for. In seconds, or a `timedelta`.
        **others: Other arguments of ModelCheckpoint: accepted, and named in a warning where they have no meaning here.

    Raises:
        UsageError: An argument cannot be meant as it was given.

    Example:
        >>> trainer = Trainer(callbacks=[CheckpointManager("runs/digits", every_n_train_steps=100)])  # doctest: +SKIP
        >>> trainer.fit(model)  # doctest: +SKIP
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make an instance that is a ModelCheckpoint too."""
        instance: Self = super().__new__(with_lightning_base(cls))
        return instance

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | float | None = None,
        every: str | Sequence[str] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        keep_last: int = 3,
        keep_every_n_steps: int | None = None,
        save_weights_only: bool = False,
        save_on_exception: bool = False,
        save_on_signal: bool = True,
        triggers: Triggers | None = None,
        retention: RetentionPolicy | Sequence[RetentionPolicy] | None = None,
        preprocessor: Any = None,
        golden: Golden | Sequence[Any] | None = None,
        resume: str = "auto",
        on_changed_options: OnChangedOptions = "keep",
        selection: Selection | None = None,
        storage_options: Mapping[str, Any] | None = None,
        background: bool = True,
        strict_environment: bool = False,
        on_divergence: OnDivergence = "warn",
        ranks_timeout: timedelta | float = DEFAULT_TIMEOUT_S,
        **others: Any,
    ) -> None:
        # ModelCheckpoint's own constructor is left out: it sets up the saving that this class replaces.
        run_dir = warn_of_unused(run_dir, others)
        chosen, self._resume = requested_run(run_dir, resume)
        self._run_dir = None if chosen is None else absolute(chosen)
        self._trigger = trigger_from(
            every=every,
            every_n_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            time_interval=train_time_interval,
            on_signal=save_on_signal,
            on_exception=save_on_exception,
            instead=triggers,
        )
        self._retention = retention_from(
            keep_last=keep_last,
            save_top_k=save_top_k,
            keep_every_n_steps=keep_every_n_steps,
            monitor=monitor,
            mode=mode,
            instead=retention,
        )
        self._monitor = None if monitor is None else Monitor(monitor, mode)
        self._storage_options, self._on_changed_options = storage_options, checked_mode(on_changed_options)
        self._selection = selection
        self._preprocessor, self._golden = KeptPreprocessor(preprocessor), as_golden(golden)
        self._background = check_switch(background, of="background")
        self._on_divergence = checked_divergence(on_divergence)
        self._strict_environment = check_switch(strict_environment, of="strict_environment")
        self._ranks_timeout_s = parse_duration(ranks_timeout, of="CheckpointManager(ranks_timeout)")
        self._ranks: Ranks | None = None
        self._is_overridden = bool(os.environ.get(RUN_DIR_VARIABLE))
        self._saves_on_exception = save_on_exception
        self._saves_on_signal = save_on_signal
        # Read by loggers and by Lightning itself.
        self.monitor, self.mode, self.save_top_k, self.save_last = monitor, mode, save_top_k, True
        self.save_weights_only, self.save_on_exception, self.verbose = save_weights_only, save_on_exception, False
        self.filename, self.best_k_models, self.kth_best_model_path = None, {}, ""  # type: ignore[var-annotated]
        self._every_n_train_steps, self._every_n_epochs = every_n_train_steps or 0, every_n_epochs or 0
        self._train_time_interval = train_time_interval
        self._past: TrainingRun | None = None
        self._trainer: Any = None
        self._hooks: LoopHooks | None = None
        self._resumption: Resume | None = None
        self._logs: Logs | None = None
        self._signal: StopSignal | None = None
        self._saver: Saver | None = None
        self._report: SelectionReport | None = None

    # Lightning's hooks, in their order.

    def before_loggers_begin(self, trainer: Any) -> None:
        """Go on with the run's logs, where ``fit`` will probably go on with the run."""
        if trainer.state.fn == "fit" and not trainer.fast_dev_run and _managers(trainer)[0] is self:
            self._join(trainer)
            self._logs = begin_logs(trainer, str(self._run_dir), self._resume, storage_options=self._storage_options)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take our place in the Trainer: its CheckpointIO, and in ``fit`` its way to resume and its loops."""
        tree = tree_for(trainer, self)
        check_compatible(trainer, tree)
        refuse_strategy(trainer)
        checkpoint_io = install_checkpoint_io(trainer, tree, self._storage_options)
        load_through(trainer, checkpoint_io.load_checkpoint, lambda path: own_reference(path) is not None)
        if stage != "fit" or trainer.fast_dev_run:
            return
        ranks = self._join(trainer)
        self._trainer, self._saver = trainer, None
        managers = _managers(trainer)
        refuse_shared_run(str(self._run_dir), [other._run_dir for other in managers])
        self._signal = StopSignal() if self._saves_on_signal else None
        if managers[0] is self:
            sigterm = module_of(tree, "utilities.exceptions").SIGTERMException
            notify = _log.warning if ranks.leads else _log.debug
            self._hooks = LoopHooks(trainer, self, notify=notify, sigterm=sigterm)
            self._hooks.install()
        else:
            self._hooks = managers[0]._hooks
        assert self._run_dir is not None
        if self._logs is None:
            self.before_loggers_begin(trainer)
        self._resumption = Resume(
            trainer,
            checkpoint_io,
            self._run_dir,
            self._resume,
            self._open,
            ranks,
            preprocessor=self._preprocessor,
            on_changed_options=self._on_changed_options,
            strict_environment=self._strict_environment,
            storage_options=self._storage_options,
            is_overridden=self._is_overridden,
            selection=self._selection,
        )
        self._resumption.install(self._hooks, self._logs, leads=managers[0] is self)
        self._logs = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Accept what was restored, prove that everything can be saved, and listen to signals."""
        if self._resumption is None:
            return
        resumption, hooks = self._resumption, self._hooks
        assert hooks is not None
        run = resumption.opened()
        assert self._ranks is not None
        names = resumption.validation_names
        continued = resumption.accept()
        self._report = resumption.report
        self._saver = Saver(
            trainer,
            run,
            hooks,
            self._ranks,
            trigger=self._trigger,
            weights_only=self.save_weights_only,
            on_exception=self._saves_on_exception,
            on_signal=self._saves_on_signal,
            continued=continued,
            validation_names=names,
            preprocessor=self._preprocessor,
            golden=GoldenRecorder(GOLDEN, self._golden),
        )
        self._saver.prove()
        if self._signal is not None:
            self._signal.install()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note that parameters are about to change: until the step ends, nothing can be saved."""
        if self._saver is not None:
            self._saver.step_begins()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note that parameters may be swapped for averaged ones."""
        if self._saver is not None:
            self._saver.validation_begins()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note which metrics validation logged, and at which step."""
        if self._saver is not None:
            self._saver.validation_ends()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Nothing: the module's own hook comes after this one. Saves happen at step boundaries."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing, for the same reason."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if there was nothing to train."""
        if self._resumption is not None and self._resumption.leads and self._hooks is not None and self._hooks.finish():
            self._say(
                f"{self._run_dir} is finished: step {trainer.global_step}, nothing left to train. Raise max_epochs or "
                "max_steps to go on" + (f", or pass ckpt_path={self.last_model_path!r}" if trainer.should_stop else "")
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wait for the last save, and let go of the Trainer and of the run."""
        if stage == "fit":
            self._end(trainer, "finished", None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save the last completed step if asked to, and let go. ``teardown`` is not called after exceptions."""
        if self._resumption is None:
            self._part(exception)
            return
        outcome: Literal["failed", "preempted"] = "preempted" if isinstance(exception, Preempted) else "failed"
        try:
            if outcome == "failed" and self._saver is not None:
                self._saver.save_last_step(exception)
        except Exception as failure:
            exception.add_note(f"ckptmgr: nothing was saved after this exception: {failure}")
            _log.exception("nothing was saved after the exception")
        try:
            error = None if outcome == "preempted" else f"{type(exception).__name__}: {exception}"
            self._end(trainer, outcome, error, exception)
        except Exception as failure:
            exception.add_note(f"ckptmgr: {failure}")
            _log.exception("the run could not be closed")

    # Boundaries.

    def at_boundary(self, boundary: Boundary) -> None:
        """Save where that is due, in every manager of the Trainer."""
        assert self._ranks is not None
        if boundary.place == "validated" and not boundary.has_validated and self._ranks.world_size > 1:
            # Only here because this rank was told to stop; the others are not.
            return
        rng = capture_rng()
        savers = [manager._saver for manager in _managers(self._trainer) if manager._saver is not None]
        told_to_stop, is_agreed = self.is_told_to_stop(), False
        for saver in savers:
            agreed = saver.at_boundary(boundary, rng, told_to_stop=told_to_stop, is_agreed=is_agreed)
            if agreed is not None:
                told_to_stop, is_agreed = agreed, True
        if is_agreed and told_to_stop:
            if self._ranks.leads:
                _log.warning(STOPPED, self._run_dir, self._trainer.global_step)
            raise Preempted

    def at_cut_validation(self) -> None:
        """Save the step before a validation that SIGTERM has cut short, in every manager, and end."""
        savers = [manager._saver for manager in _managers(self._trainer) if manager._saver is not None]
        if any(saver.is_validating for saver in savers):
            for saver in savers:
                saver.save_before_validation()
            raise Preempted

    def is_told_to_stop(self) -> bool:
        """Say whether SIGTERM came in."""
        return self._signal is not None and self._signal.received is not None

    def told_to_stop(self, signum: int) -> bool:
        """Take note of a signal that Lightning got. On several ranks that is all: they stop at the same step."""
        if self._signal is None or self._ranks is None or self._ranks.world_size == 1:
            return False
        self._signal.received = signum
        return True

    # The run.

    def _open(self, resume: str) -> TrainingRun:
        assert self._run_dir is not None
        assert self._resumption is not None
        return TrainingRun.open(
            self._run_dir,
            resume=resume,
            retention=self._retention,
            monitor=self._monitor,
            storage_options=self._storage_options,
            background=self._background,
            check=self._resumption.check,
            ranks=self._ranks,
            shards=ParameterNames({MODEL: self._trainer.lightning_module}).shards(),
            on_divergence=self._on_divergence,
            classes=class_sources(self._trainer.lightning_module),
            strict_environment=self._strict_environment,
        )

    def _join(self, trainer: Any) -> Ranks:
        """Meet the other ranks, and agree on the run: its directory, and what to go on with, are what rank 0 says."""
        if self._ranks is None:
            refuse_strategy(trainer)
            self._ranks = join_trainer(trainer, timeout_s=self._ranks_timeout_s)
            self._settle_run_dir(trainer, fresh=True)
            chosen: Any = [self._run_dir, self._resume, self._is_overridden]
            told = self._ranks.loop.decide("choosing the run", lambda: chosen)
            self._run_dir, self._resume, self._is_overridden = told
        return self._ranks

    def _part(self, error: BaseException | None) -> None:
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close(error)

    def _end(
        self,
        trainer: Any,
        outcome: Literal["finished", "failed", "preempted"],
        error: str | None,
        exception: BaseException | None = None,
    ) -> None:
        saver, self._saver = self._saver, None
        resumption, self._resumption = self._resumption, None
        run = None
        if saver is not None:
            saver.close()
        if resumption is not None:
            resumption.uninstall()
            run = resumption.run
            if resumption.leads and self._hooks is not None:
                self._hooks.uninstall()
        try:
            if run is not None:
                self._past = run
                run.close(outcome, step=trainer.global_step, error=error)
                if self._ranks is not None and outcome != "failed":
                    # Who starts the ranks takes the first one that is gone for a failure, and kills those that write.
                    self._ranks.loop.together("the end of the run", lambda: None)
        finally:
            is_one_of_many = self._ranks is not None and self._ranks.world_size > 1
            self._part(exception or sys.exception())
            # Last: a second signal must not end the process while the save that the first one asked for is written.
            if self._signal is not None and self._hooks is not None and outcome == "preempted" and is_one_of_many:
                self._signal.ignore()
                self._hooks.ignore_sigterm()
            elif self._signal is not None:
                self._signal.uninstall()

    def _say(self, message: str) -> None:
        module_of(tree_for(self._trainer, self), "utilities.rank_zero").rank_zero_info(message)


def _managers(trainer: Any) -> list[CheckpointManager]:
    return [callback for callback in trainer.callbacks if isinstance(callback, CheckpointManager)]
