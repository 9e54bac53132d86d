"""Which values of a configuration refer to which: circles, endless growth, and keys that nobody refers to."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import DictConfig

from ckptmgr.config.interpolations import all_interpolations, referred
from ckptmgr.config.tree import Path, Tree, join_key, leaves, plain, split_key

__all__ = ["CircleError", "GrowthError", "ReferenceWalk", "referred_paths", "unused_keys", "value_at"]

_MAX_STEPS = 10_000
_MAX_STEPS_OF_ALL = 50_000


class CircleError(Exception):
    """A value refers to itself. The chain of keys, the first one again at the end."""

    def __init__(self, chain: list[Path]) -> None:
        super().__init__(" -> ".join(join_key(path) for path in chain))


class GrowthError(Exception):
    """Interpolations of interpolations expand beyond any reasonable size."""


def unused_keys(config: DictConfig, known: Collection[str]) -> list[str]:
    """List the top-level keys that nobody reads: neither known, nor referred to from elsewhere in the configuration.

    Args:
        config: Interpolations in it are text.
        known: Keys that are read.
    """
    tree = plain(config)
    used: set[str] = set(known)
    for path, value in leaves(tree):
        for found in all_interpolations(value):
            target = referred(found, path)
            if target is None:
                continue
            base, key = target
            written = key.partition("${")[0]
            if base:
                continue
            if written != key and not any(mark in written for mark in ".["):
                # The key's first part is computed: every key that may come out is used.
                used.update(name for name in tree if name.startswith(written.lstrip("[")) and name != path[0])
                continue
            used.update(part for part in _split(written)[:1] if part != path[0])
    return [name for name in tree if name not in used]


def referred_paths(text: object, place: Path) -> Iterator[Path]:
    """Yield the places that a text's interpolations refer to, as far as they are written and not computed."""
    for found in all_interpolations(text):
        target = referred(found, place)
        if target is not None and "${" not in target[1]:
            base, key = target
            yield (*base, *_split(key))


def value_at(tree: object, path: Path) -> tuple[Path, Any] | None:
    """Return what is at a place, with the place as the tree writes it; `None` if nothing is there."""
    actual: list[str | int] = []
    for part in path:
        if isinstance(tree, dict) and part in tree:
            actual.append(part)
            tree = tree[part]
        elif isinstance(tree, list) and str(part).isdecimal() and int(part) < len(tree):
            actual.append(int(part))
            tree = tree[int(part)]
        else:
            return None
    return tuple(actual), tree


class ReferenceWalk:
    """Counts what resolving will do: OmegaConf resolves a value again wherever it is referred to.

    Args:
        tree: The whole configuration, unresolved.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._known: dict[Path, int] = {}
        self._total = 0

    def check(self, path: Path, text: object) -> None:
        """Follow everything that a text refers to.

        Raises:
            CircleError: It refers to itself.
            GrowthError: It refers to more than can be meant, or all texts together do.
        """
        self._total += self._steps(path, text, [])
        if self._total > _MAX_STEPS_OF_ALL:
            raise GrowthError

    def _steps(self, path: Path, text: object, chain: list[Path]) -> int:
        if path in self._known:
            return self._known[path]
        if path in chain:
            raise CircleError([*chain[chain.index(path) :], path])
        total = 1
        for wanted in referred_paths(text, path):
            found = value_at(self._tree, wanted)
            if found is None:
                continue
            base, value = found
            for inner, leaf in leaves(value):
                total += self._steps((*base, *inner), leaf, [*chain, path])
                if total > _MAX_STEPS:
                    raise GrowthError
        self._known[path] = total
        return total


def _split(key: str) -> list[str]:
    try:
        return split_key(key)
    except ValueError:
        return [part for part in key.split(".") if part]
