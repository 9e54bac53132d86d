"""A checkpoint of a CheckpointManager as the ``.ckpt`` that Lightning itself would have written.

Two things differ between the states of the two. Optimizers: by name here, by number there. And the moment: a manager
saves between a batch and what follows it, and at the very end of an epoch; Lightning saves within its hooks, and counts
on it when it resumes. So the counters are put as its own ModelCheckpoint would have left them at that moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from ckptmgr.interop.stored import StoredCheckpoint
from ckptmgr.lightning.assemble import (
    DATA,
    MODEL,
    TRAINER,
    optimizer_order,
    plain_checkpoint,
    plain_values,
)
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.state.optimizer_names import to_indices

__all__ = ["LIGHTNING_ENTRIES", "is_lightning_entry", "lightning_checkpoint"]

LIGHTNING_ENTRIES = (MODEL, TRAINER, DATA)
_PLATEAU = "num_bad_epochs"


def is_lightning_entry(name: str) -> bool:
    """Say whether an entry of a checkpoint goes into Lightning's file."""
    return name in LIGHTNING_ENTRIES or name.partition("-")[0] == "optimizer"


def lightning_checkpoint(checkpoint: StoredCheckpoint) -> tuple[dict[str, Any], list[str]]:
    """Build what Lightning's ``fit(ckpt_path=...)`` and ``load_from_checkpoint`` read: tensors and plain values.

    Returns:
        The checkpoint, and one sentence for each thing that it cannot hold or Lightning cannot go on from.

    Raises:
        UsageError: It was not saved by a CheckpointManager.
        CorruptCheckpointError: It is damaged.
    """
    loaded = checkpoint.load(name for name in checkpoint.handlers if is_lightning_entry(name))
    built = plain_checkpoint(loaded)
    trainer = loaded.entries[TRAINER].tree
    if trainer.get("weights_only"):
        return built, ["it was saved with save_weights_only=True: Lightning can load it, and not resume from it"]
    built["optimizer_states"] = [_numbered(entry.tree) for entry in _optimizers(loaded)]
    built["lr_schedulers"] = [plain_values(_state_alone(state)) for state in trainer["lr_schedulers"]]
    notes = ["a .ckpt holds no state of random number generators: dropout and shuffling draw other numbers from here"]
    position = loaded.entries[DATA].tree if DATA in loaded.entries else None
    if position is not None:
        notes += _place_counters(built["loops"]["fit_loop"], position)
    if any(_PLATEAU in state for state in built["lr_schedulers"]) and position and position["place"] != "epoch":
        notes.append("Lightning resumes without the validation that was due: ReduceLROnPlateau may step differently")
    return built, notes


def _optimizers(loaded: LoadedCheckpoint) -> Iterable[Any]:
    found = [item for item in loaded.entries.items() if item[0].partition("-")[0] == "optimizer"]
    return [entry for _, entry in sorted(found, key=optimizer_order)]


def _numbered(tree: Mapping[str, Any]) -> Any:
    if "opaque" in tree:
        return plain_values(tree["opaque"])
    return plain_values(to_indices(tree, [group["params"] for group in tree["groups"]]))


def _state_alone(state: Any) -> Any:
    """Return a scheduler's own state; torch's schedulers have their kind written beside it."""
    is_wrapped = isinstance(state, Mapping) and state.keys() == {"type", "state"}
    return state["state"] if is_wrapped else state


def _place_counters(loops: dict[str, Any], position: Mapping[str, Any]) -> list[str]:
    """Put the loops' counters as Lightning leaves them when it saves at such a moment; return what to say."""
    batches: dict[str, Any] = copy.deepcopy(loops["epoch_loop.batch_progress"])
    loops["epoch_loop.batch_progress"] = batches
    is_last = bool(batches.get("is_last_batch"))
    if position["place"] == "epoch":
        if is_last:
            # With max_steps Lightning would take counters that stand at the end for an epoch to be finished.
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
            return []
        return ["the epoch was ended early: Lightning begins the next one"]
    if position["place"] == "step":
        # As in on_train_batch_end: trained, and not counted as completed yet.
        for counters in (batches["total"], batches["current"]):
            counters["completed"] -= 1
    notes = ["Lightning does not run the validation that was due"] if position["place"] == "step" and is_last else []
    data = position["data"]
    if is_last or data is None or not data["batches"]:
        return notes
    states = [loader.get("state") for loader in data["loaders"]]
    if states and all(state is not None for state in states):
        loops["state_dict"] = {**loops.get("state_dict", {}), "combined_loader": plain_values(states)}
        return notes
    return [
        *notes,
        f"it lies in mid-epoch, after batch {data['batches']}: Lightning counts on from there, and reads its loader "
        "from the beginning; export a checkpoint of an epoch's end, or use a loader with a state_dict",
    ]
