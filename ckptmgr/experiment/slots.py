"""What a configuration may say: its slots, their defaults, and the shape that each must have.

A slot that builds something holds a *node*, a mapping with a ``_target_``, except where a default target is known.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ckptmgr.errors import ConfigError

__all__ = ["DEFAULTS", "SLOTS", "Kind", "check_slots", "kind_of", "slot_error"]

Kind = Literal["lightning", "plain"]

DEFAULTS: Mapping[str, Any] = {
    "seed": None,
    "name": None,
    "run_dir": None,
    "trainer": None,
    "loop": None,
    "model": None,
    "data": None,
    "loaders": None,
    "optimizer": None,
    "scheduler": None,
    "callbacks": None,
    "loggers": None,
    "state": None,
    "checkpoint": None,
}
"""Every slot, and its value where a configuration does not name it."""

SLOTS = frozenset(DEFAULTS)

_ONLY_LIGHTNING = ("trainer", "callbacks", "loggers")
_ONLY_PLAIN = ("loop", "state")
_NODES = ("trainer", "loop", "model", "data", "optimizer", "scheduler", "checkpoint")
_COLLECTIONS = ("callbacks", "loggers", "loaders", "state")
_LOADERS = ("train", "val")
_DEFAULT_TARGETS = ("trainer", "checkpoint")
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def kind_of(tree: Mapping[str, Any]) -> Kind:
    """Say whether an experiment is Lightning's (it has a ``trainer``) or a plain loop (it has a ``loop``).

    Raises:
        ConfigError: Both, or neither.
    """
    has_trainer, has_loop = tree.get("trainer") is not None, tree.get("loop") is not None
    if has_trainer and has_loop:
        raise ConfigError(
            "the configuration has both 'trainer' and 'loop'",
            why="'trainer' means Lightning, 'loop' is a function of yours that trains with plain PyTorch",
            next="remove one of them: ~trainer or ~loop",
        )
    if not has_trainer and not has_loop:
        raise ConfigError(
            "the configuration has neither 'trainer' nor 'loop'",
            why="nothing says how to train",
            next="for Lightning write `trainer: {max_epochs: 10}`, for a plain loop `loop: {_target_: my_pkg.train}`",
        )
    return "lightning" if has_trainer else "plain"


def check_slots(tree: Mapping[str, Any], *, unused: Iterable[str]) -> Kind:
    """Check the shape of a resolved configuration, before anything is imported.

    Args:
        tree: The configuration as plain containers.
        unused: Keys at its top that are no slots, and that nothing in it refers to.

    Returns:
        What kind of experiment it is.

    Raises:
        ConfigError: Something has the wrong shape. Names the key.
    """
    for key in unused:
        near = difflib.get_close_matches(key, [*SLOTS, "includes"], n=1)
        raise slot_error(
            key,
            "it is no slot, and nothing in the configuration refers to it, so it would do nothing",
            (f"did you mean {near[0]!r}? " if near else "") + f"slots are {', '.join(sorted(SLOTS))}",
        )
    kind = kind_of(tree)
    foreign, face = (_ONLY_PLAIN, "a trainer") if kind == "lightning" else (_ONLY_LIGHTNING, "a plain loop")
    for slot in foreign:
        if tree.get(slot) is not None:
            raise slot_error(slot, f"it has no meaning with {face}", f"remove it: ~{slot}")
    _check_scalars(tree)
    for slot in _NODES:
        if tree.get(slot) is not None:
            _check_node(tree[slot], slot, needs_target=slot not in _DEFAULT_TARGETS)
    for slot in _COLLECTIONS:
        if tree.get(slot) is not None:
            _check_collection(tree[slot], slot)
    _check_data(tree, kind)
    return kind


def slot_error(key: str, why: str, next: str | None = None) -> ConfigError:
    """Return the error about one key of a configuration."""
    return ConfigError(f"the configuration's {key!r} cannot be used", why=why, next=next)


def _check_scalars(tree: Mapping[str, Any]) -> None:
    seed = tree.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise slot_error("seed", f"{seed!r} is no whole number from 0 to 2^32 - 1", "for example seed=1")
    name = tree.get("name")
    if name is not None and not (
        isinstance(name, str) and name and set(name) <= _NAME_CHARACTERS and name[0] not in ".-" and len(name) <= 100
    ):
        raise slot_error(
            "name", f"{name!r} becomes part of a directory's name", "use letters, digits, '.', '_' and '-'"
        )
    run_dir = tree.get("run_dir")
    if run_dir is not None and (not isinstance(run_dir, str) or not run_dir):
        raise slot_error("run_dir", f"{run_dir!r} is neither a path nor a URL", "for example run_dir=runs/digits")


def _check_node(node: Any, key: str, *, needs_target: bool) -> None:
    if not isinstance(node, Mapping):
        raise slot_error(key, f"it is {_kind(node)}, not a mapping", _example(key))
    if needs_target and "_target_" not in node:
        raise slot_error(key, "it has no _target_, so nothing says what to build", _example(key))


def _check_collection(nodes: Any, slot: str) -> None:
    if slot in ("callbacks", "loggers") and isinstance(nodes, list):
        items = [(str(position), node) for position, node in enumerate(nodes)]
    elif isinstance(nodes, Mapping) and "_target_" not in nodes:
        items = list(nodes.items())
    elif slot == "loggers" and nodes is False:
        return
    else:
        example = f"{slot}: {{a: {{_target_: my_pkg.Thing}}}}"
        raise slot_error(slot, f"it is {_kind(nodes)}", f"write a mapping of names and nodes, such as `{example}`")
    for name, node in items:
        # Null switches one off that an include has: callbacks.early=null
        if node is not None:
            _check_node(node, f"{slot}.{name}", needs_target=True)
    if slot == "loaders" and (unknown := [name for name, _ in items if name not in _LOADERS]):
        raise slot_error(f"loaders.{unknown[0]}", "loaders are 'train' and 'val'")
    if slot == "state" and (taken := [name for name, _ in items if name in SLOTS or str(name).endswith("_loader")]):
        raise slot_error(f"state.{taken[0]}", "the loop is given something else by that name", "rename it")


def _check_data(tree: Mapping[str, Any], kind: Kind) -> None:
    if tree.get("data") is not None and tree.get("loaders") is not None:
        raise slot_error("loaders", "'data' brings its own loaders", "remove one of them: ~data or ~loaders")
    if kind == "lightning" and tree.get("model") is None:
        raise slot_error("model", "there is nothing to train", _example("model"))
    if tree.get("scheduler") is not None and tree.get("optimizer") is None:
        raise slot_error("scheduler", "there is no optimizer for it", _example("optimizer"))
    if tree.get("optimizer") is not None and tree.get("model") is None:
        raise slot_error("optimizer", "there is no model for it", _example("model"))


def _kind(value: Any) -> str:
    return "a mapping" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else repr(value)


def _example(key: str) -> str:
    known = {
        "model": "model: {_target_: my_pkg.Model, hidden: 64}",
        "data": "data: {_target_: my_pkg.Data, batch_size: 32}",
        "loop": "loop: {_target_: my_pkg.train, epochs: 10}",
        "optimizer": "optimizer: {_target_: torch.optim.AdamW, lr: 0.001}",
        "scheduler": "scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 10}",
        "trainer": "trainer: {max_epochs: 10}",
        "checkpoint": "checkpoint: {every_n_train_steps: 100}",
    }
    return f"write `{known.get(key, key + ': {_target_: my_pkg.Thing}')}`"
