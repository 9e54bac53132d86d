"""Step boundaries in Lightning's fit loop, and starting the loop at one of them.

A step boundary lies between a training batch (with everything that hooks do about it) and what Lightning does after it:
validation, schedulers that follow a metric, the end of the epoch. A checkpoint is taken there, so a crash during
validation costs nothing, and a resumed run goes on with exactly that: it validates if validation was due. A second
kind of boundary lies at the very end of an epoch.

Lightning has no hook at these places, so methods of the live loop objects are wrapped, for the time of one ``fit``.
The restart logic of Lightning's own is not used: it takes up a checkpoint of ``on_train_batch_end`` after the
validation that the checkpoint preceded, and at an epoch's end with ``max_steps`` it goes on in the wrong epoch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ckptmgr.lightning.batch_size import changed_batch_sizes
from ckptmgr.lightning.elastic_loader import ElasticLoaders
from ckptmgr.lightning.train_data import TrainData, capture_idle_loaders, restore_idle_loaders
from ckptmgr.state.rng import restore_rng
from ckptmgr.state.training_options import TrainingOptions

__all__ = ["Boundary", "BoundaryListener", "LoopHooks"]

Place = Literal["step", "validated", "epoch"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """A moment at which the state is consistent.

    Attributes:
        place: ``"step"``: the batch is done, validation that is due has not run. ``"validated"``: it has.
            ``"epoch"``: the whole epoch is done, hooks and schedulers included.
        is_epoch_end: The last batch of the epoch has been trained.
        is_validation_due: Validation comes next.
        has_validated: Validation ran since the step ended.
    """

    place: Place
    is_epoch_end: bool
    is_validation_due: bool = False
    has_validated: bool = False


class BoundaryListener(Protocol):
    """Who wants to know about boundaries."""

    def at_boundary(self, boundary: Boundary) -> None:
        """Called at each boundary; may save, and may raise to end the training."""

    def at_cut_validation(self) -> None:
        """Called when Lightning has acted on SIGTERM; raises to end the training if that cut a validation short."""

    def is_told_to_stop(self) -> bool:
        """Say whether a signal to stop came in; Lightning's own reaction to it is then ours."""

    def told_to_stop(self, signum: int) -> bool:
        """Take note of a signal to stop that Lightning got; return whether that is all that is to happen now."""


class LoopHooks:
    """Wraps the loops of one Trainer.

    Args:
        trainer: A Trainer whose internals have been checked.
        listener: Told about each boundary.
        notify: Takes one sentence for the user.
        sigterm: Lightning's exception that says that SIGTERM came.

    Attributes:
        data: The position in the train loaders.
        options: The options that training follows; None until optimizers and schedulers are built.
    """

    def __init__(
        self, trainer: Any, listener: BoundaryListener, *, notify: Callable[[str], None], sigterm: type[BaseException]
    ) -> None:
        self._trainer = trainer
        self._fit = trainer.fit_loop
        self._epoch = trainer.fit_loop.epoch_loop
        self._listener = listener
        self._sigterm = sigterm
        self._patched: list[tuple[Any, str]] = []
        self._pending: Mapping[str, Any] | None = None
        self._rng: Mapping[str, Any] | None = None
        self._on_resumed: Callable[[], None] = lambda: None
        self._lifted: tuple[int, int | None] | None = None
        self._is_inside = False
        self._is_restored = False
        self._is_counted_anew = False
        self._starts_here = False
        self._notify = notify
        self.data = TrainData(notify)
        self._elastic = ElasticLoaders(trainer, notify)
        self.options: TrainingOptions | None = None

    def install(self) -> None:
        """Wrap the loops' methods. Idempotent."""
        if self._patched:
            return
        wrappers: dict[str, Callable[..., Any]] = {
            "setup_data": self._setup_data,
            "_load_combined_loader_states": self._before_first_iteration,
            "reset": self._reset,
            "on_advance_start": self._on_epoch_start,
            "on_advance_end": self._on_epoch_end,
        }
        for name, wrapper in wrappers.items():
            self._patch(self._fit, name, wrapper)
        wrappers = {
            "reset": self._reset_epoch,
            "on_run_start": self._on_epoch_run_start,
            "advance": self._advance,
            "on_advance_end": self._on_batch_end,
        }
        for name, wrapper in wrappers.items():
            self._patch(self._epoch, name, wrapper)
        self._patch(self._trainer._data_connector, "_prepare_dataloader", self._elastic.prepare)
        self._patch(self._trainer._signal_connector, "_sigterm_notifier_fn", self._note_sigterm)

    def uninstall(self) -> None:
        """Take the wrappers away. Idempotent."""
        for target, name in self._patched:
            vars(target).pop(name, None)
        self._patched.clear()
        self._lower()

    def ignore_sigterm(self) -> None:
        """Let the Trainer's teardown leave SIGTERM ignored, instead of putting back what was there before."""
        handlers = self._trainer._signal_connector._original_handlers
        if handlers:
            handlers[signal.SIGTERM] = signal.SIG_IGN

    def resume_at(
        self, position: Mapping[str, Any], rng: Mapping[str, Any], *, step: int, on_resumed: Callable[[], None]
    ) -> None:
        """Start the next ``fit`` at a saved position instead of its beginning.

        Args:
            position: What `capture` returned.
            rng: RNG of that moment, put in place when the loop goes on.
            step: The Trainer's global step then.
            on_resumed: Called when the loop goes on.
        """
        data = position["data"]
        if data is not None and data.get("imported") and data["is_last"]:
            # Nothing is known of its loaders, and nothing has to be.
            position, data = {**position, "data": None}, None
        self._pending, self._rng, self._on_resumed = position, rng, on_resumed
        self._elastic.go_on_with(data)
        self._is_inside = data is not None and not data["is_last"]
        if position["place"] == "epoch":
            # An epoch that a limit ended early goes on only if the limit was raised.
            is_reached = self._epoch.max_steps != -1 and step >= self._epoch.max_steps
            self._is_inside = self._is_inside and not is_reached and not position["should_stop"]
        self._is_restored = False

    def finish(self) -> bool:
        """Say whether training ended before the loop went on at all: there was nothing left to train."""
        if self._pending is None:
            return False
        self._arrive()
        return True

    def capture(self, boundary: Boundary) -> dict[str, Any]:
        """Return the position at this boundary: plain values, and tensors that nobody changes."""
        progress = self._epoch.batch_progress
        combined = self._fit._combined_loader
        is_last = bool(self._epoch._num_ready_batches_reached())
        validation = self._epoch.val_loop._combined_loader
        return {
            "place": boundary.place,
            "should_stop": bool(self._trainer.should_stop),
            "reloaded_at": [
                self._fit._last_train_dl_reload_epoch,
                self._epoch.val_loop._last_val_dl_reload_epoch,
            ],
            "data": None
            if combined is None
            else self.data.capture(
                list(combined.flattened),
                epoch=int(self._fit.epoch_progress.current.processed) - (boundary.place == "epoch"),
                batches=int(progress.current.ready),
                is_last=is_last,
            ),
            "validation": None if validation is None else capture_idle_loaders(list(validation.flattened)),
        }

    def _patch(self, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(target, name)
        is_ours = self._is_ours

        def patched(*args: Any, **kwargs: Any) -> Any:
            # A tuner takes all callbacks out and runs the same loops for its own ends.
            return wrapper(original, *args, **kwargs) if is_ours() else original(*args, **kwargs)

        setattr(target, name, patched)
        self._patched.append((target, name))

    def _is_ours(self) -> bool:
        return any(callback is self._listener for callback in self._trainer.callbacks)

    # The places, in the order in which a fit passes them.

    def _note_sigterm(self, original: Callable[..., Any], signum: int, frame: Any) -> None:
        # Lightning's own way calls a collective in the handler, and ends the ranks at different places.
        if not self._listener.told_to_stop(signum):
            original(signum, frame)

    def _setup_data(self, original: Callable[..., Any]) -> None:
        before = self._fit._combined_loader, self._fit._data_fetcher
        original()
        fetcher, combined = self._fit._data_fetcher, self._fit._combined_loader
        # Counted anew meanwhile, perhaps.
        pending = self._pending
        is_new = fetcher is not None and (combined, fetcher) != before
        if pending is None:
            if is_new:
                self.data.watch(fetcher)
            return
        if is_new and combined is not None and pending["data"] is not None:
            loaders = list(combined.flattened)
            if self._is_inside:
                self.data.go_to(pending["data"], fetcher, loaders)
            else:
                self.data.start_next_epoch(pending["data"], loaders)
                self.data.watch(fetcher)
        if self._fit._loaded_from_state_dict and not self._is_restored:
            self._is_restored = True
            self._restore_progress(pending)

    def _before_first_iteration(self, original: Callable[..., Any]) -> None:
        self._fit._combined_loader_states_to_load = []
        loaders = list(self._fit._combined_loader.flattened)
        pending = self._pending
        if pending is None or pending["data"] is None:
            self.data.before_iterating(loaders, self._trainer.current_epoch)
            return
        if pending["data"].get("imported"):
            pending = self._pending = {**pending, "data": self.data.begun_elsewhere(pending["data"], loaders)}
        position = self.data.check(pending["data"], loaders)
        if self.options is not None:
            self.options.applied += changed_batch_sizes(pending["data"], loaders)
        if position is not pending["data"]:
            # No batch of the new size ends here: nothing that a batch brings about can be due.
            place = "validated" if pending["place"] == "step" and not position["batches"] else pending["place"]
            self._pending = {**pending, "data": position, "place": place}
            self._is_counted_anew = True
            every = self._trainer.accumulate_grad_batches
            if position["batches"] % every:
                first = every - position["batches"] % every
                self._notify(
                    f"not exact: the next step gathers {first} of {every} batches, once, by the new batch size"
                )
        if self._is_inside:
            self.data.prepare(position, loaders)
        else:
            self.data.before_iterating(loaders, self._trainer.current_epoch)

    def _restore_progress(self, pending: Mapping[str, Any]) -> None:
        train_reload, val_reload = pending["reloaded_at"]
        self._fit._last_train_dl_reload_epoch = train_reload
        if pending["place"] == "epoch" and self._is_inside:
            # The epoch was ended early, by a limit that has been raised since.
            for tracker in (self._fit.epoch_progress.total, self._fit.epoch_progress.current):
                tracker.processed -= 1
                tracker.completed -= 1
        if self._is_counted_anew:
            current, batches = self._epoch.batch_progress.current, pending["data"]["batches"]
            current.ready = current.started = current.processed = current.completed = batches
        val_loop = self._epoch.val_loop
        if pending["validation"] is not None:
            if val_loop._combined_loader is None:
                # Now, and not when validation is next due: making loaders may draw random numbers.
                self._trainer.validating = True
                val_loop.setup_data()
                self._trainer.training = True
            if val_loop._combined_loader is not None:
                restore_idle_loaders(list(val_loop._combined_loader.flattened), pending["validation"])
        val_loop._last_val_dl_reload_epoch = val_reload
        # `run` leaves at once where a limit is reached, and with it what was still to come: validation of the last
        # step, and the hooks of the end. So the limits are lifted until it has passed that check.
        self._lifted = (self._epoch.max_steps, self._fit.max_epochs)
        self._epoch.max_steps, self._fit.max_epochs = -1, -1

    def _lower(self) -> None:
        if self._lifted is not None:
            self._epoch.max_steps, self._fit.max_epochs = self._lifted
            self._lifted = None

    def _reset(self, original: Callable[..., Any]) -> None:
        pending = self._pending
        if pending is None or self._lifted is None:
            original()
            return
        max_steps = self._lifted[0]
        self._lower()
        original()
        goes_on = pending["place"] != "epoch" or self._is_inside
        for loop in self._all_loops():
            loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        self._fit._restart_stage = self._epoch._restart_stage = "none"
        if not goes_on:
            self._trainer.should_stop = self._trainer.should_stop or bool(pending["should_stop"])
            return
        for loop in (self._fit, self._epoch):
            loop._restarting = loop._resuming_from_checkpoint = True
        self._fit._restart_stage = "restarted_mid_epoch"
        if max_steps != -1 and self._trainer.global_step >= max_steps:
            # What follows the last step is still to come.
            self._lifted = (max_steps, self._fit.max_epochs)
            self._epoch.max_steps = -1

    def _on_epoch_start(self, original: Callable[..., Any]) -> None:
        if self._pending is not None and self._pending["place"] == "epoch" and not self._is_inside:
            self._arrive()
        original()

    def _reset_epoch(self, original: Callable[..., Any]) -> None:
        if self._pending is None:
            original()
        # Else the counters are those of the checkpoint, and exactly right.

    def _on_epoch_run_start(self, original: Callable[..., Any], data_fetcher: Any) -> None:
        will_iterate = self._trainer.current_epoch > 0 and not self._is_resuming() and not self._epoch.restarting
        if will_iterate:
            loaders = list(self._fit._combined_loader.flattened)
            self.data.before_iterating(loaders, self._trainer.current_epoch)
        original(data_fetcher)
        self.data.watch(data_fetcher)

    def _advance(self, original: Callable[..., Any], data_fetcher: Any) -> None:
        if self._pending is None:
            original(data_fetcher)
            return
        place = self._pending["place"]
        self._arrive()
        for loop in (self._fit, self._epoch):
            loop._restarting = loop._resuming_from_checkpoint = False
        if place == "step":
            # The batch was trained before the restart; what follows it comes now.
            self._starts_here = True
        elif self._epoch._is_training_done:
            self._lower()
            raise StopIteration
        else:
            original(data_fetcher)

    def _on_batch_end(self, original: Callable[..., Any], data_fetcher: Any) -> None:
        is_due = bool(self._epoch._should_check_val_fx(data_fetcher))
        is_last = bool(self._epoch._num_ready_batches_reached())
        if self._starts_here:
            self._starts_here = False
        else:
            self._listener.at_boundary(Boundary("step", is_last, is_validation_due=is_due))
        try:
            original(data_fetcher)
        except self._sigterm:
            if not self._listener.is_told_to_stop():
                raise
            self._listener.at_cut_validation()
        self._lower()
        if is_due or self._listener.is_told_to_stop():
            self._listener.at_boundary(Boundary("validated", is_last, has_validated=is_due))

    def _on_epoch_end(self, original: Callable[..., Any]) -> None:
        try:
            original()
        except self._sigterm:
            if not self._listener.is_told_to_stop():
                raise
        is_last = bool(self._epoch._num_ready_batches_reached())
        self._listener.at_boundary(Boundary("epoch", is_epoch_end=is_last))

    def _arrive(self) -> None:
        pending, rng, self._pending, self._rng = self._pending, self._rng, None, None
        assert pending is not None
        assert rng is not None
        if pending["place"] != "epoch":
            self._trainer.should_stop = self._trainer.should_stop or bool(pending["should_stop"])
        self._on_resumed()
        restore_rng(rng)

    def _is_resuming(self) -> bool:
        # Lightning 2.5.0 has only `restarting`.
        return bool(getattr(self._fit, "is_resuming", False))

    def _all_loops(self) -> list[Any]:
        epoch = self._epoch
        return [self._fit, epoch, epoch.val_loop, epoch.automatic_optimization, epoch.manual_optimization]
