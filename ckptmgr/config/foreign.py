"""Configurations of other tools as input."""

from __future__ import annotations

from ckptmgr.config.tree import Tree

__all__ = ["check_foreign", "translate"]


def translate(tree: Tree, file: str) -> tuple[Tree, list[str]]:
    """Return the tree with our keys, and what was done to it."""
    return tree, []


def check_foreign(tree: Tree, notes: list[str], *, where: str) -> None:
    """Refuse what a translation left open and no override has filled."""
