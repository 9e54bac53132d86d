"""Move parts of a configuration to other keys, with every reference to them."""

from __future__ import annotations

from typing import Any

from ckptmgr.config.interpolations import Interpolation, interpolations, referred
from ckptmgr.config.references import value_at
from ckptmgr.config.tree import Path, Tree, join_key, leaves, split_key

__all__ = ["Moves", "rearranged"]


class Moves:
    """Where each part of a tree goes. What is not named goes with the part that holds it."""

    def __init__(self) -> None:
        self._moves: dict[Path, Path | None] = {}

    def move(self, old: Path, new: Path) -> None:
        """Let a part go to another place."""
        self._moves[old] = new

    def leave_out(self, old: Path) -> None:
        """Let a part go nowhere."""
        self._moves[old] = None

    def new_place(self, old: Path) -> Path | None:
        """Return where a part goes; `None` if it is left out."""
        for length in range(len(old), 0, -1):
            if old[:length] in self._moves:
                new = self._moves[old[:length]]
                return None if new is None else (*new, *old[length:])
        return old


def rearranged(tree: Tree, moves: Moves) -> Tree:
    """Return the tree with its parts where they go. Lists close up over what is left out."""
    result: dict[Any, Any] = {}
    for path, value in leaves(tree):
        new = moves.new_place(path)
        if new is None:
            continue
        if isinstance(value, str):
            value = _followed(value, path, tree, moves)
        holder = result
        for part in new[:-1]:
            if not isinstance(holder.get(part), dict):
                holder[part] = {}
            holder = holder[part]
        # An empty mapping that was merged into another one adds nothing.
        if value != {} or not isinstance(holder.get(new[-1]), dict):
            holder[new[-1]] = value
    closed = _closed(result)
    return closed if isinstance(closed, dict) else {}


def _closed(tree: Any) -> Any:
    """Turn mappings of indices back into lists."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        return [_closed(tree[index]) for index in sorted(tree)]
    return {str(key): _closed(value) for key, value in tree.items()}


def _followed(text: str, place: Path, tree: Tree, moves: Moves) -> str:
    for found in reversed(interpolations(text)):
        body = _followed(found.body, place, tree, moves) if found.is_nested else _new_key(found, place, tree, moves)
        text = f"{text[: found.start]}${{{body}}}{text[found.end :]}"
    return text


def _new_key(found: Interpolation, place: Path, tree: Tree, moves: Moves) -> str:
    if found.resolver is not None:
        return found.body
    base, key = referred(found, place) or ((), "")
    try:
        target = value_at(tree, (*base, *split_key(key)))
    except ValueError:
        return found.body
    if target is None:
        return found.body
    new = moves.new_place(target[0])
    has_moved = new != target[0] or (found.body.startswith(".") and moves.new_place(place) != place)
    return join_key(new) if new is not None and has_moved else found.body
