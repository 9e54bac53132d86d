"""Which Lightning this is: its class tree, its tested versions, and a check of every internal that we touch.

Lightning is published twice, as ``lightning.pytorch`` and as ``pytorch_lightning``, with separate classes. Nothing here
imports either at module level: a program uses the one that it has imported itself.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import cache
from types import ModuleType
from typing import Any

from ckptmgr.errors import IncompatibleLightningError

__all__ = ["TESTED_VERSIONS", "TREES", "check_compatible", "check_version", "imported_trees", "module_of", "tree_of"]

TREES = ("lightning.pytorch", "pytorch_lightning")
"""Import names of the two class trees, the preferred one first."""

TESTED_VERSIONS = ((2, 5), (2, 7))
"""First tested version, and the first one after the tested ones."""

# Where each internal lives, below the tree, and what it must have. Instance attributes are checked on the live trainer.
_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "loops.fit_loop:_FitLoop": {
        "run": (),
        "setup_data": (),
        "reset": (),
        "on_advance_start": (),
        "on_advance_end": (),
        "_load_combined_loader_states": (),
        "_iteration_based_training": (),
    },
    "loops.training_epoch_loop:_TrainingEpochLoop": {
        "run": ("data_fetcher",),
        "reset": (),
        "on_run_start": ("data_fetcher",),
        "advance": ("data_fetcher",),
        "on_advance_end": ("data_fetcher",),
        "_should_accumulate": (),
        "_num_ready_batches_reached": (),
        "_should_check_val_fx": ("data_fetcher",),
    },
    "loops.evaluation_loop:_EvaluationLoop": {"setup_data": ()},
    "loops.fetchers:_DataFetcher": {"__iter__": (), "__next__": ()},
    "utilities.combined_loader:CombinedLoader": {"_load_state_dicts": ("states",), "_state_dicts": ()},
    "trainer.connectors.data_connector:_DataConnector": {
        "_prepare_dataloader": ("dataloader", "shuffle", "mode"),
        "_requires_distributed_sampler": ("dataloader",),
    },
    "trainer.connectors.signal_connector:_SignalConnector": {"_sigterm_notifier_fn": ("signum",)},
    "trainer.connectors.checkpoint_connector:_CheckpointConnector": {
        "resume_start": ("checkpoint_path",),
        "dump_checkpoint": ("weights_only",),
        "restore_optimizers_and_schedulers": (),
    },
    "trainer.connectors.logger_connector.result:_ResultCollection": {"log": ("fx", "name", "value"), "reset": ()},
    "callbacks:ModelCheckpoint": {"_find_last_checkpoints": ("trainer",)},
}
_OWN_HOOKS = frozenset(
    {
        "setup",
        "teardown",
        "on_exception",
        "on_fit_start",
        "on_load_checkpoint",
        "on_save_checkpoint",
        "on_sanity_check_end",
        "on_train_batch_end",
        "on_train_end",
        "on_train_epoch_end",
        "on_train_start",
        "on_validation_end",
        "on_validation_start",
        "on_before_optimizer_step",
        "state_dict",
        "load_state_dict",
    }
)
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "fit_loop": (
        "epoch_loop",
        "epoch_progress",
        "max_epochs",
        "_combined_loader",
        "_combined_loader_states_to_load",
        "_data_fetcher",
        "_last_train_dl_reload_epoch",
        "_loaded_from_state_dict",
        "_restarting",
        "_restart_stage",
    ),
    "fit_loop.epoch_loop": (
        "batch_progress",
        "max_steps",
        "val_loop",
        "automatic_optimization",
        "manual_optimization",
        "_batches_that_stepped",
        "_restart_stage",
        "_results",
    ),
    "fit_loop.epoch_loop.val_loop": (
        "batch_progress",
        "_combined_loader",
        "_last_val_dl_reload_epoch",
        "_restarting",
        "_results",
    ),
    "_logger_connector": (
        "_callback_metrics",
        "_current_fx",
        "_first_loop_iter",
        "_logged_metrics",
        "_progress_bar_metrics",
    ),
    "_checkpoint_connector": ("_loaded_checkpoint",),
    "_signal_connector": ("_original_handlers",),
    "strategy": ("checkpoint_io", "optimizers", "lr_scheduler_configs"),
}


def module_of(tree: str, name: str) -> ModuleType:
    """Import a module of a class tree, such as ``callbacks``."""
    return importlib.import_module(f"{tree}.{name}" if name else tree)


def tree_of(value: object) -> str | None:
    """Return the tree that an object's class comes from, directly or by inheritance; None if from neither."""
    for cls in type(value).__mro__:
        for tree in TREES:
            if cls.__module__ == tree or cls.__module__.startswith(f"{tree}."):
                return tree
    return None


def imported_trees() -> tuple[str, ...]:
    """Return the trees that this program has imported; the preferred one if it has imported none yet."""
    return tuple(tree for tree in TREES if tree in sys.modules) or (TREES[0],)


def check_version(tree: str) -> None:
    """Refuse a Lightning outside the tested range.

    Raises:
        IncompatibleLightningError: It is older or newer.
    """
    version = str(module_of(tree, "").__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    first, after = TESTED_VERSIONS
    if not first <= numbers < after:
        raise IncompatibleLightningError(
            f"{tree} {version} is outside the tested range",
            why=f"exact resume depends on internals of Lightning, tested from {first[0]}.{first[1]} up to, "
            f"and without, {after[0]}.{after[1]}",
            next=f"install 'lightning>={first[0]}.{first[1]},<{after[0]}.{after[1]}', or a newer ckptmgr",
        )


@cache
def _check_classes(tree: str) -> None:
    check_version(tree)
    for place, methods in _METHODS.items():
        module_name, class_name = place.split(":")
        try:
            cls: Any = getattr(module_of(tree, module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise _changed(tree, f"{module_name}.{class_name} is gone") from error
        for method, parameters in methods.items():
            function = getattr(cls, method, None)
            if function is None:
                raise _changed(tree, f"{class_name}.{method} is gone")
            known = inspect.signature(function).parameters
            for parameter in parameters:
                if parameter not in known:
                    raise _changed(tree, f"{class_name}.{method} has no parameter {parameter!r} any more")
    stages = module_of(tree, "loops.fit_loop").RestartStage
    if getattr(stages, "RESTARTED_MID_EPOCH", None) != "restarted_mid_epoch" or getattr(stages, "NONE", None) != "none":
        raise _changed(tree, "loops.fit_loop.RestartStage has other values")
    base = module_of(tree, "callbacks").ModelCheckpoint
    # A hook of ModelCheckpoint that we do not override would run its own saving.
    own = {name for name in vars(base) if name.startswith("on_") or name in ("setup", "teardown")}
    if unknown := sorted(own - _OWN_HOOKS):
        raise _changed(tree, f"ModelCheckpoint has the new hook {unknown[0]}")


def check_compatible(trainer: Any, tree: str) -> None:
    """Check every internal of Lightning that exact resume touches, before anything is touched.

    Raises:
        IncompatibleLightningError: The version is untested, or an internal has changed. Names it.
    """
    _check_classes(tree)
    for place, names in _ATTRIBUTES.items():
        target = trainer
        for part in place.split("."):
            target = getattr(target, part, None)
        for name in names:
            if not hasattr(target, name):
                raise _changed(tree, f"trainer.{place}.{name} is gone")


def _changed(tree: str, what: str) -> IncompatibleLightningError:
    version = module_of(tree, "").__version__
    return IncompatibleLightningError(
        f"{tree} {version} has changed inside: {what}",
        why="exact resume depends on it; going on could repeat or skip data silently",
        next="install a Lightning version that this ckptmgr was tested with, or a newer ckptmgr",
    )
