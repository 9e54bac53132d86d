"""A Lightning experiment: model, data, callbacks, loggers and Trainer from a plan, and one ``fit``."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ckptmgr.experiment.construct import Construction, Part, by_name, class_of, optimizer_parts
from ckptmgr.experiment.forking import fork_if_it_fits
from ckptmgr.experiment.links import refuse_links_out
from ckptmgr.experiment.plan import Plan
from ckptmgr.experiment.slots import slot_error
from ckptmgr.launch.run_directory import absolute
from ckptmgr.launch.torchrun import place_in_job
from ckptmgr.lightning.assemble import check_model
from ckptmgr.lightning.callback import CheckpointManager
from ckptmgr.progress import is_quiet
from ckptmgr.run.reference import Reference

__all__ = ["check", "train"]

_log = logging.getLogger("ckptmgr")

_TREES = ("lightning.pytorch", "pytorch_lightning")
_SCHEDULE_KEYS = ("_interval_", "_frequency_", "_monitor_")


def check(plan: Plan, *, nproc: int | None = None) -> None:
    """Import everything that a plan names and check that it can be built. Nothing is, but what saves.

    Args:
        plan: A plan of kind ``lightning``.
        nproc: By how many ranks it would be trained; None: by those of this job.

    Raises:
        ConfigError, NotAllowedError: Something cannot be built.
    """
    module = importlib.import_module(_tree_of(plan))
    making = Construction(plan, _parts(plan, module, root=".", world_size=nproc or _world_size()))
    # Made for its own checks: it takes any name, and looks at values itself. It opens nothing.
    making.one("checkpoint", run_dir="unused", resume="never", on_changed_options="apply")


def train(plan: Plan, *, run_dir: str, resume: str, fork_from: Reference | None = None) -> None:
    """Build everything and fit.

    Args:
        plan: A plan of kind ``lightning``.
        run_dir: Where the run lies.
        resume: As the manager's.
        fork_from: A checkpoint that is first copied there, if it fits.

    Raises:
        ConfigError: Something cannot be built. Nothing was claimed.
        StateMismatchError: The checkpoint does not fit what was built. Nothing was claimed.
        ResumeRefusedError: A link in the run directory leads out of it. Nothing was built.
    """
    module = importlib.import_module(_tree_of(plan))
    world_size = _world_size()
    making = Construction(plan, _parts(plan, module, root=absolute(run_dir), world_size=world_size))
    if for_ranks := _for_ranks(plan.tree["trainer"], world_size):
        given = ", ".join(f"trainer.{key}={value}" for key, value in for_ranks.items())
        _log.info("%s, for the %d ranks of this job", given, world_size)
    refuse_links_out(absolute(run_dir))
    if plan.tree["seed"] is not None:
        module.seed_everything(plan.tree["seed"], workers=True, verbose=False)
    model = making.one("model")
    data, loaders = making.one("data"), making.several("loaders")
    if plan.tree["optimizer"] is not None:
        # As if the module had written it: built when the Trainer asks, when the parameters are where they will stay.
        model.configure_optimizers = lambda: _optimizers(plan, making, model)
    manager = making.one("checkpoint", run_dir=run_dir, resume=resume, on_changed_options="apply")
    callbacks, loggers = making.several("callbacks"), making.several("loggers")
    logger = {} if plan.tree["loggers"] is None else {"logger": list(loggers.values())}
    with _as_quiet_as_we_are(module.__name__):
        trainer = making.one("trainer", callbacks=[*callbacks.values(), manager], **logger)
        if fork_from is not None:
            fork_if_it_fits(fork_from, run_dir, check=lambda loaded: check_model(model, loaded))
        trainer.fit(model, loaders.get("train"), loaders.get("val"), datamodule=data)


@contextmanager
def _as_quiet_as_we_are(logger: str) -> Iterator[None]:
    """Let ``--quiet`` hold for what Lightning logs as well. Its warnings stay."""
    lightning = logging.getLogger(logger)
    level = lightning.level
    if is_quiet():
        lightning.setLevel(logging.WARNING)
    try:
        yield
    finally:
        lightning.setLevel(level)


def _parts(plan: Plan, module: Any, *, root: str, world_size: int) -> list[Part]:
    name, tree = module.__name__, plan.tree
    _check_that_there_are_data(plan, module)
    for_ranks = _for_ranks(tree["trainer"], world_size)
    scheduler = tree["scheduler"]
    if scheduler is not None:
        scheduler = {key: value for key, value in scheduler.items() if key not in _SCHEDULE_KEYS}
    trainer = {"_target_": f"{name}.Trainer", "default_root_dir": root, **tree["trainer"], **for_ranks}
    for argument, slot in (("callbacks", "callbacks"), ("logger", "loggers")):
        if isinstance(trainer.get(argument), list | Mapping):
            raise slot_error(f"trainer.{argument}", f"the slot for it is {slot!r}", f"move it there: {slot}: …")
    _refuse_second_manager(plan)
    loggers = by_name(tree["loggers"] or None)
    return [
        Part("model", module.LightningModule, f"a {name}.LightningModule", tree["model"]),
        Part("data", module.LightningDataModule, f"a {name}.LightningDataModule", tree["data"]),
        Part("loaders", None, "", tree["loaders"], is_several=True),
        *optimizer_parts(tree["optimizer"], scheduler),
        Part(
            "checkpoint",
            CheckpointManager,
            "a ckptmgr.CheckpointManager",
            {"_target_": "ckptmgr.CheckpointManager", **(tree["checkpoint"] or {})},
            extra=("run_dir", "resume", "on_changed_options"),
        ),
        Part("callbacks", module.Callback, f"a {name}.Callback", by_name(tree["callbacks"]), is_several=True),
        Part(
            "loggers",
            importlib.import_module(f"{name}.loggers").Logger,
            f"a logger of {name}",
            loggers and {key: _beside_the_run(plan, f"loggers.{key}", node, root) for key, node in loggers.items()},
            is_several=True,
        ),
        Part(
            "trainer",
            module.Trainer,
            f"a {name}.Trainer",
            trainer,
            extra=("callbacks",) if tree["loggers"] is None else ("callbacks", "logger"),
        ),
    ]


def _refuse_second_manager(plan: Plan) -> None:
    # It would take over the run that it names, delete from it what its own policies do not keep, and restore from it.
    for name, node in (by_name(plan.tree["callbacks"]) or {}).items():
        found = None if node is None else class_of(plan, f"callbacks.{name}", node)
        if isinstance(found, type) and issubclass(found, CheckpointManager):
            raise slot_error(
                f"callbacks.{name}",
                "it is a manager of checkpoints, and an experiment has one, in its run directory",
                "move its arguments to the slot 'checkpoint', or remove it",
            )


def _for_ranks(trainer: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Return what the Trainer's arguments leave open, for the ranks that torchrun has started.

    Raises:
        ConfigError: They ask for another number of ranks. Lightning would start processes of its own, or wait for some.
    """
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", "auto")
    nodes = nodes if isinstance(nodes, int) else 1
    count = len(devices) if isinstance(devices, list) else devices
    if nodes > 1 and world_size % nodes:
        next = f"start torchrun on {nodes} machines, or trainer.num_nodes=1"
        raise slot_error("trainer.num_nodes", f"it asks for {nodes}, and this job is {_ranks(world_size)}", next)
    if isinstance(count, int) and count > 0 and count * nodes != world_size:
        raise slot_error(
            "trainer.devices",
            f"it asks for {count}, and this job is {_ranks(world_size)}",
            f"--nproc {count} starts as many on this machine; or trainer.devices={world_size // nodes}",
        )
    open_ones = {"devices": world_size // nodes, "strategy": "ddp"} if world_size > 1 else {}
    return {key: value for key, value in open_ones.items() if trainer.get(key, "auto") == "auto"}


def _world_size() -> int:
    place = place_in_job(os.environ)
    return 1 if place is None else place.world_size


def _ranks(world_size: int) -> str:
    return "one process" if world_size == 1 else f"{world_size} ranks"


def _check_that_there_are_data(plan: Plan, module: Any) -> None:
    if plan.tree["data"] is not None or (plan.tree["loaders"] or {}).get("train") is not None:
        return
    model = class_of(plan, "model", plan.tree["model"])
    if getattr(model, "train_dataloader", None) is module.LightningModule.train_dataloader:
        raise slot_error(
            "data",
            f"nothing gives {plan.tree['model']['_target_']} batches to train on",
            "write `data: {_target_: my_pkg.Data}`, or `loaders: {train: {_target_: torch.utils.data.DataLoader, …}}`",
        )


def _tree_of(plan: Plan) -> str:
    """Say which of its two packages Lightning is used from: what the trainer says, else what the model is made of."""
    named = plan.tree["trainer"].get("_target_")
    if isinstance(named, str):
        return _TREES[1] if named.startswith("pytorch_lightning.") else _TREES[0]
    model = class_of(plan, "model", plan.tree["model"])
    ancestors = inspect.getmro(model) if inspect.isclass(model) else ()
    is_other = any(base.__module__.startswith("pytorch_lightning.") for base in ancestors)
    return _TREES[1] if is_other else _TREES[0]


def _beside_the_run(plan: Plan, key: str, node: Mapping[str, Any] | None, root: str) -> Mapping[str, Any] | None:
    """Let a logger write into the run directory, unless the configuration says where."""
    if node is None or "save_dir" in node or "_args_" in node:
        return node
    takes = inspect.signature(class_of(plan, key, node)).parameters
    return {**node, "save_dir": root} if "save_dir" in takes else node


def _optimizers(plan: Plan, making: Construction, model: torch.nn.Module) -> Any:
    optimizer = making.one("optimizer", model.parameters())
    if plan.tree["scheduler"] is None:
        return optimizer
    schedule = {key.strip("_"): plan.tree["scheduler"][key] for key in _SCHEDULE_KEYS if key in plan.tree["scheduler"]}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": making.one("scheduler", optimizer), **schedule}}
