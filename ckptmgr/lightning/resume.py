"""Opening the run in ``fit``, and handing what it continues to Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ckptmgr.errors import CheckpointNotFoundError, UsageError
from ckptmgr.launch.run_directory import absolute
from ckptmgr.lightning.assemble import (
    DATA,
    METRICS,
    MODEL,
    RNG,
    TRAINER,
    WEIGHTS_ONLY_REASON,
    check_model,
    in_names_of,
    load_model,
    options_of,
    restore_optimizers_and_schedulers,
)
from ckptmgr.lightning.compat import module_of, tree_of
from ckptmgr.lightning.filesystem import own_reference, url_of
from ckptmgr.lightning.loggers import Logs
from ckptmgr.lightning.loops import LoopHooks
from ckptmgr.lightning.preprocessing import PREPROCESSOR, KeptPreprocessor
from ckptmgr.lightning.selecting import TrainerSelection, restore_selected
from ckptmgr.lightning.trainer_metrics import restore_metrics
from ckptmgr.loading import LoadedCheckpoint, load_checkpoint
from ckptmgr.ranks.group import Ranks
from ckptmgr.resume_drift import tell_drift
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.rng import capture_rng
from ckptmgr.state.selection import Selection, SelectionReport
from ckptmgr.state.sources import class_sources
from ckptmgr.state.training_options import OnChangedOptions
from ckptmgr.state.trees import copied_tree
from ckptmgr.storage.open import open_storage
from ckptmgr.training_run import RUN_DIR_VARIABLE, TrainingRun
from ckptmgr.words import printable_place, where_it_begins

__all__ = ["Resume"]

_log = logging.getLogger("ckptmgr")


class Resume:
    """One ``fit``'s way into a run.

    Lightning resolves ``ckpt_path`` before any callback is asked, so the place to choose is where it reads the
    checkpoint: ``resume_start`` of the live connector is replaced, for one call.

    Args:
        trainer: The Trainer, in its ``setup``.
        checkpoint_io: Ours, installed.
        run_dir: The manager's run.
        resume: The manager's choice.
        open_run: Claims the run, given a choice.
        ranks: The processes of the job.
        preprocessor: The manager's.
        on_changed_options: What to do about options that differ from the checkpoint's.
        strict_environment: Refuse to go on where the environment differs from the checkpoint's.
        storage_options: For reading other runs.
        is_overridden: ``ckptmgr resume`` says which run it is; what the script says does not count.
        selection: What to restore of a checkpoint that is named. What this run's own starts go on from by themselves is
            restored whole: a job that is requeued would lose the same parts again at each start.

    Attributes:
        leads: This manager resumes the Trainer; others of the same Trainer only save.
        run: The open run, once there is one.
        loaded: What is being restored; None on a fresh start, and once it was accepted.
        validation_names: Metrics that are logged by validation.
        report: What a selective restore did not restore; None where there was none, or not yet.
    """

    def __init__(
        self,
        trainer: Any,
        checkpoint_io: Any,
        run_dir: str,
        resume: str,
        open_run: Callable[[str], TrainingRun],
        ranks: Ranks,
        *,
        preprocessor: KeptPreprocessor,
        on_changed_options: OnChangedOptions,
        strict_environment: bool,
        storage_options: Mapping[str, Any] | None,
        is_overridden: bool = False,
        selection: Selection | None = None,
    ) -> None:
        self.leads = False
        self.report: SelectionReport | None = None
        self.run: TrainingRun | None = None
        self.loaded: LoadedCheckpoint | None = None
        self.validation_names: set[str] = set()
        self._trainer = trainer
        self._io = checkpoint_io
        self._run_dir = run_dir
        self._resume = resume
        self._open_run = open_run
        self._ranks = ranks
        self._preprocessor = preprocessor
        self._on_changed_options = on_changed_options
        self._storage_options = storage_options
        self._strict_environment = strict_environment
        self._is_overridden = is_overridden
        self._selection = selection
        self._is_named = False
        self._logs: Logs | None = None
        self._hooks: LoopHooks | None = None
        self._sanity_steps: int | None = None
        self._weights_before: dict[str, Any] | None = None

    def install(self, hooks: LoopHooks | None, logs: Logs | None, *, leads: bool) -> None:
        """Take the place of the connector's ``resume_start``. Who does not lead has no logs."""
        self.leads, self._hooks, self._logs = leads, hooks, logs
        if not leads:
            return
        connector = self._trainer._checkpoint_connector
        original = connector.resume_start

        def resume_start(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
            vars(connector).pop("resume_start", None)
            chosen = self._choose(checkpoint_path)
            if self._logs is not None and self.run is not None:
                self._logs.chosen(self.run)
            original(chosen, *args, **kwargs)

        connector.resume_start = resume_start

    def uninstall(self) -> None:
        """Leave nothing of ours on the connector, and nothing in the model of a restore that was not accepted.

        Idempotent. Lightning loads the model before there are optimizers and loaders to compare with the checkpoint.
        """
        if self._weights_before is not None:
            self._trainer.lightning_module.load_state_dict(self._weights_before)
            self._weights_before = None
        connector = self._trainer._checkpoint_connector
        for name in ("resume_start", "restore_optimizers_and_schedulers", "restore_training_state"):
            vars(connector).pop(name, None)
        self._restore_sanity_check()
        self._io.preloaded.clear()
        if self._logs is not None:
            self._logs.close()

    def opened(self) -> TrainingRun:
        """Return the run; opens it if this manager does not lead."""
        self._restore_sanity_check()
        if self.run is None:
            self.run = self._open_following()
        return self.run

    def check(self, loaded: LoadedCheckpoint) -> None:
        """Compare the model with what is selected of a checkpoint, before the run is claimed. Changes nothing.

        Raises:
            StateMismatchError, UsageError: It does not fit.
        """
        chosen = self._select(loaded)
        module = self._trainer.lightning_module
        check_model(module, in_names_of(module, loaded) if chosen is None else chosen.loaded)
        self._preprocessor.check(loaded, _preprocessor_of(loaded, chosen))

    def accept(self) -> Any:
        """Record the line, and free what was loaded.

        Returns:
            The id of the checkpoint that was continued, if it is one of this run.
        """
        assert self.run is not None
        assert self._hooks is not None
        if self._hooks.options is None:
            self._hooks.options = options_of(self._trainer, self._on_changed_options)
        loaded = self.run.continued
        self.run.accept()
        if self._logs is not None:
            # Checkpoints of earlier versions know nothing of loggers.
            self._logs.begin(self.run, () if loaded is None else loaded.entries[TRAINER].tree.get("loggers", ()))
        self.run.continued = self.loaded = self._weights_before = None
        return None if loaded is None else loaded.manifest.id

    def _choose(self, checkpoint_path: Any) -> Any:
        if checkpoint_path is not None and self._is_overridden:
            self._say(f"ckpt_path={str(checkpoint_path)!r} is ignored: {RUN_DIR_VARIABLE} says which run to resume")
            checkpoint_path = None
        explicit = checkpoint_path is not None
        if explicit:
            reference = own_reference(checkpoint_path)
            if reference is None:
                if self._selection is not None:
                    raise UsageError(
                        f"selection cannot be applied to ckpt_path={str(checkpoint_path)!r}",
                        why="it is a file of Lightning's, which Lightning restores as a whole",
                        next="load the weights in the program, with torch.load and load_state_dict(strict=False)",
                    )
                # A file of Lightning's own: restored as Lightning does, saved from then on as we do.
                self.run = self._open_run("never")
                return checkpoint_path
            self._is_named = True
            self._open_at(reference)
        elif self._trainer.global_step > 0:
            # A second fit of this Trainer goes on from what is in memory.
            self.run = self._open_following()
            return None
        else:
            self._open_as_chosen()
        if self.loaded is None:
            self._say(where_it_begins(self._run_dir, None))
            return None
        chosen = self._select(self.loaded)
        if chosen is None:
            if self._selection is not None:
                self._say("selection is not applied: this run goes on from its own checkpoint, and no other was named")
            return self._hand_over(self.loaded, None, explicit=explicit)
        if chosen.starts_anew:
            self._begin_with(chosen)
            return None
        return self._hand_over(chosen.loaded, chosen, explicit=explicit)

    def _select(self, loaded: LoadedCheckpoint) -> TrainerSelection | None:
        """Apply the selection, if there is one, to a checkpoint that somebody has named."""
        if self._selection is None or not self._is_named or self._is_overridden:
            return None
        return TrainerSelection(self._selection, loaded, self._trainer.lightning_module, self._preprocessor)

    def _open_as_chosen(self) -> None:
        if self._resume in ("auto", "must", "never") or not any(mark in self._resume for mark in "/@\\"):
            self._is_named = self._resume not in ("auto", "must", "never")
            self.run = self._open_run(self._resume)
            self.loaded = self.run.continued
            return
        # A fork: another run's checkpoint is where this one begins, and not where it goes back to when it is requeued.
        if self._newest_step() is not None:
            self.run = self._open_run("auto")
            self.loaded = self.run.continued
        else:
            self._is_named = True
            self._open_at(parse_reference(self._resume))

    def _open_at(self, reference: Reference) -> None:
        if absolute(reference.run_dir) == self._run_dir:
            self.run = self._open_run("must" if reference.selector == "latest" else reference.selector)
            self.loaded = self.run.continued
            return
        shards = ParameterNames({MODEL: self._trainer.lightning_module}).shards()
        loaded = self.loaded = load_checkpoint(
            reference, storage_options=self._storage_options, ranks=self._ranks, shards=shards
        )
        classes = class_sources(self._trainer.lightning_module)
        storage = open_storage(reference.run_dir, storage_options=self._storage_options)
        self._ranks.loop.decide(
            "comparing the environment with the checkpoint's",
            lambda: tell_drift(storage, loaded, classes, strict=self._strict_environment),
        )
        self.run = self._open_run("never")

    def _open_following(self) -> TrainingRun:
        """Open a run that goes on from the state in memory."""
        is_current = self._newest_step() == self._trainer.global_step
        return self._open_run("auto" if is_current else "never")

    def _newest_step(self) -> int | None:
        return self._ranks.loop.decide("looking for the newest step of the run", self._look_for_newest_step)

    def _look_for_newest_step(self) -> int | None:
        catalog = Catalog(open_storage(self._run_dir, storage_options=self._storage_options))
        if not catalog.is_run:
            return None
        try:
            return catalog.latest().step
        except CheckpointNotFoundError:
            return None

    def _begin_with(self, chosen: TrainerSelection) -> None:
        """Put the model's part of a checkpoint into the model, and that of optimizers when they are built.

        Lightning is told of no checkpoint: its loops begin at step 0.
        """
        trainer, hooks = self._trainer, self._hooks
        assert hooks is not None
        assert self.run is not None
        module = trainer.lightning_module
        self._check_together(chosen.loaded, chosen)
        self._weights_before = copied_tree(dict(module.state_dict()))
        load_model(module, chosen.loaded)
        connector = trainer._checkpoint_connector
        original = connector.restore_training_state

        def restore() -> None:
            vars(connector).pop("restore_training_state", None)
            hooks.options = options_of(trainer, self._on_changed_options)
            options = hooks.options
            self.report = self._ranks.loop.together(
                "restoring parts of optimizers", lambda: restore_selected(trainer, chosen, options)
            )
            self._preprocessor.restore(chosen.preprocessor)
            original()

        connector.restore_training_state = restore
        # The steps to come lie before the checkpoint's, so the line must not lead through it: the next resume would go
        # back to it.
        self.run.continued = self.loaded = None
        place = printable_place(self._run_dir)
        self._say(f"saving in {place}: training starts at step 0 with parts of {chosen.loaded.reference}")

    def _hand_over(self, loaded: LoadedCheckpoint, chosen: TrainerSelection | None, *, explicit: bool) -> str:
        trainer, hooks = self._trainer, self._hooks
        assert hooks is not None
        url = url_of(loaded.reference)
        tree = loaded.entries[TRAINER].tree if TRAINER in loaded.entries else {}
        is_new_rank = self._ranks.rank >= loaded.manifest.topology.world_size
        needed = {DATA} if "imported" in tree else {DATA, RNG}
        if tree.get("weights_only") or not needed <= loaded.entries.keys():
            raise UsageError(
                f"{loaded.reference} cannot be resumed",
                why=WEIGHTS_ONLY_REASON if tree.get("weights_only") else "it was not saved by a CheckpointManager",
                next=f"start another run from its weights: Model.load_from_checkpoint({url!r})",
            )
        loaded = loaded if chosen is not None else in_names_of(trainer.lightning_module, loaded)
        tree = loaded.entries[TRAINER].tree
        self._check_together(loaded, chosen)
        self._weights_before = copied_tree(dict(trainer.lightning_module.state_dict()))
        position = loaded.entries[DATA].tree
        if explicit and position["place"] == "epoch":
            # Named by hand, a run that was stopped early is meant to go on.
            position = {**position, "should_stop": False}
        self.validation_names = set(tree["validation_names"])
        metrics = loaded.entries[METRICS].tree if METRICS in loaded.entries else tree.get("metrics")

        def restore_logged() -> None:
            if metrics is not None:
                restore_metrics(trainer, metrics, is_new_rank=is_new_rank)

        has_rng = RNG in loaded.entries and (chosen is None or chosen.restores_rng)
        hooks.resume_at(
            position,
            loaded.entries[RNG].tree if has_rng else capture_rng(),
            step=loaded.manifest.step,
            on_resumed=restore_logged,
        )
        if "imported" in tree and self._ranks.leads:
            _log.warning("it was imported from %s: %s", tree["imported"]["from"], "; ".join(tree["imported"]["lacks"]))
        connector = trainer._checkpoint_connector

        def restore() -> None:
            vars(connector).pop("restore_optimizers_and_schedulers", None)
            self._ranks.loop.together("restoring optimizers and schedulers", restore_them)

        def restore_them() -> None:
            hooks.options = options_of(trainer, self._on_changed_options)
            if chosen is None:
                restore_optimizers_and_schedulers(trainer, loaded, hooks.options)
            else:
                self.report = restore_selected(trainer, chosen, hooks.options)
            self._preprocessor.restore(_preprocessor_of(loaded, chosen))

        connector.restore_optimizers_and_schedulers = restore
        # It would run the model and its metrics once more than the run that goes on did.
        self._sanity_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0
        self._io.preloaded[url] = loaded
        data = position["data"] or {"epoch": 0, "batches": 0}
        step = loaded.manifest.step
        self._say(where_it_begins(loaded.run_dir, step, epoch=data["epoch"], nbatches=data["batches"]))
        return url

    def _check_together(self, loaded: LoadedCheckpoint, chosen: TrainerSelection | None) -> None:
        def check() -> None:
            check_model(self._trainer.lightning_module, loaded)
            self._preprocessor.check(loaded, _preprocessor_of(loaded, chosen))

        self._ranks.loop.together("comparing the checkpoint with the model", check)

    def _restore_sanity_check(self) -> None:
        if self._sanity_steps is not None:
            self._trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None

    def _say(self, message: str) -> None:
        tree = tree_of(self._trainer)
        assert tree is not None
        module_of(tree, "utilities.rank_zero").rank_zero_info(message)


def _preprocessor_of(loaded: LoadedCheckpoint, chosen: TrainerSelection | None) -> CapturedEntry | None:
    return loaded.entries.get(PREPROCESSOR) if chosen is None else chosen.preprocessor
