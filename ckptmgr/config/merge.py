"""One configuration over another: mappings merge key by key, everything else is replaced.

A mapping that names another ``_target_`` than the one below it is another object: it replaces that mapping whole,
because the arguments of one class are not those of another.
"""

from __future__ import annotations

from typing import Any

from ckptmgr.config.tree import Tree

__all__ = ["is_other_object", "merged"]


def merged(below: Tree, above: Tree) -> Tree:
    """Return ``above`` over ``below``. Neither is changed.

    Example:
        >>> merged({"a": {"_target_": "SGD", "lr": 1, "momentum": 0.9}, "b": [1, 2]}, {"a": {"lr": 2}, "b": [3]})
        {'a': {'_target_': 'SGD', 'lr': 2, 'momentum': 0.9}, 'b': [3]}
        >>> merged({"a": {"_target_": "SGD", "lr": 1, "momentum": 0.9}}, {"a": {"_target_": "Adam", "lr": 2}})
        {'a': {'_target_': 'Adam', 'lr': 2}}
    """
    if is_other_object(below, above):
        return dict(above)
    result: dict[str, Any] = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def is_other_object(below: Tree, above: Tree) -> bool:
    """Say whether both mappings describe objects, and objects of different classes."""
    return "_target_" in below and "_target_" in above and below["_target_"] != above["_target_"]
