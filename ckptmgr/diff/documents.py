"""What differs between two state documents, place by place, as their tagged JSON stands: nothing of it is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.launch.redact import REDACTED, is_secret_name, redact_text

__all__ = [
    "ABSENT",
    "ValueChange",
    "changes_between_trees",
    "paths_of_tree",
    "renamed_path",
    "renamed_tree",
    "with_digests",
]

ABSENT = "(absent)"
"""Stands for the value of a place that is not there."""

# Containers hold each other at most 32 deep, and a tag adds up to four levels of JSON to one of them.
_MAX_DEPTH = 200
_MAX_SHOWN = 60
_DIGEST_SHOWN = 8
_MAX_READ = 4096
# Where a long list of scalars differs in more places than these, one line tells how many: the state of a random number
# generator would fill the screen.
_LONG, _MANY = 16, 8
_PAIRS = ("$dict", "$ordered_dict", "$counter", "$namespace", "$simple_namespace")
_LISTS = ("$tuple", "$set", "$frozenset", "$size")


@dataclass(frozen=True, slots=True)
class ValueChange:
    """One place of the state, other than tensors, that differs. As text it is one line.

    Attributes:
        path: Entry, then keys and indices, joined by ``/``: ``optimizer/groups/0/lr``.
        a: The value in the first, as text; `ABSENT` where it is not there.
        b: The value in the second, likewise.
        rank: The rank that has it for itself; None for what all have together.

    Example:
        >>> print(ValueChange("optimizer/groups/0/lr", "0.01", "0.1"))
        optimizer/groups/0/lr: 0.01 -> 0.1
    """

    path: str
    a: str
    b: str
    rank: int | None = None

    def __str__(self) -> str:
        place = self.path if self.rank is None else f"{self.path} (rank {self.rank})"
        if self.a == ABSENT:
            return f"{place}: added, {self.b}"
        if self.b == ABSENT:
            return f"{place}: removed, was {self.a}"
        return f"{place}: {self.a} -> {self.b}"


class _Absent:
    pass


_GONE = _Absent()


def changes_between_trees(a: Any, b: Any, path: str, *, rank: int | None = None) -> Iterator[ValueChange]:
    """Yield the places where two trees of an entry differ, in the order of the first one.

    Values are compared as they are stored: ``1``, ``1.0`` and ``true`` differ, a NaN is the word that it is stored as.
    Tensors stand in a tree by name alone; their elements are compared elsewhere. A container that came, went or changed
    its kind is one change.

    Args:
        a: Parsed JSON of the entry in the first document.
        b: The same of the second.
        path: Of the entry.
        rank: For the changes.

    Raises:
        CorruptCheckpointError: A tree is nested deeper than the format allows.
    """
    for tree in (a, b):
        _refuse_endless(tree)
    yield from _changes(a, b, path, rank)


def renamed_path(path: str, names: Mapping[str, str]) -> str:
    """Return a path ``entry/…`` with another entry, where that has another name."""
    entry, slash, rest = path.partition("/")
    return f"{names[entry]}/{rest}" if slash and entry in names else path


def renamed_tree(tree: Any, names: Mapping[str, str]) -> Any:
    """Return a tree in which paths that begin with an entry begin with its other name, as keys and as values.

    Raises:
        CorruptCheckpointError: It is nested deeper than the format allows.
    """

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return renamed_path(value, names)
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, dict):
            return {renamed(key): renamed(item) for key, item in value.items()}
        return value

    _refuse_endless(tree)
    return renamed(tree)


def with_digests(tree: Any, digests: Mapping[str, str]) -> Any:
    """Return a tree in which each file of another tool stands as its name and digest, so that a change of it shows.

    Args:
        tree: Parsed JSON of an entry.
        digests: Of its files, by the name that the tree uses.

    Raises:
        CorruptCheckpointError: It is nested deeper than the format allows.
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(item) for item in value]
        if not isinstance(value, dict):
            return value
        content = value.get("$file") if len(value) == 1 else None
        if isinstance(content, list) and len(content) == 2 and isinstance(content[0], str):
            return {"$file": [content[1], digests.get(content[0], "missing")]}
        return {key: replaced(item) for key, item in value.items()}

    _refuse_endless(tree)
    return replaced(tree)


def paths_of_tree(tree: Any, path: str) -> Iterator[str]:
    """Yield every place of a tree, containers too, as changes name them.

    Raises:
        CorruptCheckpointError: It is nested deeper than the format allows.
    """

    def paths(value: Any, path: str) -> Iterator[str]:
        yield path
        found = _children(value)
        if found is not None:
            for key, item in found[1].items():
                yield from paths(item, f"{path}/{key}")

    _refuse_endless(tree)
    return paths(tree, path)


def _changes(a: Any, b: Any, path: str, rank: int | None) -> Iterator[ValueChange]:
    if (a is _GONE or b is _GONE) and _holds_tensors_alone(b if a is _GONE else a):
        # That a tensor came or went is told where tensors are.
        return
    inner, other = _children(a), _children(b)
    if inner is None or other is None or inner[0] != other[0]:
        if not _is_same(a, b):
            first, second = _shown(a, path), _shown(b, path)
            if first == second:
                # What is cut off, or left out, is what differs.
                first, second = f"{first} (before)", f"{second} (after)"
            yield ValueChange(path, first, second, rank)
        return
    kind, children = inner
    _, others = other
    if kind in ("a list", "$tuple") and (summary := _of_a_long_list(children, others, path, rank)) is not None:
        yield from summary
        return
    for key in children | others:
        yield from _changes(children.get(key, _GONE), others.get(key, _GONE), f"{path}/{key}", rank)


def _of_a_long_list(
    a: Mapping[str, Any], b: Mapping[str, Any], path: str, rank: int | None
) -> list[ValueChange] | None:
    """Return the change of a long list of scalars as one, or none; None for a list that is told place by place."""
    if max(len(a), len(b)) <= _LONG or any(
        isinstance(item, dict | list) for items in (a, b) for item in items.values()
    ):
        return None
    different = [key for key in a.keys() & b.keys() if not _is_same(a[key], b[key])]
    if len(different) + abs(len(a) - len(b)) <= _MANY:
        return None
    words = f"{len(different)} of them differ"
    return [ValueChange(path, f"{len(a)} values", f"{len(b)} values, {words}", rank)]


def _children(value: Any) -> tuple[str, dict[str, Any]] | None:
    """Return what kind of container a value is, and what it holds by key; None for what is no container."""
    if isinstance(value, list):
        return "a list", _numbered(value)
    if not isinstance(value, dict):
        return None
    tag = next(iter(value)) if len(value) == 1 else ""
    if not tag.startswith("$"):
        return "a dict", value
    content = value[tag]
    if tag == "$config":
        return _children(content)
    if tag == "$sparse" and isinstance(content, dict):
        return tag, content
    if tag in ("$default_dict", "$deque") and isinstance(content, list) and len(content) == 2:
        content = content[1]
    elif tag not in _PAIRS and tag not in _LISTS:
        return None
    if not isinstance(content, list):
        return None
    if tag in _PAIRS or tag == "$default_dict":
        pairs = [pair for pair in content if isinstance(pair, list) and len(pair) == 2]
        found = {_key(key): item for key, item in pairs}
        # Two keys that look alike, such as 1 and "1", would hide one another.
        return (tag, found) if len(found) == len(content) else None
    return tag, _numbered(content)


def _holds_tensors_alone(value: Any) -> bool:
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("$tensor", "$array", "$sparse"):
        return True
    found = _children(value)
    return found is not None and bool(found[1]) and all(_holds_tensors_alone(item) for item in found[1].values())


def _numbered(items: list[Any]) -> dict[str, Any]:
    return {str(index): item for index, item in enumerate(items)}


def _key(key: Any) -> str:
    return key if isinstance(key, str) else _text(key)


def _is_same(a: Any, b: Any) -> bool:
    # As text, 1 and 1.0 and true are different, and so are 0.0 and -0.0.
    return a is b or (type(a) is type(b) and a is not _GONE and b is not _GONE and _text(a) == _text(b))


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shown(value: Any, path: str) -> str:
    if value is _GONE:
        return ABSENT
    # What is looked at is more than what is shown, so that no secret is cut in two.
    text = _words(value)[:_MAX_READ]
    if is_secret_name(path.rpartition("/")[2]) and not isinstance(value, dict | list | bool | None):
        return REDACTED
    text = redact_text(text)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _words(value: Any) -> str:
    """Return a value as a person would write it, as far as that is short."""
    if isinstance(value, dict) and len(value) == 1:
        tag, content = next(iter(value.items()))
        if tag in ("$float", "$int", "$dtype", "$device", "$path", "$datetime", "$date", "$time") and isinstance(
            content, str
        ):
            return content
        if tag in ("$tensor", "$array") and isinstance(content, str):
            return f"the tensor {content}"
        if tag == "$file" and isinstance(content, list) and len(content) == 2:
            return f"{content[0]} ({str(content[1])[:_DIGEST_SHOWN]})"
        if tag in ("$numpy_array", "$numpy_scalar") and isinstance(content, list) and len(content) == 3:
            return f"NumPy {content[0]} {content[1]}: {content[2]}"
        if tag in ("$bytes", "$bytearray") and isinstance(content, str):
            return f"{len(content) * 3 // 4} bytes: {content}"
        if tag == "$enum" and isinstance(content, list):
            return ".".join(map(str, content))
    found = _children(value)
    if found is not None and len(found[1]) > 4:
        return f"{found[0].removeprefix('$')} of {len(found[1])}"
    return _text(value)


def _refuse_endless(tree: Any) -> None:
    """Refuse what would be too deep to walk; what the parser lets pass may still be that."""
    level = [tree]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        if not inner:
            return
        level = inner
    raise CorruptCheckpointError(
        "a state document is nested deeper than the format allows",
        why=f"values stand more than {_MAX_DEPTH} levels deep",
        next="it was not written by ckptmgr: do not trust it",
    )
