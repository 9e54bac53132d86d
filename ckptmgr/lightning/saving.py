"""What a manager does at each boundary of one ``fit``: decide, capture, save, and add metrics that come late."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptmgr.boundary import BoundaryCopy
from ckptmgr.golden.record import GoldenRecorder
from ckptmgr.golden.weights import weights_of
from ckptmgr.joint_save import prove_state
from ckptmgr.lightning.assemble import capture_entries
from ckptmgr.lightning.loops import Boundary, LoopHooks
from ckptmgr.lightning.not_logging import not_logging
from ckptmgr.lightning.preprocessing import KeptPreprocessor
from ckptmgr.lightning.trainer_metrics import fresh_metrics, validation_metrics
from ckptmgr.policy.triggers import Moment, Trigger, known_everywhere, may_need_any_step
from ckptmgr.ranks.group import Ranks
from ckptmgr.ranks.steps import StepAgreement
from ckptmgr.state.capture import CapturedEntry
from ckptmgr.state.rng import capture_rng
from ckptmgr.training_run import TrainingRun

__all__ = ["Saver"]

_log = logging.getLogger("ckptmgr")

_AFTER_EXCEPTION_S = 30.0


class Saver:
    """Saves one ``fit`` into one run.

    Args:
        trainer: The Trainer, when training starts.
        run: The run, its line accepted.
        hooks: Knows the position.
        ranks: The processes of the job.
        trigger: When to save.
        weights_only: Save what inference needs.
        on_exception: Keep a copy of each step boundary, for a save after an exception.
        on_signal: Keep a copy of the boundary before each validation, for a signal that cuts it short.
        continued: Id of the checkpoint of this run that training goes on from, if any.
        validation_names: Metrics that earlier attempts logged in validation.
        preprocessor: Saved with the model.
        golden: Makes the golden samples of each save.

    Attributes:
        run: The run.
        latest_metrics: The metrics of the newest boundary.
        is_validating: Validation has begun and has not ended.
    """

    def __init__(
        self,
        trainer: Any,
        run: TrainingRun,
        hooks: LoopHooks,
        ranks: Ranks,
        *,
        trigger: Trigger,
        weights_only: bool,
        on_exception: bool,
        on_signal: bool,
        continued: Any,
        validation_names: set[str],
        preprocessor: KeptPreprocessor,
        golden: GoldenRecorder,
    ) -> None:
        self.run = run
        self.latest_metrics: dict[str, float] = {}
        self._trainer = trainer
        self._hooks = hooks
        self._ranks = ranks
        self._trigger = trigger
        self._known = known_everywhere(trigger)
        self._steps = StepAgreement(ranks.loop, talks_always=may_need_any_step(trigger))
        self._weights_only = weights_only
        self._preprocessor = preprocessor
        self._golden = golden
        self._on_exception = on_exception
        # Several ranks agree before each validation, and none of them is cut short.
        self._on_signal = on_signal and ranks.world_size == 1
        # Where hooks see the optimizer's step, torch's own hook would come too early.
        is_manual = not trainer.lightning_module.automatic_optimization
        self._copy = _StepCopy(trainer.optimizers if is_manual else [])
        self._copied_step = 0
        self._step = self._last_saved_step = int(trainer.global_step)
        self._last_saved_at = time.monotonic()
        self._last_saved = continued
        self._epoch = int(trainer.current_epoch)
        self._has_pending_gradients = False
        self._is_epoch_end_postponed = False
        self._validation_names = set(validation_names)
        self._validated_at: int | None = None
        self.is_validating = False
        self._logged: set[str] = set()
        self._has_warned = False

    def prove(self) -> None:
        """Prove, before the first step, that everything can be stored and comes back as it is.

        Raises:
            UnsupportedStateError: Something cannot. Names its path and type.
            GoldenSampleError: A golden sample raises.
            StateMismatchError: The ranks do not hold the same tensors.
        """
        boundary = Boundary("step", is_epoch_end=False)
        prove_state(self._ranks, lambda: self._with_golden(self._capture(boundary, capture_rng())))

    def step_begins(self) -> None:
        """Note that parameters are about to change: until the step ends, nothing can be saved."""
        self._copy.step_begins()

    def validation_begins(self) -> None:
        """Note that parameters may be swapped for averaged ones."""
        self.is_validating = True

    def validation_ends(self) -> None:
        """Note which metrics validation logged, and at which step."""
        self.is_validating = False
        self._validation_names |= validation_metrics(self._trainer)
        self._validated_at = self._trainer.global_step
        if not self._on_exception:
            self._copy.keep([])
            self._copied_step = 0

    def at_boundary(
        self, boundary: Boundary, rng: Mapping[str, Any], *, told_to_stop: bool, is_agreed: bool = False
    ) -> bool | None:
        """Save if that is due. All ranks of the job decide alike.

        Args:
            boundary: The boundary.
            rng: RNG state there.
            told_to_stop: This process was told to stop.
            is_agreed: All ranks know ``told_to_stop`` already, and it is the same on all of them.

        Returns:
            Whether training must stop here; None where nothing can be saved, so that it goes on.
        """
        step = self._trainer.global_step
        if self._trainer.fit_loop._should_accumulate():
            return None
        if boundary.place == "step":
            # Manual optimization may gather gradients over batches, and they are in no checkpoint.
            self._has_pending_gradients = step == self._step
        if self._has_pending_gradients and not (boundary.place == "epoch" and self._is_training_over()):
            # What is due at the end of the epoch is due with the step that uses them.
            self._is_epoch_end_postponed |= boundary.is_epoch_end
            return None
        self._step = step
        # At an epoch's very end Lightning counts the next one already.
        self._epoch = self._trainer.current_epoch - (boundary.place == "epoch")
        metrics = fresh_metrics(
            self._trainer,
            is_epoch_done=boundary.place == "epoch",
            validation_names=self._validation_names,
            has_validated=self._validated_at == step,
        )
        reason, must_stop, metrics = self._agree(boundary, metrics, told_to_stop, is_agreed=is_agreed)
        self.latest_metrics = metrics
        self._logged |= metrics.keys()
        is_copied = self._on_exception or (self._on_signal and boundary.is_validation_due)
        if reason is not None:
            self._save(self._with_golden(self._capture(boundary, rng)), reason, metrics, wait=must_stop)
        elif is_copied and step != self._last_saved_step:
            self._keep_copy(boundary, rng)
        if reason is None and (boundary.place == "epoch" or (boundary.has_validated and not boundary.is_epoch_end)):
            self._annotate(metrics)
        if boundary.place == "epoch" and self._ranks.leads:
            self._warn_of_missing_monitor()
        return must_stop

    def save_last_step(self, exception: BaseException) -> None:
        """Save the last completed step after an exception, where that is asked for and possible."""
        if self._on_exception:
            self._save_copy(f": {type(exception).__name__}", failed=True)

    def save_before_validation(self) -> None:
        """Save the step before the validation that was cut short, unless it is saved already."""
        self._save_copy("", failed=False)

    def close(self) -> None:
        """Stop watching optimizers."""
        self._copy.close()

    def _keep_copy(self, boundary: Boundary, rng: Mapping[str, Any]) -> None:
        entries = self._capture(boundary, rng)
        if not (boundary.is_validation_due and _averages_weights(self._trainer)):
            # Otherwise parameters are about to be swapped, by a way that leaves no trace on them, so they are copied.
            entries = _with_live_parameters(self._trainer.lightning_module, entries)
        self._copy.keep(entries)
        self._copied_step = self._step

    def _save_copy(self, detail: str, *, failed: bool) -> None:
        if self._copied_step <= self._last_saved_step:
            return
        moment = Moment(step=self._copied_step, last_saved_step=self._copied_step, failed=failed, signalled=not failed)
        reason = self._trigger.reason_to_save(moment)
        if reason is None:
            return
        entries = self._copy.entries()
        if failed and self._ranks.world_size > 1:
            # A rank that goes on training has other things to do than to answer.
            self._ranks.hurry(_AFTER_EXCEPTION_S)
            is_kept = entries is not None
            what = f"saving step {self._copied_step} after an exception"
            if not self._ranks.loop.exchange(what, lambda: is_kept, all):
                entries = None
        if entries is None:
            _log.warning("parameters were being changed: step %d is not saved", self._copied_step)
        else:
            self._step = self._copied_step
            self._save(entries, f"{reason}{detail}", {}, wait=True)

    def _agree(
        self, boundary: Boundary, metrics: dict[str, float], told_to_stop: bool, *, is_agreed: bool
    ) -> tuple[str | None, bool, dict[str, float]]:
        """Return why to save now, whether to stop, and the metrics: all as rank 0 has it."""

        def decide(must_stop: bool) -> str | None:
            return self._reason(boundary, self._trigger, metrics, told_to_stop=must_stop)

        what = f"step {self._step}" + {"step": "", "validated": ", validated"}.get(boundary.place, ", the epoch's end")
        must_stop = is_agreed and told_to_stop
        if boundary.place == "step" and not (boundary.is_validation_due or boundary.is_epoch_end or must_stop):
            reason, must_stop = self._steps.at_step(
                what,
                is_told_to_stop=told_to_stop,
                decide=decide,
                known=lambda: self._reason(boundary, self._known, metrics, told_to_stop=False),
            )
        else:

            def answer(told: Sequence[bool]) -> tuple[str | None, bool, dict[str, float]]:
                return decide(any(told)), any(told), metrics

            reason, must_stop, metrics = self._ranks.loop.exchange(what, lambda: told_to_stop, answer)
        if not self._is_put_off(boundary, must_stop):
            self._is_epoch_end_postponed = False
        return reason, must_stop, metrics

    def _is_put_off(self, boundary: Boundary, told_to_stop: bool) -> bool:
        ends = boundary.place == "epoch" and self._is_training_over()
        if self._step == self._last_saved_step and not ends:
            return True
        # The end of the epoch follows at once: saved there, the checkpoint has the epoch's metrics.
        return boundary.is_epoch_end and boundary.place != "epoch" and not (boundary.is_validation_due or told_to_stop)

    def _reason(
        self, boundary: Boundary, trigger: Trigger, metrics: Mapping[str, float], *, told_to_stop: bool
    ) -> str | None:
        ends = boundary.place == "epoch" and self._is_training_over()
        if self._is_put_off(boundary, told_to_stop):
            return None
        postponed = self._is_epoch_end_postponed
        moment = Moment(
            step=self._step,
            epoch=self._trainer.current_epoch - (boundary.place == "epoch" or postponed),
            is_epoch_end=boundary.is_epoch_end or postponed,
            last_saved_step=self._last_saved_step,
            seconds_since_save=time.monotonic() - self._last_saved_at,
            metrics=metrics,
            seen=self.run.seen,
            signalled=told_to_stop,
        )
        if self._step == self._last_saved_step and not told_to_stop:
            return "end of training"
        return trigger.reason_to_save(moment) or ("end of training" if ends else None)

    def _capture(self, boundary: Boundary, rng: Mapping[str, Any]) -> list[CapturedEntry]:
        entries = capture_entries(
            self._trainer,
            rng=rng,
            position=self._hooks.capture(boundary),
            options=self._hooks.options.in_force if self._hooks.options else {},
            validation_names=self._validation_names,
            weights_only=self._weights_only,
            is_alone=self._ranks.world_size == 1,
        )
        return [*entries, *self._preprocessor.capture()]

    def _with_golden(self, entries: list[CapturedEntry]) -> list[CapturedEntry]:
        """Add what the golden samples give with the weights that these entries hold."""
        module = self._trainer.lightning_module
        with weights_of(module, entries[0].tree["tensors"]), not_logging(module):
            is_alone = self._ranks.world_size == 1
            return [*entries, *self._golden.entries(module, self._preprocessor.value, is_alone=is_alone)]

    def _save(self, entries: list[CapturedEntry], reason: str, metrics: Mapping[str, float], *, wait: bool) -> None:
        self._last_saved = self.run.save(
            entries, step=self._step, epoch=self._epoch, reason=reason, metrics=metrics, wait=wait
        )
        self._last_saved_step = self._step
        self._last_saved_at = time.monotonic()

    def _annotate(self, metrics: Mapping[str, float]) -> None:
        # On all ranks, whatever each of them has logged: what counts is what rank 0 has.
        if self._step == self._last_saved_step and self._last_saved is not None:
            self.run.annotate(self._last_saved, metrics=metrics)

    def _is_training_over(self) -> bool:
        trainer, loop = self._trainer, self._trainer.fit_loop
        steps_done = loop.max_steps != -1 and trainer.global_step >= loop.max_steps
        epochs_done = loop.max_epochs not in (-1, None) and loop.epoch_progress.current.processed >= loop.max_epochs
        return bool(steps_done or epochs_done or (trainer.should_stop and loop._can_stop_early))

    def _warn_of_missing_monitor(self) -> None:
        monitor = None if self.run.monitor is None else self.run.monitor.metric
        is_awaited = self._trainer.enable_validation and self._validated_at is None
        if monitor is None or monitor in self._logged or self._has_warned or is_awaited:
            return
        self._has_warned = True
        known = ", ".join(sorted(self._logged)) or "nothing"
        _log.warning("monitor=%r was not logged, so no checkpoint is the best one; logged so far: %s", monitor, known)


class _StepCopy(BoundaryCopy):
    def step_begins(self) -> None:
        # Lightning runs forward and backward inside of optimizer.step, and tells of the step proper by a hook.
        self._on_step()


def _with_live_parameters(module: Any, entries: list[CapturedEntry]) -> list[CapturedEntry]:
    """Put the parameters themselves where a state dict has aliases of them: they need not be copied."""
    parameters = {p.data_ptr(): p for p in module.parameters() if p.numel()}

    def live(tensor: Any) -> Any:
        parameter = parameters.get(tensor.data_ptr()) if tensor.numel() else None
        return tensor if parameter is None or parameter.shape != tensor.shape else parameter

    return [
        entry
        if entry.handler != "module"
        else replace(
            entry, tree={**entry.tree, "tensors": {name: live(item) for name, item in entry.tree["tensors"].items()}}
        )
        for entry in entries
    ]


def _averages_weights(trainer: Any) -> bool:
    return any(base.__name__ == "WeightAveraging" for callback in trainer.callbacks for base in type(callback).__mro__)
