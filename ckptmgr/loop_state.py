"""What a plain training loop has besides the user's objects: RNG, position in the data, step and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptmgr.errors import StateMismatchError
from ckptmgr.loading import LoadedCheckpoint, load_checkpoint
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.state.capture import CapturedEntry, capture_state, check_state, restore_state
from ckptmgr.state.data_position import DataPosition
from ckptmgr.state.rng import capture_rng, restore_rng
from ckptmgr.storage.open import open_storage

__all__ = [
    "RESERVED",
    "RestoredLoop",
    "SavedPosition",
    "capture_loop",
    "check_loop",
    "meant_reference",
    "position_in",
    "restore_loop",
    "restore_objects",
]

_log = logging.getLogger("ckptmgr")

RESERVED = "ckptmgr_"
"""Names of entries that begin so are ours."""

_RNG, _DATA, _PROGRESS = f"{RESERVED}rng", f"{RESERVED}data", f"{RESERVED}progress"


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
        position: None where the loop had no data of `batches`.
        notes: What could not be put back, in sentences.
    """

    step: int
    metrics: dict[str, float]
    position: SavedPosition | None
    notes: list[str]


def capture_loop(
    state: Mapping[str, object],
    *,
    step: int,
    metrics: Mapping[str, float],
    data: DataPosition | None,
    position: SavedPosition | None,
) -> list[CapturedEntry]:
    """Capture the user's objects and the loop's own entries.

    Args:
        state: The user's objects by name.
        step: Optimizer updates completed.
        metrics: Those of that step.
        data: The loop over the batches, if it has begun.
        position: What `restore_loop` gave, until a loop takes it up.
    """
    entries = capture_state(state)
    tree = position.tree if position else None
    rng = position.rng if position else None
    if data is not None:
        tree, rng = data.state_dict(), data.pending_rng
    if tree is not None:
        entries.append(CapturedEntry(_DATA, "data-position", 1, tree))
    entries.append(CapturedEntry(_PROGRESS, "progress", 1, {"step": step, "metrics": dict(metrics)}))
    entries.append(CapturedEntry(_RNG, "rng", 1, dict(rng or capture_rng())))
    return entries


def check_loop(state: Mapping[str, object], loaded: LoadedCheckpoint) -> None:
    """Compare a checkpoint with the user's objects. Changes nothing.

    Raises:
        StateMismatchError: It does not fit, or was not saved from a plain loop.
    """
    _refuse_other_savers(loaded)
    check_state(state, _of_user(loaded))


def _refuse_other_savers(loaded: LoadedCheckpoint) -> None:
    if not {_RNG, _PROGRESS} <= loaded.entries.keys():
        raise StateMismatchError(
            f"{loaded.reference} cannot be resumed here",
            why="it was not saved by a Checkpointer",
            next="train in a run directory of its own; restore(reference) gives it the weights of this one",
        )


def restore_loop(state: Mapping[str, object], loaded: LoadedCheckpoint) -> RestoredLoop:
    """Put a checkpoint into the user's objects and the RNG.

    Raises:
        StateMismatchError: It does not fit, or was not saved from a plain loop. Nothing was changed.
    """
    _refuse_other_savers(loaded)
    restore_state(state, _of_user(loaded))
    own = loaded.entries
    rng = own[_RNG].tree
    notes = restore_rng(rng)
    position = SavedPosition(own[_DATA].tree, rng) if _DATA in own else None
    return RestoredLoop(loaded.manifest.step, dict(own[_PROGRESS].tree["metrics"]), position, notes)


def position_in(
    loader: Iterable[Any],
    saved: SavedPosition | None,
    *,
    epochs: int | None,
    on_resume: Literal["auto", "skip", "replay"],
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
    has_ended = data.is_last_batch or saved.tree["is_exhausted"]
    return data, epochs is not None and data.epoch + bool(has_ended) >= epochs


def _of_user(loaded: LoadedCheckpoint) -> dict[str, CapturedEntry]:
    return {name: entry for name, entry in loaded.entries.items() if name not in (_RNG, _DATA, _PROGRESS)}


def restore_objects(
    state: Mapping[str, object], reference: Reference, storage_options: Mapping[str, Any] | None
) -> int:
    """Put another run's checkpoint into the user's objects alone, and return its step.

    Args:
        state: The user's objects by name.
        reference: Names the checkpoint.
        storage_options: For a URL; a path takes none.

    Raises:
        StateMismatchError, CheckpointNotFoundError, CorruptCheckpointError: Nothing was changed.
    """
    options = _options_for(reference.run_dir, storage_options)
    loaded = load_checkpoint(reference, names=list(state), storage_options=options)
    restore_state(state, loaded.entries)
    return loaded.manifest.step


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
