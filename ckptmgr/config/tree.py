"""A configuration as plain dictionaries, lists and scalars, and the keys of its places.

Everything is done on plain trees whose interpolations are still text; OmegaConf gets the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ckptmgr.errors import ConfigError

__all__ = [
    "MAX_DEPTH",
    "MAX_NODES",
    "MISSING",
    "Path",
    "Tree",
    "freeze",
    "is_same",
    "join_key",
    "leaves",
    "plain",
    "split_key",
]

Path: TypeAlias = tuple[str | int, ...]
Tree: TypeAlias = dict[str, Any]

MISSING = "???"
MAX_NODES = 10_000
"""Keys and values of one configuration. OmegaConf needs about a second for them."""
MAX_DEPTH = 50

_ESCAPED = frozenset(".[]=\\")
_ESCAPED_AT_START = ("+", "~", "-")
# OmegaConf's parser takes time that grows with the square.
_MAX_INTERPOLATED_LETTERS = 10_000
_MAX_INTERPOLATIONS = 200


def split_key(text: str) -> list[str]:
    r"""Split a dotted key as OmegaConf does: ``a.b``, ``a[b]``, and ``a\.b`` for a key with a dot in it.

    A backslash takes the meaning from a dot, a bracket, ``=``, from ``+``, ``~`` and ``-``, and from another backslash.

    Raises:
        ValueError: A part is empty, or a bracket is not closed.

    Example:
        >>> split_key(r"callbacks.0[patience].a\.b")
        ['callbacks', '0', 'patience', 'a.b']
    """
    parts: list[str] = []
    part: list[str] = []
    position, bracketed, closed = 0, False, False
    while position < len(text):
        letter = text[position]
        if letter == "\\" and text[position + 1 : position + 2] in (*_ESCAPED, *_ESCAPED_AT_START):
            part.append(text[position + 1])
            position, closed = position + 2, False
            continue
        if bracketed and letter == "]":
            parts.append(_whole(part, text))
            bracketed, closed = False, True
        elif bracketed:
            part.append(letter)
        elif letter in ".[":
            if part or not (closed or (letter == "[" and position == 0)):
                parts.append(_whole(part, text))
            bracketed, closed = letter == "[", False
        elif closed:
            raise ValueError(f"{text!r} goes on right behind a bracket")
        else:
            part.append(letter)
        position += 1
    if bracketed:
        raise ValueError(f"{text!r} has a bracket that is not closed")
    if not closed:
        parts.append(_whole(part, text))
    return parts


def _whole(part: list[str], text: str) -> str:
    if not part:
        raise ValueError(f"{text!r} has an empty part" if text else "it is empty")
    whole = "".join(part)
    part.clear()
    return whole


def join_key(path: Path) -> str:
    r"""Return the dotted key of a place: what `split_key` splits.

    Example:
        >>> join_key(("callbacks", 0, "a.b"))
        'callbacks.0.a\\.b'
    """
    key = ".".join("".join(f"\\{c}" if c in _ESCAPED else c for c in str(part)) for part in path)
    return f"\\{key}" if key.startswith(_ESCAPED_AT_START) else key


def leaves(tree: object, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every scalar and every empty container, in order, with its place."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list) and tree:
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree


def is_same(left: object, right: object) -> bool:
    """Say whether two scalars are the same as written: ``1``, ``1.0`` and ``true`` differ, NaN equals itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def plain(config: DictConfig) -> Tree:
    """Return the configuration as a plain tree. Interpolations stay as text."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def freeze(tree: Tree, *, where: str) -> DictConfig:
    """Return a plain tree as a configuration in struct mode.

    Raises:
        ConfigError: A text is no interpolation although it looks like one, which is named by its key; or there is too
            much of everything.
    """
    _check_size(tree, (), where)
    try:
        config = OmegaConf.create(tree)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(
            f"{where}: {f'{key!r} is' if key else 'something is'} no interpolation that can be read",
            why=str(error).partition("\n")[0],
            next="write ${key} or ${oc.env:NAME}; a dollar sign that is meant as text is written \\${",
        ) from error
    OmegaConf.set_struct(config, True)
    return config


def _check_size(value: object, path: Path, where: str, nodes: int = 0) -> int:
    """Return how many keys and values there are up to here."""
    nodes += 1
    if len(path) > MAX_DEPTH or nodes > MAX_NODES:
        limit = f"nested more than {MAX_DEPTH} deep" if len(path) > MAX_DEPTH else f"more than {MAX_NODES:,} values"
        raise ConfigError(f"{where}: {limit}, at {join_key(path[:4])}", next="name large tables by path")
    if isinstance(value, str) and "${" in value:
        if len(value) > _MAX_INTERPOLATED_LETTERS or value.count("${") > _MAX_INTERPOLATIONS:
            raise ConfigError(
                f"{where}: {join_key(path)} has too many interpolations, or too much text around them",
                why=f"at most {_MAX_INTERPOLATIONS} in {_MAX_INTERPOLATED_LETTERS:,} letters are read",
                next="compute it in your program",
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            nodes = _check_size(item, (*path, key), where, nodes + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            nodes = _check_size(item, (*path, index), where, nodes)
    return nodes
