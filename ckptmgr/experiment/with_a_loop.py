"""A plain PyTorch experiment: model, optimizer and loaders from a plan, given to the user's own training loop."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ckptmgr.checkpointer import Checkpointer
from ckptmgr.experiment.construct import Construction, Part, optimizer_parts
from ckptmgr.experiment.forking import fork_if_it_fits
from ckptmgr.experiment.plan import Plan
from ckptmgr.experiment.process_group import process_group
from ckptmgr.experiment.slots import slot_error
from ckptmgr.loop_state import check_loop
from ckptmgr.run.reference import Reference

__all__ = ["check", "train"]

_SAVED = ("model", "optimizer", "scheduler")


def check(plan: Plan, *, nproc: int | None = None) -> None:
    """Import everything that a plan names and check that it can be built. Nothing is, but what saves.

    Args:
        plan: A plan of kind ``plain``.
        nproc: By how many ranks it would be trained: as many as there are.

    Raises:
        ConfigError, NotAllowedError: Something cannot be built.
    """
    making = Construction(plan, _parts(plan))
    # Made for its own checks of values. It opens nothing.
    making.one("checkpoint", run_dir="unused", state={"model": {}}, resume="never", on_changed_options="apply")


def train(plan: Plan, *, run_dir: str, resume: str, fork_from: Reference | None = None) -> None:
    """Build everything, and call the loop with it.

    The loop is called with ``checkpointer`` and with each slot that the configuration has, by name: ``model``,
    ``optimizer``, ``scheduler``, ``data``, ``train_loader``, ``val_loader``, and those of ``state``. It calls
    ``checkpointer.resume()`` itself, and need not close anything.

    Of several ranks each calls the loop, with a process group in place. The loop wraps its model itself, as in
    ``DistributedDataParallel(model)``; a model of shards (``fully_shard``) is made by a factory in the slot ``model``,
    since the optimizer is built from its parameters.

    Args:
        plan: A plan of kind ``plain``.
        run_dir: Where the run lies.
        resume: As the checkpointer's.
        fork_from: A checkpoint that is first copied there, if it fits.

    Raises:
        ConfigError: Something cannot be built. Nothing was claimed.
        StateMismatchError: The checkpoint does not fit what was built. Nothing was claimed.
    """
    making = Construction(plan, _parts(plan))
    with process_group():
        _build_and_loop(plan, making, run_dir=run_dir, resume=resume, fork_from=fork_from)


def _build_and_loop(
    plan: Plan, making: Construction, *, run_dir: str, resume: str, fork_from: Reference | None
) -> None:
    _seed(plan.tree["seed"])
    given: dict[str, Any] = {"model": making.one("model"), "data": making.one("data")}
    given |= {f"{name}_loader": loader for name, loader in making.several("loaders").items()}
    if plan.tree["optimizer"] is not None:
        given["optimizer"] = making.one("optimizer", given["model"].parameters())
    if plan.tree["scheduler"] is not None:
        given["scheduler"] = making.one("scheduler", given["optimizer"])
    others = making.several("state")
    given = {name: value for name, value in {**given, **others}.items() if value is not None}
    state = {name: given[name] for name in (*_SAVED, *others) if name in given}
    checkpointer = making.one("checkpoint", run_dir=run_dir, state=state, resume=resume, on_changed_options="apply")
    loop = making.one("loop", checkpointer=checkpointer, **given)
    if fork_from is not None:
        fork_if_it_fits(fork_from, run_dir, check=lambda loaded: check_loop(state, loaded))
    with checkpointer:
        loop()


def _parts(plan: Plan) -> list[Part]:
    tree = plan.tree
    given = [name for name in ("model", "data", "optimizer", "scheduler") if tree[name] is not None]
    given += [f"{name}_loader" for name, node in (tree["loaders"] or {}).items() if node is not None]
    others = [name for name, node in (tree["state"] or {}).items() if node is not None]
    if not others and tree["model"] is None:
        raise slot_error("model", "there is nothing to save", "give a model, or a slot `state`")
    return [
        Part("model", torch.nn.Module, "a torch.nn.Module", tree["model"]),
        Part("data", None, "", tree["data"]),
        Part("loaders", None, "", tree["loaders"], is_several=True),
        *optimizer_parts(tree["optimizer"], tree["scheduler"]),
        Part("state", None, "", tree["state"], is_several=True),
        Part(
            "checkpoint",
            Checkpointer,
            "a ckptmgr.Checkpointer",
            {"_target_": "ckptmgr.Checkpointer", **(tree["checkpoint"] or {})},
            extra=("run_dir", "state", "resume", "on_changed_options"),
        ),
        Part("loop", None, "", tree["loop"], extra=("checkpointer", *given, *others), is_partial=True),
    ]


def _seed(seed: int | None) -> None:
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
