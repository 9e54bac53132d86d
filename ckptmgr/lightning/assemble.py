"""Lightning's checkpoint dict ↔ entries of our own."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import logging
import os
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.lightning.hyper_parameters import keep_plain_hyper_parameters
from ckptmgr.lightning.loggers import log_positions
from ckptmgr.lightning.strategies import not_gathering
from ckptmgr.lightning.trainer_metrics import capture_metrics
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.module import ModuleHandler
from ckptmgr.state.names import ParameterNames, WrapperPrefixes
from ckptmgr.state.optimizer import OptimizerHandler
from ckptmgr.state.renamed_entries import in_live_names
from ckptmgr.state.sharding import as_live
from ckptmgr.state.sources import class_sources
from ckptmgr.state.stateful import SchedulerHandler, StatefulHandler
from ckptmgr.state.training_options import OnChangedOptions, TrainingOptions

__all__ = [
    "INFERENCE_ENTRIES",
    "WEIGHTS_ONLY_REASON",
    "assemble",
    "capture_entries",
    "check_model",
    "drivers_of",
    "in_names_of",
    "load_model",
    "numbered",
    "optimizer_order",
    "options_of",
    "plain_checkpoint",
    "plain_values",
    "restore_optimizers_and_schedulers",
    "same_number",
    "scheduler_handler",
    "scheduler_state",
    "with_versions",
]

_log = logging.getLogger("ckptmgr")

MODEL, TRAINER, RNG, DATA = "model", "trainer", "rng", "data"
GOLDEN = "golden"
METRICS = "metrics"
"""What each rank has logged, in a job of several; one rank has it in the entry of the Trainer."""
INFERENCE_ENTRIES = (MODEL, TRAINER)
"""What it takes to validate, test and predict."""

WEIGHTS_ONLY_REASON = "it was saved with save_weights_only=True and holds no training state"
_VERSION = 1


def capture_entries(
    trainer: Any,
    *,
    rng: Mapping[str, Any],
    position: Mapping[str, Any],
    options: Mapping[str, Any],
    validation_names: set[str],
    weights_only: bool,
    is_alone: bool,
) -> list[CapturedEntry]:
    """Capture a Trainer: live references, nothing is copied.

    Args:
        trainer: In ``fit``, at a boundary.
        rng: RNG of the boundary, captured before any hook of the user ran.
        position: What `LoopHooks.capture` returned.
        options: The options that training follows.
        validation_names: Metrics that validation logged.
        weights_only: Leave out what only training needs.
        is_alone: The job has one rank.

    Raises:
        UnsupportedStateError: An optimizer's parameter is in no module.
    """
    with not_gathering(trainer):
        checkpoint = dict(trainer._checkpoint_connector.dump_checkpoint(weights_only))
    module = trainer.lightning_module
    names = ParameterNames({MODEL: module})
    model = CapturedEntry(
        MODEL,
        ModuleHandler.name,
        ModuleHandler.version,
        _model_tree(module, checkpoint, names),
        # Only the wrapper around the module knows whether its buffers are sent to all ranks.
        tensor_scopes={} if is_alone else ModuleHandler().tensor_scopes(trainer.strategy.model),
        classes=class_sources(module),
    )
    optimizer_states: Sequence[Any] = checkpoint.pop("optimizer_states", [])
    checkpoint.pop("lr_schedulers", None)
    loops = checkpoint["loops"]["fit_loop"].get("state_dict", {})
    loops.pop("combined_loader", None)
    keep_plain_hyper_parameters(checkpoint, lambda value: _why_unstorable(value) is None)
    tree: dict[str, Any] = {"version": _VERSION, "weights_only": weights_only, "lightning": checkpoint}
    trainer_entry = CapturedEntry(TRAINER, "lightning", _VERSION, tree)
    if weights_only:
        return [model, trainer_entry]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    tree["lr_schedulers"] = [scheduler_handler(scheduler).capture(scheduler, names) for scheduler in schedulers]
    tree["options"] = dict(options)
    metrics = []
    if is_alone:
        tree["metrics"] = capture_metrics(trainer)
    else:
        metrics.append(CapturedEntry(METRICS, "lightning-metrics", _VERSION, capture_metrics(trainer), "per-rank"))
    # On other ranks loggers write nothing.
    if trainer.loggers and trainer.is_global_zero:
        tree["loggers"] = log_positions(trainer.loggers)
    tree["validation_names"] = sorted(validation_names)
    handler = OptimizerHandler()
    optimizers = [
        CapturedEntry(
            numbered("optimizer", i, len(optimizer_states)), handler.name, handler.version, handler.capture(o, names)
        )
        for i, o in enumerate(trainer.optimizers)
    ]
    return [
        model,
        *optimizers,
        trainer_entry,
        *metrics,
        CapturedEntry(DATA, "lightning-data", _VERSION, dict(position), "per-rank"),
        CapturedEntry(RNG, "rng", 1, dict(rng), "per-rank"),
    ]


def assemble(loaded: LoadedCheckpoint, module: Any = None) -> dict[str, Any]:
    """Return a checkpoint as Lightning expects it; without optimizers and schedulers, which are restored by name.

    Args:
        loaded: Its entries ``model`` and ``trainer`` are used.
        module: The live module, whose state dict may have the prefixes of wrappers.
    """
    if MODEL not in loaded.entries or TRAINER not in loaded.entries:
        raise UsageError(
            f"{loaded.reference} was not saved by a CheckpointManager",
            why=f"it has the entries {', '.join(sorted(loaded.entries))}; Lightning needs {MODEL} and {TRAINER}",
            next="load it with ckptmgr's Checkpointer, or read its safetensors files",
        )
    checkpoint = dict(loaded.entries[TRAINER].tree["lightning"])
    tree = loaded.entries[MODEL].tree
    state = {**tree["tensors"], **tree.get("values", {})}
    if module is not None:
        prefixes = WrapperPrefixes(module)
        live = module.state_dict()
        keys = {prefixes.own_name(key): key for key in live}
        state = {keys.get(name, name): value for name, value in state.items()}
        state = {key: as_live(value, live[key]) if key in live else value for key, value in state.items()}
    checkpoint["state_dict"] = with_versions(state, tree.get("versions", {}))
    return checkpoint


def plain_checkpoint(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Return a checkpoint of tensors and plain values only, which ``torch.load(..., weights_only=True)`` accepts."""
    checkpoint = assemble(loaded)
    state = checkpoint.pop("state_dict")
    return {**plain_values(checkpoint), "state_dict": state}


def check_model(module: Any, loaded: LoadedCheckpoint) -> None:
    """Compare the model with the checkpoint before anything is loaded.

    A module that takes part in its own loading may accept what differs, so it is left to it.

    Raises:
        StateMismatchError: Names everything that does not fit.
    """
    if _decides_by_itself(module):
        return
    ModuleHandler().check(module, loaded.entries[MODEL].tree, ParameterNames({MODEL: module}))


def load_model(module: Any, loaded: LoadedCheckpoint) -> None:
    """Put a checkpoint's weights into a LightningModule outside of a Trainer, with the module's own hook.

    Raises:
        StateMismatchError: Names everything that does not fit.
    """
    loaded = in_names_of(module, loaded)
    check_model(module, loaded)
    checkpoint = assemble(loaded, module)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def in_names_of(module: Any, loaded: LoadedCheckpoint) -> LoadedCheckpoint:
    """Give a checkpoint the names of the live module, where they differ by a prefix that explains every name.

    A module that takes part in its own loading may have names of its own for what it loads, so it is left to it.
    """
    if _decides_by_itself(module) or MODEL not in loaded.entries:
        return loaded
    renamed = in_live_names({MODEL: module}, loaded.entries)
    if not renamed.names:
        return loaded
    for level, note in renamed.notes:
        _log.log(level, "%s", note)
    entries = dict(renamed.entries)
    tree = entries[TRAINER].tree
    options = renamed.options(tree.get("options"), loaded.entries)
    entries[TRAINER] = dataclasses.replace(entries[TRAINER], tree={**tree, "options": options})
    return dataclasses.replace(loaded, entries=entries)


def _decides_by_itself(module: Any) -> bool:
    own_hook = type(module).on_load_checkpoint.__qualname__.split(".")[0] not in ("CheckpointHooks", "LightningModule")
    return own_hook or not module.strict_loading


def options_of(trainer: Any, mode: OnChangedOptions) -> TrainingOptions:
    """Return the options that a Trainer's optimizers and schedulers were built with, before anything is restored."""
    return TrainingOptions({MODEL: trainer.lightning_module, **drivers_of(trainer)}, mode)


def restore_optimizers_and_schedulers(trainer: Any, loaded: LoadedCheckpoint, options: TrainingOptions) -> None:
    """Restore optimizers by parameter name and schedulers by position; checks all of them first.

    Args:
        trainer: It has built them.
        loaded: The checkpoint.
        options: What `options_of` returned. Options that differ are named or applied.

    Raises:
        StateMismatchError: There are more or fewer than in the checkpoint, or one does not fit.
    """
    names = ParameterNames({MODEL: trainer.lightning_module})
    tree = loaded.entries[TRAINER].tree
    handler = OptimizerHandler()
    optimizers = list(trainer.optimizers)
    saved = [
        entry for name, entry in sorted(loaded.entries.items(), key=optimizer_order) if name.startswith("optimizer")
    ]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    same_number("optimizer", len(saved), len(optimizers))
    same_number("LR scheduler", len(tree["lr_schedulers"]), len(schedulers))
    own = [
        scheduler_state(scheduler, state) for scheduler, state in zip(schedulers, tree["lr_schedulers"], strict=True)
    ]
    for optimizer, entry in zip(optimizers, saved, strict=True):
        handler.check(optimizer, entry.tree, names)
    for scheduler, state in zip(schedulers, own, strict=True):
        scheduler_handler(scheduler).check(scheduler, state, names)
    states = [*(entry.tree for entry in saved), *own]
    # Checkpoints of earlier versions do not tell what they were built with.
    options.check(tree.get("options"), dict(zip(drivers_of(trainer), states, strict=True)))
    for optimizer, entry in zip(optimizers, saved, strict=True):
        handler.restore(optimizer, entry.tree, names)
    for scheduler, state in zip(schedulers, own, strict=True):
        scheduler_handler(scheduler).restore(scheduler, state, names)
    options.take_up(tree.get("options"))


def drivers_of(trainer: Any) -> dict[str, Any]:
    """Return optimizers and schedulers by name, in the Trainer's order."""
    optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        **{numbered("optimizer", i, len(optimizers)): optimizer for i, optimizer in enumerate(optimizers)},
        **{numbered("scheduler", i, len(schedulers)): scheduler for i, scheduler in enumerate(schedulers)},
    }


def _model_tree(module: Any, checkpoint: dict[str, Any], names: ParameterNames) -> dict[str, Any]:
    tree: dict[str, Any] = ModuleHandler().capture(module, names)
    prefixes = WrapperPrefixes(module)
    # Not simply the module's own state: a callback that averages weights has put the average here.
    state = {prefixes.own_name(key): value for key, value in checkpoint.pop("state_dict").items()}
    tree["tensors"] = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tree.pop("values", None)
    if len(tree["tensors"]) < len(state):
        tree["values"] = {name: value for name, value in state.items() if name not in tree["tensors"]}
    return tree


def _why_unstorable(value: Any) -> str | None:
    try:
        EntryEncoder(CapturedEntry(TRAINER, "lightning", _VERSION, value))
    except UnsupportedStateError as error:
        return error.what
    return None


def with_versions(state: Mapping[str, Any], versions: Mapping[str, int]) -> OrderedDict[str, Any]:
    """Return a state dict as a module gives it, with the versions of its parts."""
    ordered = OrderedDict(state)
    prefixes = {""}
    for name in state:
        parts = name.split(".")[:-1]
        prefixes.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    # Without versions, torch takes a state dict for one from before versions and converts it again.
    metadata = {prefix: {"version": versions.get(prefix, 1)} for prefix in sorted(prefixes)}
    ordered._metadata = metadata  # type: ignore[attr-defined]
    return ordered


def plain_values(value: Any) -> Any:
    """Turn nested values into such that the restricted loader of torch takes, as far as they have such a form."""
    if isinstance(value, Counter):
        # A scheduler's milestones: a dict would lack what is called on them.
        return Counter({plain_values(key): item for key, item in value.items()})
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)
    if isinstance(value, dict):
        return {plain_values(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, Namespace):
        return {key: plain_values(item) for key, item in vars(value).items()}
    if isinstance(value, list | tuple):
        kind = type(value) if type(value) in (list, tuple) else list
        return kind(plain_values(item) for item in value)
    if isinstance(value, deque | range):
        return [plain_values(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biufc" else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, enum.Enum):
        return plain_values(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if type(value).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return plain_values(OmegaConf.to_container(value))
    return value


def scheduler_handler(scheduler: Any) -> StatefulHandler:
    """Return the handler of a scheduler; not every one is derived from torch's."""
    handler = SchedulerHandler()
    return handler if handler.handles(scheduler) else StatefulHandler()


def scheduler_state(scheduler: Any, state: Any) -> Any:
    """Return a scheduler's state as its handler wants it: an imported one does not say of which kind it is."""
    is_untyped = isinstance(state, Mapping) and state.keys() == {"type", "state"} and state["type"] is None
    return state["state"] if is_untyped and not SchedulerHandler().handles(scheduler) else state


def numbered(name: str, index: int, count: int) -> str:
    """Return the name of one of several objects; a single one has no number."""
    return name if count == 1 else f"{name}-{index}"


def optimizer_order(item: tuple[str, Any]) -> tuple[int, str]:
    """Return what sorts named entries by their number."""
    _, _, index = item[0].partition("-")
    return (int(index) if index.isdecimal() else 0, item[0])


def same_number(what: str, saved: int, live: int) -> None:
    """Refuse another number of optimizers or schedulers.

    Raises:
        StateMismatchError: There are more or fewer than in the checkpoint.
    """
    if saved != live:
        raise StateMismatchError(
            f"the checkpoint has {saved} {what}{'s' * (saved != 1)}, the module configures {live}",
            why="state cannot be matched when something was added or removed",
            next="configure as in the run that saved, or start from the weights alone: "
            "Model.load_from_checkpoint('ckptmgr://RUN_DIR') and resume='never' in a new run",
        )
