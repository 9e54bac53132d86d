"""The configuration that Hydra composed and stored in ``.hydra/config.yaml``."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

from ckptmgr.config.interpolations import all_interpolations
from ckptmgr.config.rearrange import Moves, rearranged
from ckptmgr.config.references import referred_paths, value_at
from ckptmgr.config.tree import Path, Tree, join_key, leaves

__all__ = ["is_hydra", "translate_hydra"]

_SLOTS = frozenset(
    {"seed", "name", "run_dir", "trainer", "loop", "model", "data", "loaders", "optimizer", "scheduler"}
    | {"callbacks", "loggers", "state", "checkpoint"}
)
_RENAMED = {"datamodule": "data", "logger": "loggers", "lr_scheduler": "scheduler"}


def is_hydra(tree: Tree, file: str) -> bool:
    """Say whether Hydra composed this: it lies in ``.hydra``, or refers to Hydra's own values."""
    return FilePath(file).parent.name == ".hydra" or any(_is_of_hydra(value) for _, value in leaves(tree))


def translate_hydra(tree: Tree) -> tuple[Tree, list[str]]:
    """Return the configuration with our keys, and what was done to it."""
    moves = Moves()
    notes: list[str] = []
    _plan_slots(tree, moves, notes)
    _plan_settings(tree, moves, notes)
    gone = _of_hydra(tree)
    for path in gone:
        moves.leave_out(path)
    if gone:
        notes.append(f"Left out, because their values come from Hydra: {', '.join(join_key(path) for path in gone)}.")
    new = rearranged(tree, moves)
    unread = _unread(new)
    for key in unread:
        del new[key]
    if unread:
        notes.append(f"Left out, because nothing reads them: {', '.join(unread)}.")
    return new, notes


def _plan_slots(tree: Tree, moves: Moves, notes: list[str]) -> None:
    for old, new in _RENAMED.items():
        if old in tree and new not in tree:
            moves.move((old,), (new,))
            notes.append(f"{old} became {new}.")
    for slot in ("callbacks", "logger", "loggers"):
        place = moves.new_place((slot,))
        if place and isinstance(tree.get(slot), dict) and "_target_" in tree[slot]:
            moves.move((slot,), (*place, 0))
    if tree.get("ckpt_path") is not None:
        notes.append(f"ckpt_path was left out: nothing is restored from {tree['ckpt_path']!r}.")
    for key in ("ckpt_path", "hydra"):
        moves.leave_out((key,))


def _plan_settings(tree: Tree, moves: Moves, notes: list[str]) -> None:
    """Everything is built as with ``_recursive_: true`` and ``_convert_: all`` here."""
    found = [
        path for path, value in leaves(tree) if path[-1] == "_convert_" or (path[-1] == "_recursive_" and value is True)
    ]
    for path in found:
        moves.leave_out(path)
    if found:
        shown = ", ".join(join_key(path) for path in found)
        notes.append(f"Left out, because nested objects are always built, from plain lists and mappings: {shown}.")


def _of_hydra(tree: Tree) -> list[Path]:
    """List the values that refer to Hydra's own, directly or through others."""
    texts = {path: value for path, value in leaves(tree) if isinstance(value, str) and "${" in value}
    gone = [path for path, value in texts.items() if _is_of_hydra(value)]
    has_grown = True
    while has_grown:
        has_grown = False
        for path, value in texts.items():
            targets = (value_at(tree, wanted) for wanted in referred_paths(value, path))
            if path not in gone and any(target is not None and target[0] in gone for target in targets):
                gone.append(path)
                has_grown = True
    return gone


def _is_of_hydra(value: Any) -> bool:
    return any(found.resolver == "hydra" for found in all_interpolations(value))


def _unread(tree: Tree) -> list[str]:
    """List top-level keys that are no slots, and that no slot refers to, directly or through others."""
    read = {key for key in tree if key in _SLOTS}
    has_grown = True
    while has_grown:
        targets = {str(w[0]) for p, v in leaves(tree) if p and p[0] in read for w in referred_paths(v, p) if w}
        has_grown = not targets <= read
        read |= targets
    # What a computed reference leads to cannot be known.
    is_computed = any("${" in one.arguments for _, value in leaves(tree) for one in all_interpolations(value))
    return [] if is_computed else [key for key in tree if key not in read]
