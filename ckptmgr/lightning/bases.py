"""Gives the manager Lightning's own base class, in whichever of its two class trees the program uses."""

from __future__ import annotations

from typing import Any

from ckptmgr.errors import UsageError
from ckptmgr.lightning.before_setup import announce_setup
from ckptmgr.lightning.compat import TREES, check_version, imported_trees, module_of, tree_of

__all__ = ["tree_for", "with_lightning_base"]

_derived: dict[tuple[type[Any], tuple[str, ...]], type[Any]] = {}


def with_lightning_base(cls: type[Any]) -> type[Any]:
    """Return a class that is also a ModelCheckpoint, so that a Trainer knows it as the one that saves checkpoints.

    A program that has imported both trees gets a class that belongs to both.
    """
    if any(base.__module__.startswith(f"{tree}.") for base in cls.__mro__ for tree in TREES):
        return cls
    trees = imported_trees()
    if (cls, trees) not in _derived:
        _derived[cls, trees] = _derive(cls, trees)
    return _derived[cls, trees]


def _derive(cls: type[Any], trees: tuple[str, ...]) -> type[Any]:
    for tree in trees:
        check_version(tree)
        announce_setup(tree)
    bases = tuple(module_of(tree, "callbacks").ModelCheckpoint for tree in trees)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *bases), names)


def tree_for(trainer: Any, manager: Any) -> str:
    """Return the class tree of a Trainer.

    Raises:
        UsageError: The manager belongs to the other tree only.
    """
    tree = tree_of(trainer) or TREES[0]
    if not isinstance(manager, module_of(tree, "callbacks").ModelCheckpoint):
        raise UsageError(
            f"this CheckpointManager was made before {tree} was imported, and the Trainer is one of {tree}",
            why="lightning and pytorch_lightning are two packages with separate classes",
            next=f"import {tree} before making the CheckpointManager, and use one of the two packages throughout",
        )
    return tree
