"""Find the interpolations in a text without resolving them: what they refer to, and where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ckptmgr.config.tree import Path

__all__ = ["Interpolation", "all_interpolations", "interpolations", "referred"]

_RESOLVER = re.compile(r"\s*([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)\s*:(.*)", re.DOTALL)
_KEY_TAKERS = frozenset({"oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values"})


@dataclass(frozen=True, slots=True)
class Interpolation:
    """One ``${…}``.

    Attributes:
        start: Where it starts in its text.
        end: Where the text goes on.
        body: What is between the braces.
        resolver: Name of the resolver in ``${resolver:…}``; `None` for a reference to a key.
        arguments: What is behind the colon, or the key. Without the spaces around it.
    """

    start: int
    end: int
    body: str
    resolver: str | None
    arguments: str

    @property
    def is_nested(self) -> bool:
        """Other interpolations are inside of it."""
        return "${" in self.arguments

    def first_argument(self) -> str:
        """Return the first argument, without quotes. An interpolation in it is still text."""
        return split_arguments(self.arguments)[0]

    def has_default(self) -> bool:
        """Say whether there is a second argument that is more than null."""
        return any(argument not in ("", "null") for argument in split_arguments(self.arguments)[1:])


def interpolations(text: object) -> list[Interpolation]:
    """List the outermost interpolations of a text, in order. Anything but text has none."""
    return list(_outermost(text)) if isinstance(text, str) and "${" in text else []


def all_interpolations(text: object) -> Iterator[Interpolation]:
    """Yield the interpolations of a text, with those nested in them."""
    for outer in interpolations(text):
        yield outer
        yield from all_interpolations(outer.body)


def referred(found: Interpolation, place: Path) -> tuple[Path, str] | None:
    """Return what an interpolation refers to: the container that it starts from, and the key from there on.

    Args:
        found: The interpolation.
        place: Key of the value that it stands in; relative references start there.

    Returns:
        `None` if it refers to no key, as ``${oc.env:HOME}``.
    """
    if found.resolver is not None and found.resolver not in _KEY_TAKERS:
        return None
    key = found.first_argument() if found.resolver is not None else found.arguments
    rest = key.lstrip(".")
    ndots = len(key) - len(rest)
    return (place[: -ndots or None] if ndots else ()), rest


def split_arguments(text: str) -> list[str]:
    """Split a resolver's arguments at the commas that are in no quotes and no brackets."""
    parts, start, depth, position = [], 0, 0, 0
    while position < len(text):
        letter = text[position]
        if letter in "'\"":
            position = _past_quote(text, position)
            continue
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    parts.append(text[start:])
    return [part.strip().strip("'\"") for part in parts]


def _outermost(text: str) -> Iterator[Interpolation]:
    position = 0
    while (start := text.find("${", position)) >= 0:
        nbackslashes = start - len(text[:start].rstrip("\\"))
        end = _past_brace(text, start + 2)
        if nbackslashes % 2 or end is None:
            position = start + 2
            continue
        body = text[start + 2 : end - 1]
        call = _RESOLVER.fullmatch(body)
        resolver, arguments = call.groups() if call else (None, body)
        yield Interpolation(start=start, end=end, body=body, resolver=resolver, arguments=arguments.strip())
        position = end


def _past_brace(text: str, position: int) -> int | None:
    depth = 1
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 2
            continue
        if letter in "'\"":
            position = _past_quote(text, position)
            continue
        depth += (letter == "{") - (letter == "}")
        position += 1
        if depth == 0:
            return position
    return None


def _past_quote(text: str, position: int) -> int:
    quote = text[position]
    position += 1
    while position < len(text) and text[position] != quote:
        position += 2 if text[position] == "\\" else 1
    return position + 1
