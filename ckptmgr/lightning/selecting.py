"""A selection of what a Trainer's checkpoint holds: of its model at once, of optimizers once they are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.lightning.assemble import (
    DATA,
    GOLDEN,
    METRICS,
    MODEL,
    RNG,
    TRAINER,
    drivers_of,
    numbered,
    same_number,
    scheduler_handler,
)
from ckptmgr.lightning.preprocessing import PREPROCESSOR, KeptPreprocessor
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.module import ModuleHandler
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import OptimizerHandler
from ckptmgr.state.selected import SelectedState, select_state
from ckptmgr.state.selection import Selection, SelectionReport
from ckptmgr.state.training_options import TrainingOptions

__all__ = ["TrainerSelection", "restore_selected"]

_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler"
# What Lightning's loops have counted, callbacks and all, lies in the entry of the Trainer.
_WORDS = {"data": DATA, "rng": RNG, "progress": TRAINER}


class TrainerSelection:
    """What is restored of a checkpoint, for one ``fit``.

    Paths are ``model/…``, ``optimizer/…`` and ``scheduler``; where there are several, ``optimizer-0`` is the first of
    them and ``optimizer`` all of them. ``progress`` is everything else of the Trainer: loops, steps and callbacks.

    Args:
        selection: The user's.
        loaded: The checkpoint.
        module: The live module, before its optimizers are built.
        preprocessor: The manager's.

    Attributes:
        loaded: The checkpoint with the model that is restored: what is left out of it is the live one's.
        starts_anew: The Trainer begins at step 0.
        restores_rng: The state of the random number generators is restored.
        preprocessor: The checkpoint's preprocessor, if it is restored.

    Raises:
        UsageError: The selection does not fit the model and the checkpoint, or Lightning cannot do it.
    """

    def __init__(
        self, selection: Selection, loaded: LoadedCheckpoint, module: Any, preprocessor: KeptPreprocessor
    ) -> None:
        if MODEL not in loaded.entries or TRAINER not in loaded.entries:
            raise UsageError(
                f"{loaded.reference} was not saved by a CheckpointManager",
                why=f"it has the entries {', '.join(sorted(loaded.entries))}",
                next="restore it with ckptmgr's Checkpointer",
            )
        if selection.dtype == "saved":
            raise UsageError(
                "dtype='saved' has no meaning for a Trainer",
                why="its precision decides which dtype the model has",
                next="use dtype='live', or another precision",
            )
        self._selection, self._original = selection, loaded
        self._entries = _entries_of(loaded)
        model = self._of_model(module, preprocessor)
        self.preprocessor = model.entries.get(PREPROCESSOR)
        if not preprocessor.state and selection.may_take(PREPROCESSOR):
            # It is selected, and nothing takes it: that is refused where they are compared.
            self.preprocessor = loaded.entries.get(PREPROCESSOR)
        restored = model.entries.get(MODEL) or _captured(module)
        self.loaded = replace(loaded, entries={**loaded.entries, MODEL: restored})
        self.starts_anew = "progress" not in model.words
        self.restores_rng = "rng" in model.words
        self._refuse_halves(model.words)

    def of_drivers(self, drivers: Mapping[str, object], module: Any) -> SelectedState:
        """Apply the selection to everything, now that optimizers and schedulers are there.

        Raises:
            UsageError, StateMismatchError: It does not fit them.
        """
        rest = self._without(PREPROCESSOR)
        return select_state(
            {MODEL: module, **drivers},
            self._entries,
            rest,
            words=_WORDS,
            absent=[word for word, entry in _WORDS.items() if entry not in self._original.entries],
            # Selected alone, it is all that the patterns are about.
            unread=[PREPROCESSOR] if list(rest.include) == [PREPROCESSOR] else (),
            also=_also([*self._entries, *drivers]),
        )

    @property
    def before(self) -> Mapping[str, CapturedEntry]:
        """The checkpoint's model, optimizers and schedulers as they were."""
        return self._entries

    @property
    def options(self) -> Mapping[str, Any] | None:
        """What the checkpoint's program was built with; checkpoints of earlier versions do not say."""
        options: Mapping[str, Any] | None = self._original.entries[TRAINER].tree.get("options")
        return options

    @property
    def reference(self) -> str:
        """Names the checkpoint."""
        return self._original.reference

    def _of_model(self, module: Any, preprocessor: KeptPreprocessor) -> SelectedState:
        # What there is of optimizers is known only when they are built; their patterns are looked at then.
        later = [_OPTIMIZER, _SCHEDULER]
        entries, state = dict(self._entries), {MODEL: module}
        if PREPROCESSOR in self._original.entries:
            entries[PREPROCESSOR] = self._original.entries[PREPROCESSOR]
            state |= preprocessor.state
        return select_state(
            state,
            entries,
            self._without(*later),
            words=_WORDS,
            unread=list(dict.fromkeys((*(name for name in entries if name not in state), *later))),
            also=_also(self._entries),
        )

    def _without(self, *names: str) -> Selection:
        """Return the selection without the patterns that are for these entries."""
        include = [pattern for pattern in self._selection.include if not pattern.startswith(names)]
        exclude = [pattern for pattern in self._selection.exclude if not pattern.startswith(names)]
        return replace(self._selection, include=include or [names[0]], exclude=exclude)

    def _refuse_halves(self, words: frozenset[str]) -> None:
        if ("data" in words) != ("progress" in words) or (self.starts_anew and self.restores_rng):
            left = sorted(_WORDS.keys() - words)
            raise UsageError(
                f"{' and '.join(left)} left out, and {' and '.join(sorted(words))} not",
                why="Lightning's loops count steps, epochs and batches together, and the random state belongs to them",
                next="begin at step 0 with Selection.without('progress', 'data', 'rng') or Selection.only('model'); "
                "'rng' can be left out alone",
            )


def restore_selected(trainer: Any, chosen: TrainerSelection, options: TrainingOptions) -> SelectionReport:
    """Restore what is selected of optimizers and schedulers; checks all of them first. Logs what was not restored.

    Args:
        trainer: It has built them; its model is restored.
        chosen: What to restore.
        options: What `options_of` returned. Options that differ are named or applied.

    Raises:
        StateMismatchError, UsageError: Something does not fit. No optimizer and no scheduler was changed.
    """
    module = trainer.lightning_module
    names = ParameterNames({MODEL: module})
    drivers = drivers_of(trainer)
    selected = chosen.of_drivers(drivers, module)
    for kind, what in ((_OPTIMIZER, "optimizer"), (_SCHEDULER, "LR scheduler")):
        if any(name.startswith(kind) for name in (*selected.entries, *selected.state)):
            counts = [sum(name.startswith(kind) for name in where) for where in (chosen.before, drivers)]
            same_number(what, *counts)
    entries = [(name, value, selected.entries[name].tree) for name, value in drivers.items() if name in selected.state]
    for name, value, tree in entries:
        try:
            _handler(name, value).check(value, tree, names)
        except StateMismatchError as error:
            raise StateMismatchError(f"{name!r}: {error.what}", why=error.why, next=error.next) from error
    trees = {name: tree for name, _, tree in entries}
    built_with = selected.options(chosen.options, chosen.before)
    options.check(built_with, trees, live_options=selected.live_options)
    for name, value, tree in entries:
        _handler(name, value).restore(value, tree, names)
    options.take_up(built_with)
    selected.tell(chosen.reference)
    return selected.report


def _handler(name: str, value: Any) -> Any:
    return OptimizerHandler() if name.startswith(_OPTIMIZER) else scheduler_handler(value)


def _entries_of(loaded: LoadedCheckpoint) -> dict[str, CapturedEntry]:
    """Return model, optimizers and schedulers as entries of their own."""
    others = (*_WORDS.values(), METRICS, PREPROCESSOR, GOLDEN)
    entries = {name: entry for name, entry in loaded.entries.items() if name not in others}
    states = loaded.entries[TRAINER].tree.get("lr_schedulers", ())
    for index, state in enumerate(states):
        name = numbered(_SCHEDULER, index, len(states))
        # Only torch's own have their kind written beside the state.
        handler = _SCHEDULER if isinstance(state, Mapping) and state.keys() == {"type", "state"} else "stateful"
        entries[name] = CapturedEntry(name, handler, 1, state)
    return entries


def _captured(module: Any) -> CapturedEntry:
    handler = ModuleHandler()
    return CapturedEntry(MODEL, handler.name, handler.version, handler.capture(module, ParameterNames({MODEL: module})))


def _also(names: Any) -> dict[str, str]:
    return {name: name.partition("-")[0] for name in names if name.startswith((f"{_OPTIMIZER}-", f"{_SCHEDULER}-"))}
