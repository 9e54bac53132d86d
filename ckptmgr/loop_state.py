"""What a plain training loop has besides the user's objects: RNG, position in the data, step and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.golden.kept import KeptGolden
from ckptmgr.golden.samples import Golden
from ckptmgr.loading import LoadedCheckpoint, load_checkpoint
from ckptmgr.preprocess.handler import PREPROCESSOR
from ckptmgr.ranks.group import Ranks
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.state.capture import CapturedEntry, capture_state, check_state, restore_state
from ckptmgr.state.changed_options import OptionChange
from ckptmgr.state.data_position import DataPosition, OnResume
from ckptmgr.state.loader_facts import describe_loader
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.renamed_entries import in_live_names
from ckptmgr.state.rng import capture_rng, restore_rng
from ckptmgr.state.selected import SelectedState, select_state
from ckptmgr.state.selection import Selection, SelectionReport
from ckptmgr.state.sharding import LiveShards
from ckptmgr.state.sources import class_sources
from ckptmgr.state.training_options import OnChangedOptions, TrainingOptions
from ckptmgr.storage.open import open_storage

__all__ = [
    "RESERVED",
    "LoopObjects",
    "RestoredLoop",
    "SavedPosition",
    "check_loop",
    "meant_reference",
]

_log = logging.getLogger("ckptmgr")

RESERVED = "ckptmgr_"
"""Names of entries that begin so are ours."""

_RNG, _DATA, _PROGRESS = f"{RESERVED}rng", f"{RESERVED}data", f"{RESERVED}progress"
_GOLDEN = f"{RESERVED}golden"
_WORDS = {"data": _DATA, "rng": _RNG, "progress": _PROGRESS}


@dataclass(frozen=True, slots=True)
class SavedPosition:
    """A position in the data that no loader has taken up yet, and the RNG that belongs to it."""

    tree: Mapping[str, Any]
    rng: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RestoredLoop:
    """Where the loop stood.

    Attributes:
        step: Optimizer updates completed.
        metrics: Those of that step.
        position: None where the loop had no data of `batches`, or where it is not restored.
        starts_anew: Steps are counted from 0, so the run's line must not go on from the checkpoint: the steps that
            come would lie before it, and the next resume would go back to it.
    """

    step: int
    metrics: dict[str, float]
    position: SavedPosition | None
    starts_anew: bool = False


class LoopObjects:
    """The user's objects, and how they and the loop's own entries become a checkpoint and come back.

    Args:
        state: The user's objects by name, as the program has built them.
        on_changed_options: What to do about options that differ from those of a checkpoint.
        golden: Samples to keep with each checkpoint.

    Attributes:
        golden: The samples, and what came of them.
        options: The options that training follows.
        report: What the last selective restore did not restore; None where there was none.
    """

    def __init__(
        self, state: Mapping[str, object], on_changed_options: OnChangedOptions, golden: Golden | None = None
    ) -> None:
        self._state = state
        self.golden = KeptGolden(_GOLDEN, golden, state)
        self.report: SelectionReport | None = None
        self.options = TrainingOptions(state, on_changed_options)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers among the user's objects."""
        return [value for value in self._state.values() if isinstance(value, Optimizer)]

    def classes(self) -> dict[str, str | None]:
        """Return the code that the user's modules are made of: class → digest of its source."""
        modules = [value for value in self._state.values() if isinstance(value, torch.nn.Module)]
        return {cls: source for module in modules for cls, source in class_sources(module).items()}

    def shards(self) -> LiveShards:
        """Return the sharded parameters of the user's modules."""
        return ParameterNames.of_state(self._state).shards()

    def capture(
        self, *, step: int, metrics: Mapping[str, float], data: DataPosition | None, position: SavedPosition | None
    ) -> list[CapturedEntry]:
        """Capture the user's objects and the loop's own entries.

        Args:
            step: Optimizer updates completed.
            metrics: Those of that step.
            data: The loop over the batches, if it has begun.
            position: What `restore` gave, until a loop takes it up.
        """
        entries = capture_state(self._state)
        tree = position.tree if position else None
        rng = position.rng if position else None
        if data is not None:
            tree, rng = data.state_dict(), data.pending_rng
        if tree is not None:
            entries.append(CapturedEntry(_DATA, "data-position", 1, tree, "per-rank"))
        progress = {"step": step, "metrics": dict(metrics), "options": self.options.in_force}
        entries.append(CapturedEntry(_PROGRESS, "progress", 1, progress))
        entries.append(CapturedEntry(_RNG, "rng", 1, dict(rng or capture_rng()), "per-rank"))
        return entries

    def check(self, loaded: LoadedCheckpoint, selection: Selection | None = None) -> None:
        """Compare a checkpoint with the user's objects. Changes nothing.

        Args:
            loaded: The checkpoint.
            selection: What of it is to be restored; all by default.

        Raises:
            StateMismatchError: It does not fit, or was not saved from a plain loop.
            UsageError: The selection does not fit the checkpoint and the objects.
            GoldenSampleError: A golden sample raises, and would do so after the restore.
        """
        self.golden.check(loaded, selection)
        if selection is None:
            check_loop(self._known_to(loaded), loaded)
            self._check_options(loaded)
            return
        _refuse_other_savers(loaded)
        selected = self._select(loaded, selection)
        selected.check()
        self._check_selected_options(loaded, selected)

    def restore(self, loaded: LoadedCheckpoint, selection: Selection | None = None) -> RestoredLoop:
        """Put a checkpoint into the user's objects and the RNG.

        Args:
            loaded: The checkpoint.
            selection: What of it to restore; all by default. What was not restored is logged.

        Raises:
            StateMismatchError: It does not fit, or was not saved from a plain loop. Nothing was changed.
            UsageError: The selection does not fit the checkpoint and the objects. Nothing was changed.
        """
        _refuse_other_savers(loaded)
        words = self._restore_objects(loaded, selection)
        own = loaded.entries
        rng: Mapping[str, Any] = capture_rng()
        if "rng" in words:
            rng = own[_RNG].tree
            for note in restore_rng(rng):
                _log.warning("%s", note)
        position = SavedPosition(own[_DATA].tree, rng) if _DATA in own and "data" in words else None
        if "progress" not in words:
            return RestoredLoop(0, {}, position, starts_anew=True)
        return RestoredLoop(loaded.manifest.step, dict(own[_PROGRESS].tree["metrics"]), position)

    def restore_alone(
        self,
        reference: Reference,
        storage_options: Mapping[str, Any] | None,
        selection: Selection | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> int:
        """Put another run's checkpoint into the user's objects alone, and return its step.

        Args:
            reference: Names the checkpoint.
            storage_options: For a URL; a path takes none.
            selection: What of the objects to restore; all by default. Without ``progress`` the step is 0. What was not
                restored is logged.
            ranks: The processes that do it together; by default this one alone.

        Raises:
            StateMismatchError, CheckpointNotFoundError, CorruptCheckpointError: Nothing was changed, on any rank.
            UsageError: The selection does not fit the checkpoint and the objects. Nothing was changed.
        """
        storage_options = _options_for(reference.run_dir, storage_options)
        names = [*self._state]
        if selection is not None:
            names = [name for name in self._state if selection.may_take(name)] + list(selection.sources)
        loaded = load_checkpoint(
            reference,
            names=[*names, _PROGRESS],
            storage_options=storage_options,
            ranks=ranks,
            shards=self.shards(),
        )
        if ranks is not None and ranks.world_size > 1:
            ranks.loop.together(
                "comparing the checkpoint with the live objects", lambda: self._check_alone(loaded, selection)
            )
        words = self._restore_objects(loaded, selection, alone=True)
        return loaded.manifest.step if "progress" in words else 0

    def _restore_objects(
        self, loaded: LoadedCheckpoint, selection: Selection | None, *, alone: bool = False
    ) -> Collection[str]:
        """Restore the user's objects and their options; return the words of what else is to be restored."""
        self.report = None
        if selection is None:
            options = self._check_options(loaded)
            restore_state(self._known_to(loaded), _of_user(loaded))
            self.options.take_up(options)
            return _WORDS.keys()
        selected = self._select(loaded, selection, alone=alone)
        options = self._check_selected_options(loaded, selected)
        selected.restore()
        self.options.take_up(options)
        self.report = selected.report
        selected.tell(loaded.reference)
        return selected.words

    def _known_to(self, loaded: LoadedCheckpoint) -> Mapping[str, object]:
        """Return the user's objects without a preprocessor that the run did not have yet."""
        if PREPROCESSOR in loaded.entries or PREPROCESSOR not in self._state:
            return self._state
        _log.info("%s has no preprocessor: from now on it is saved with the model", loaded.reference)
        return {name: value for name, value in self._state.items() if name != PREPROCESSOR}

    def _check_alone(self, loaded: LoadedCheckpoint, selection: Selection | None) -> None:
        if selection is None:
            check_state(self._known_to(loaded), _of_user(loaded))
        else:
            self._select(loaded, selection, alone=True).check()

    def _select(self, loaded: LoadedCheckpoint, selection: Selection, *, alone: bool = False) -> SelectedState:
        # Golden samples are proof, and no state.
        stored = {entry.name for entry in loaded.manifest.entries} - {_GOLDEN}
        # Of another run nobody has asked for what the program has not, nor for where its loop stood.
        unread = {*(stored - self._state.keys()), _DATA, _RNG} - {_PROGRESS} if alone else ()
        selected = select_state(
            self._state,
            _of_user(loaded),
            selection,
            words=_WORDS,
            absent=[word for word, entry in _WORDS.items() if entry not in stored],
            unread=sorted(unread),
        )
        if alone and not selected.entries:
            raise UsageError(
                f"nothing of {loaded.reference} is left for the objects of this program",
                why="a restore from another run puts its state into the objects alone",
                next="select one of the entries: " + ", ".join(self._state),
            )
        return selected

    def position_in(
        self,
        loader: Iterable[Any],
        saved: SavedPosition | None,
        *,
        epochs: int | None,
        on_resume: OnResume,
        on_epoch_end: Callable[[int], None],
    ) -> tuple[DataPosition, bool]:
        """Take up a loop over a loader's batches, where it was left if it was; say whether all epochs were trained.

        Raises:
            StateMismatchError: The loader is not the one that the position was saved with.
        """
        data = DataPosition(loader, epochs=epochs, on_resume=on_resume, notify=_log.warning, on_epoch_end=on_epoch_end)
        if saved is None:
            return data, False
        data.load_state_dict(saved.tree, rng=saved.rng)
        was, now = (facts["batch_size"] for facts in (saved.tree["facts"], describe_loader(loader)))
        if was != now:
            self.options.applied.append(OptionChange("train loader", "batch_size", was, now))
        has_ended = data.is_last_batch or saved.tree["is_exhausted"]
        return data, epochs is not None and data.epoch + bool(has_ended) >= epochs

    def _check_options(self, loaded: LoadedCheckpoint) -> Mapping[str, Any] | None:
        """Refuse options that cannot be applied; return those of the checkpoint, by the names of the live modules."""
        renamed = in_live_names(self._state, loaded.entries)
        options = renamed.options(_options_in(loaded), loaded.entries)
        self.options.check(options, {name: entry.tree for name, entry in renamed.entries.items()})
        return options

    def _check_selected_options(self, loaded: LoadedCheckpoint, selected: SelectedState) -> Mapping[str, Any] | None:
        """Do the same for what is selected; options that are left out are this program's in any case."""
        options = selected.options(_options_in(loaded), loaded.entries)
        trees = {name: entry.tree for name, entry in selected.entries.items()}
        self.options.check(options, trees, live_options=selected.live_options)
        return options


def check_loop(state: Mapping[str, object], loaded: LoadedCheckpoint) -> None:
    """Compare a checkpoint with the user's objects. Changes nothing.

    Raises:
        StateMismatchError: It does not fit, or was not saved from a plain loop.
    """
    _refuse_other_savers(loaded)
    check_state(state, _of_user(loaded))


def _refuse_other_savers(loaded: LoadedCheckpoint) -> None:
    if any(entry.handler == "dcp" for entry in loaded.manifest.entries):
        raise StateMismatchError(
            f"{loaded.reference} cannot be resumed here",
            why="it was saved through PyTorch's DCP, and has no place in a training loop",
            next="torch.distributed.checkpoint.load(state, storage_reader=ckptmgr.topology.CheckpointReader"
            f"({loaded.reference!r}), planner=ckptmgr.topology.LoadPlanner()) loads it",
        )
    if not {_RNG, _PROGRESS} <= loaded.entries.keys():
        raise StateMismatchError(
            f"{loaded.reference} cannot be resumed here",
            why="it was not saved by a Checkpointer",
            next="train in a run directory of its own; restore(reference) gives it the weights of this one",
        )


def _of_user(loaded: LoadedCheckpoint) -> dict[str, CapturedEntry]:
    return {name: entry for name, entry in loaded.entries.items() if name not in (_RNG, _DATA, _PROGRESS, _GOLDEN)}


def _options_in(loaded: LoadedCheckpoint) -> Mapping[str, Any] | None:
    """Return what the checkpoint's program was built with; checkpoints of earlier versions do not say."""
    return loaded.entries[_PROGRESS].tree.get("options") if _PROGRESS in loaded.entries else None


def meant_reference(text: str, run_dir: str, storage_options: Mapping[str, Any] | None) -> tuple[Reference, bool]:
    """Read a reference that may be a selector alone; say whether it names a checkpoint of this run.

    Raises:
        UsageError: It cannot be meant as it was typed.
    """
    if not any(mark in str(text) for mark in "/@\\"):
        return parse_reference(f"{run_dir}@{text}"), True
    reference = parse_reference(text)
    places = (reference.run_dir, run_dir)
    urls = {open_storage(place, storage_options=_options_for(place, storage_options)).url for place in places}
    return reference, len(urls) == 1


def _options_for(run_dir: str, storage_options: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return storage_options if "://" in run_dir else None
