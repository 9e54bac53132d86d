"""Every ``_target_`` of a configuration, and whether all of them are allowed: before anything is imported."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ckptmgr.errors import ConfigError, NotAllowedError
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.patterns import why_not_a_name
from ckptmgr.instantiate.reviewed import LEFT_OUT

__all__ = ["Target", "advice_for", "check_targets", "find_targets", "how_to_allow", "is_list", "spoken"]

_MAX_DEPTH = 64
_MAX_NODES = 200_000
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Target:
    """A place of the configuration that names what is to be built.

    Attributes:
        key: Dotted key of the node; empty for the root.
        name: What ``_target_`` says there.
    """

    key: str
    name: str


def spoken(key: str) -> str:
    """Return a key as messages name it."""
    return key or "the configuration"


def find_targets(tree: object, key: str = "") -> list[Target]:
    """Return every ``_target_`` in a tree of plain containers, in the order in which a reader meets them.

    Raises:
        ConfigError: A ``_target_`` is no text, or the tree is too deep or too large to be a configuration.
    """
    return list(_walk(tree, key, 0, [0]))


def _walk(node: object, key: str, depth: int, seen: list[int]) -> Iterator[Target]:
    seen[0] += 1
    if depth > _MAX_DEPTH or seen[0] > _MAX_NODES:
        raise ConfigError(
            f"{spoken(key)[:200]}: the configuration is too {'deep' if depth > _MAX_DEPTH else 'large'}",
            why=f"at most {_MAX_DEPTH} levels and {_MAX_NODES} values, and no part that contains itself",
            next="look for YAML aliases (&name, *name) that refer to each other",
        )
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield Target(key, _name_of(node["_target_"], key))
        for name, value in node.items():
            if name != "_target_":
                yield from _walk(value, f"{key}.{name}" if key else str(name), depth + 1, seen)
    elif is_list(node):
        for number, value in enumerate(node):
            yield from _walk(value, f"{key}.{number}" if key else str(number), depth + 1, seen)


def is_list(node: object) -> TypeGuard[Sequence[object]]:
    """Return whether a node is a list, and no text."""
    return isinstance(node, Sequence) and not isinstance(node, (str, bytes, bytearray))


def _name_of(name: object, key: str) -> str:
    # Not a subclass either: its comparisons could say one thing to the check and another to the import.
    if type(name) is not str:
        raise ConfigError(
            f"{spoken(key)}: _target_ is not a name",
            why=f"it is {name!r:.80}, of type {type(name).__name__}",
            next="write a dotted name, as in _target_: torch.nn.Linear",
        )
    return name


def check_targets(targets: Iterable[Target], allow: AllowList) -> None:
    """Refuse what nobody has allowed. Nothing is imported.

    Raises:
        NotAllowedError: Names each key and name, and what would allow it.
    """
    denied = [target for target in targets if allow.source_of(target.name) is None]
    if not denied:
        return
    first = denied[0]
    others = [f"{_quoted(target.name)} at {spoken(target.key)}" for target in denied[1:] if target.name != first.name]
    why = _why_denied(first.name, allow)
    if others:
        more = f", and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        why += f"; nor allowed: {', '.join(others[:_SHOWN])}{more}"
    raise NotAllowedError(
        f"{spoken(first.key)}: {_quoted(first.name)} is not allowed",
        why=f"{why}; nothing was imported",
        next=advice_for(first.name, allow),
    )


def _quoted(name: str) -> str:
    text = repr(name) if name.isascii() else f"{name!r} ({ascii(name)[1:-1]})"
    return text if len(text) <= 100 else f"{text[:97]}…"


def _why_denied(name: str, allow: AllowList) -> str:
    reason = why_not_a_name(name)
    if reason is not None:
        return reason
    last, root = name.rpartition(".")[2], name.partition(".")[0]
    if root in ("lightning", "pytorch_lightning") and last in LEFT_OUT:
        return LEFT_OUT[last]
    if root in sys.stdlib_module_names:
        return f"{root!r} is Python's own, and a configuration builds models and their training"
    if allow.source_of(name.replace("._", ".")) is not None:
        return "a pattern allows no private names; they must be named exactly"
    return "a configuration may only name what is built in, and what you allow"


def advice_for(name: str, allow: AllowList) -> str:
    """Return what to do about a name that is denied."""
    root, last = name.partition(".")[0], name.rpartition(".")[2]
    known = allow.exact_names()
    if why_not_a_name(name) is not None:
        meant = [other for other in known if other.endswith(f".{name}")]
        meant = meant or [other for other in [name.strip().removesuffix("()").replace(":", ".")] if _is_name(other)]
        return f"did you mean {meant[0]}?" if meant else "write a dotted name, as in _target_: torch.nn.Linear"
    near = [other for other in known if other.rpartition(".")[2] == last and other.partition(".")[0] == root]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    if near:
        return f"did you mean {near[0]}?"
    if root in sys.stdlib_module_names:
        return "write a class of your own for it, and allow that"
    private = any(part.startswith("_") for part in name.split("."))
    spelled_out = private or last in LEFT_OUT or root in _SHARED_ROOTS
    return how_to_allow(name if spelled_out else f"{root}.*", allow)


def _is_name(name: str) -> bool:
    return why_not_a_name(name) is None


# Whoever allows all of one of these allows much that was left out on purpose.
_SHARED_ROOTS = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "torchdata", "numpy", "ckptmgr")


def how_to_allow(pattern: str, allow: AllowList) -> str:
    """Return the ways to add a pattern to the list, as a sentence."""
    ways = [f"--allow '{pattern}'", f'ckptmgr.allow_targets("{pattern}")']
    if allow.project_file is not None:
        ways.insert(0, f'allow = ["{pattern}"] under [tool.ckptmgr] in {allow.project_file}')
    return f"if you trust it: {', or '.join(ways)}"
