"""LightningCLI's ``config.yaml``: ``class_path`` and ``init_args`` become ``_target_`` and its arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from ckptmgr.config.rearrange import Moves, rearranged
from ckptmgr.config.tree import MISSING, Path, Tree, join_key, leaves

__all__ = ["is_lightning_cli", "translate_lightning_cli"]

_SUBCOMMANDS = ("fit", "validate", "test", "predict")
_TOP = {"seed_everything": "seed", "lr_scheduler": "scheduler"}
_KEPT = frozenset({"trainer", "model", "data", "optimizer"})
# jsonargparse lets people write these without their module.
_HOMES = {
    "optimizer": "torch.optim",
    "scheduler": "torch.optim.lr_scheduler",
    "callbacks": "{lightning}.callbacks",
    "loggers": "{lightning}.loggers",
}
_DURATION = re.compile(r"(?:\d+ days?, )?\d+:[0-5]\d:[0-5]\d(?:\.\d+)?")
_UNWRITTEN = "Unable to serialize instance"
_HEADER = re.compile(rb"#\s*(lightning\.pytorch|pytorch_lightning)==")


def is_lightning_cli(tree: Tree) -> bool:
    """Say whether LightningCLI wrote this: its own keys are there, and no ``_target_`` is."""
    tree = _of_subcommand(tree)[0]
    parts = [tree.get(slot) for slot in ("trainer", "model", "data", "optimizer", "lr_scheduler")]
    if any(isinstance(part, dict) and "_target_" in part for part in parts):
        return False
    return "seed_everything" in tree or any(_has_class_path(part) for part in parts)


def translate_lightning_cli(tree: Tree, file: str) -> tuple[Tree, list[str]]:
    """Return the configuration with our keys, and what was done to it."""
    tree, subcommand = _of_subcommand(tree)
    package = _package(file)
    notes = ["LightningCLI's configuration was translated: class_path and init_args became _target_ and its arguments."]
    if subcommand:
        notes.append(f"Of the subcommands, {subcommand} was read.")
    moves = Moves()
    _plan_top(tree, moves, notes)
    _plan_trainer(tree.get("trainer"), moves, notes)
    _plan_classes(tree, (), moves)
    _plan_unwritten(tree, moves, notes)
    new = rearranged(tree, moves)
    if isinstance(tree.get("trainer"), dict):
        new["trainer"] = {"_target_": f"{package}.Trainer"} | new.get("trainer", {})
    _finish(new, package, notes)
    for key, value in _durations(new, ()):
        notes.append(f"{key} is the duration {value!r} as text; `~{key}` leaves it at its default.")
    return new, notes


def _of_subcommand(tree: Tree) -> tuple[Tree, str]:
    for name in _SUBCOMMANDS:
        part = tree.get(name)
        if isinstance(part, dict) and ("trainer" in part or "model" in part):
            shared = {key: value for key, value in tree.items() if key not in _SUBCOMMANDS}
            return shared | part, name
    return tree, ""


def _has_class_path(value: Any) -> bool:
    if isinstance(value, dict):
        if "_target_" in value:
            return False
        return isinstance(value.get("class_path"), str) or any(_has_class_path(item) for item in value.values())
    return isinstance(value, list) and any(_has_class_path(item) for item in value)


def _plan_top(tree: Tree, moves: Moves, notes: list[str]) -> None:
    dropped = []
    for key, value in tree.items():
        if key == "ckpt_path" and value is not None:
            moves.leave_out((key,))
            notes.append(f"ckpt_path was left out: nothing is restored from {value!r}.")
        elif value is None or (key == "seed_everything" and value is False):
            moves.leave_out((key,))
        elif key == "seed_everything" and value is True:
            moves.leave_out((key,))
            notes.append("seed_everything is true, which is another seed each time: no seed was set.")
        elif key in _TOP:
            moves.move((key,), (_TOP[key],))
        elif key not in _KEPT:
            moves.leave_out((key,))
            dropped.append(key)
    if dropped:
        notes.append(f"Left out, because only LightningCLI's program knows them: {', '.join(dropped)}.")


def _plan_trainer(trainer: Any, moves: Moves, notes: list[str]) -> None:
    for key, slot in (("callbacks", "callbacks"), ("logger", "loggers")):
        value = trainer.get(key) if isinstance(trainer, dict) else None
        place = ("trainer", key)
        if isinstance(value, dict) and value:
            moves.move(place, (slot, 0))
        elif isinstance(value, list) or value is False:
            moves.move(place, (slot,))
        elif isinstance(trainer, dict) and key in trainer:
            moves.leave_out(place)
            if value:
                notes.append("trainer.logger is true, which is Lightning's default: no logger was set.")


def _plan_classes(value: Any, path: Path, moves: Moves) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _plan_classes(item, (*path, index), moves)
        return
    if not isinstance(value, dict):
        return
    place = moves.new_place(path) if path else ()
    if isinstance(value.get("class_path"), str) and place is not None:
        moves.move((*path, "class_path"), (*place, "_target_"))
        for key in ("init_args", "dict_kwargs"):
            if isinstance(value.get(key), dict):
                moves.move((*path, key), place)
            elif key in value:
                moves.leave_out((*path, key))
    for key, item in value.items():
        _plan_classes(item, (*path, key), moves)


def _plan_unwritten(tree: Tree, moves: Moves, notes: list[str]) -> None:
    unwritten = [path for path, value in leaves(tree) if isinstance(value, str) and value.startswith(_UNWRITTEN)]
    for path in unwritten:
        moves.leave_out(path)
    if unwritten:
        shown = ", ".join(join_key(path) for path in unwritten)
        notes.append(f"Left out, because LightningCLI could not write them, so that defaults hold: {shown}.")


def _finish(new: Tree, package: str, notes: list[str]) -> None:
    for slot in ("model", "data"):
        # What is missing can be given as an override without a plus, and is asked for if it is not.
        if isinstance(new.get(slot), dict) and "_target_" not in new[slot]:
            new[slot] = {"_target_": MISSING} | new[slot]
            target = f"{slot}._target_=your_package.YourClass"
            notes.append(f"The file names no class for {slot}, because LightningCLI's program does: give {target}.")
    for slot, home in _HOMES.items():
        nodes = new.get(slot)
        for node in nodes if isinstance(nodes, list) else [nodes]:
            name = node.get("_target_") if isinstance(node, dict) else None
            if isinstance(name, str) and "." not in name and isinstance(node, dict):
                node["_target_"] = f"{home.format(lightning=package)}.{name}"


def _package(file: str) -> str:
    try:
        with FilePath(file).open("rb") as opened:
            header = _HEADER.match(opened.read(200))
    except OSError:
        header = None
    return header[1].decode() if header else "lightning.pytorch"


def _durations(value: Any, path: Path) -> Iterator[tuple[str, str]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        if isinstance(item, str) and _DURATION.fullmatch(item):
            yield join_key((*path, key)), item
        yield from _durations(item, (*path, key))
