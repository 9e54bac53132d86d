"""A ``.ckpt`` of Lightning as the entries that a CheckpointManager would have saved at that moment.

Lightning saves within its hooks, a manager between a batch and what follows it. So the counters of the loops tell which
moment it was, and are put as they are at the nearest boundary of a manager's. See `lightning.loops`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, UnsupportedStateError
from ckptmgr.interop.contents import Contents
from ckptmgr.interop.live_model import LiveModel
from ckptmgr.interop.optimizer_source import name_optimizers
from ckptmgr.interop.state_dicts import is_state_dict, module_entry
from ckptmgr.lightning.assemble import DATA, MODEL, TRAINER
from ckptmgr.lightning.compat import imported_trees, module_of
from ckptmgr.lightning.hyper_parameters import keep_plain_hyper_parameters
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry

__all__ = ["is_lightning", "read_lightning"]

_VERSION = 1
_VERSION_KEY = "pytorch-lightning_version"
_TAKEN = ("state_dict", "optimizer_states", "lr_schedulers")
_PLATEAU = "num_bad_epochs"


def is_lightning(value: Any) -> bool:
    """Say whether a loaded file is a checkpoint of Lightning."""
    return isinstance(value, Mapping) and _VERSION_KEY in value and isinstance(value.get("state_dict"), Mapping)


def read_lightning(
    value: Mapping[str, Any], name: str, *, live: LiveModel | None = None, weights_only: bool = False
) -> Contents:
    """Turn a loaded checkpoint into entries.

    Args:
        value: What the restricted loader gave.
        name: Of the file, for the record.
        live: The model of ``--model``.
        weights_only: Take what inference needs alone.

    Raises:
        CorruptCheckpointError: It is not of the form that Lightning writes.
        StateMismatchError, UnsupportedStateError: As `name_optimizers`.
    """
    written_with = str(value[_VERSION_KEY])
    checkpoint = _migrated(value, name)
    state = checkpoint["state_dict"]
    if not is_state_dict(state):
        raise _not_as_meant(name, "its state_dict holds something else than tensors")
    notes: list[str] = []
    weights_only = weights_only or "optimizer_states" not in checkpoint
    rest = {key: item for key, item in checkpoint.items() if key not in _TAKEN}
    notes += _keep_storable(rest)
    tree: dict[str, Any] = {"version": _VERSION, "weights_only": weights_only, "lightning": rest}
    entries = [module_entry(state, name=MODEL)]
    try:
        step = int(checkpoint["global_step"])
        epoch = int(checkpoint["epoch"])
        loops = rest["loops"]["fit_loop"]
        states = loops.get("state_dict", {}).pop("combined_loader", None)
        if weights_only:
            notes.append("it holds no optimizer: it can be loaded, and training cannot go on from it")
            entries.append(CapturedEntry(TRAINER, "lightning", _VERSION, tree))
            return Contents(tuple(entries), step, epoch, tuple(notes), {"lightning": written_with})
        position = _place(loops, states, step)
        schedulers = list(checkpoint.get("lr_schedulers", ()))
        naming = name_optimizers(checkpoint["optimizer_states"], state, live, entry=MODEL)
    except CkptmgrError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_as_meant(name, f"{type(error).__name__}: {error}") from error
    lacks = _lacks(position, schedulers)
    if naming.note is not None:
        notes.append(naming.note)
    tree["lr_schedulers"] = [{"type": None, "state": state} for state in schedulers]
    tree["validation_names"] = []
    tree["imported"] = {"from": name, "lacks": lacks}
    entries += naming.entries
    entries.append(CapturedEntry(TRAINER, "lightning", _VERSION, tree))
    entries.append(CapturedEntry(DATA, "lightning-data", _VERSION, position, "per-rank"))
    epoch = position["data"]["epoch"]
    return Contents(tuple(entries), step, epoch, (*notes, *lacks), {"lightning": written_with})


def _migrated(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Bring a checkpoint of an old Lightning into the form of the installed one, by its own rules."""
    checkpoint = dict(value)
    if isinstance(checkpoint.get("loops"), Mapping):
        checkpoint["loops"] = copy.deepcopy(checkpoint["loops"])
    migration = module_of(imported_trees()[0], "utilities.migration")
    try:
        checkpoint, _ = migration.migrate_checkpoint(checkpoint)
    except Exception as error:
        raise _not_as_meant(name, f"Lightning cannot migrate it: {type(error).__name__}: {error}") from error
    return dict(checkpoint)


def _keep_storable(rest: MutableMapping[str, Any]) -> list[str]:
    """Leave out what no checkpoint of ours can hold, and the records of callbacks that a manager replaces."""
    notes: list[str] = []
    callbacks = rest.get("callbacks")
    if isinstance(callbacks, Mapping):
        kept = {key: item for key, item in callbacks.items() if not str(key).startswith("ModelCheckpoint")}
        if len(kept) < len(callbacks):
            notes.append(
                "what ModelCheckpoint recorded of its files is not taken over: a CheckpointManager replaces it"
            )
        rest["callbacks"] = kept
    keep_plain_hyper_parameters(rest, _is_storable)  # type: ignore[arg-type]
    for key in list(rest):
        if not _is_storable(rest[key]):
            notes.append(f"{key!r} is left out: it holds values that no checkpoint can store")
            del rest[key]
    return notes


def _is_storable(value: Any) -> bool:
    try:
        EntryEncoder(CapturedEntry(TRAINER, "lightning", _VERSION, {"value": value}))
    except UnsupportedStateError:
        return False
    return True


def _place(loops: MutableMapping[str, Any], states: Any, step: int) -> dict[str, Any]:
    """Put the counters as they are at a boundary of a manager's, and return the position there."""
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    current = epochs["current"]
    processed = int(batches["current"]["processed"])
    is_last = bool(batches.get("is_last_batch", False))
    is_over = current["processed"] >= current["started"]
    validation = loops.get("epoch_loop.val_loop.batch_progress", {})
    if is_over:
        place = "epoch"
    elif batches["current"]["completed"] < processed == batches["current"]["ready"] or _is_cut(validation):
        # In on_train_batch_end, or in the middle of the validation that follows: that is still to come.
        place = "step"
    else:
        place = "validated"
    for counters in (epochs["total"], current):
        counters["ready"] = counters["started"]
        counters["completed"] = counters["processed"]
    for counters in (batches["total"], batches["current"]):
        counters["ready"] = counters["started"] = counters["completed"] = counters["processed"]
    stepped = loops.setdefault("epoch_loop.state_dict", {})
    if place == "validated" and int(stepped.get("_batches_that_stepped", 0)) < step:
        # Lightning counts it after the validation.
        stepped["_batches_that_stepped"] = int(stepped.get("_batches_that_stepped", 0)) + 1
    epoch = int(current["processed"]) - (1 if place == "epoch" and current["processed"] else 0)
    loaders = list(states) if isinstance(states, list | tuple) else []
    return {
        "place": place,
        "should_stop": False,
        "reloaded_at": [int(current["completed"]), float("-inf")],
        "data": {
            "version": 1,
            "imported": True,
            "epoch": epoch,
            "batches": processed,
            # An epoch without any batch has not begun.
            "is_last": is_last or not processed,
            "loaders": [],
            "states": [] if is_last else loaders,
        },
        "validation": None,
    }


def _is_cut(progress: Mapping[str, Any]) -> bool:
    current = progress.get("current", {})
    return bool(current.get("ready")) and not progress.get("is_last_batch")


def _lacks(position: Mapping[str, Any], schedulers: list[Any]) -> list[str]:
    data = position["data"]
    lacks = ["it holds no state of random number generators: dropout and shuffling draw other numbers from here"]
    if not data["is_last"] and not data["states"]:
        lacks.append(
            f"it lies after batch {data['batches']} of epoch {data['epoch']} and does not say which samples were read: "
            "as many are passed over, which is exact where the loader's order is always the same"
        )
    if position["place"] == "epoch" and any(isinstance(s, Mapping) and _PLATEAU in s for s in schedulers):
        lacks.append("ReduceLROnPlateau had not seen the metric of the last epoch when it was saved")
    return lacks


def _not_as_meant(name: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{name} is not as Lightning writes its checkpoints",
        why=why,
        next="--key state_dict --weights-only imports its weights alone",
    )
