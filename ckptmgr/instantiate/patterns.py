"""The grammar of dotted names, and of patterns over them."""

from __future__ import annotations

import keyword
import sys
import unicodedata

from ckptmgr.errors import ConfigError, UsageError

__all__ = ["check_pattern", "matches", "why_not_a_name"]

_MAX_LENGTH = 256


def why_not_a_name(name: str) -> str | None:
    """Return why a text is no dotted name of something that can be imported; None if it is one."""
    if not name:
        return "it is empty"
    if len(name) > _MAX_LENGTH:
        return f"it is longer than {_MAX_LENGTH} characters"
    # What looks like an allowed name to a reader must be that name.
    if unicodedata.normalize("NFKC", name) != name:
        return f"it holds characters that only look like others: {name!a}"
    for segment in name.split("."):
        if not segment:
            return "a name is dotted, as in package.module.Class, without empty parts"
        if not segment.isidentifier() or keyword.iskeyword(segment):
            return f"{segment!a} is no Python name"
        if segment.startswith("__"):
            return f"{segment!r} reaches into what Python keeps about an object"
    if "." not in name:
        return "a name is dotted, as in package.module.Class"
    return None


def matches(pattern: str, name: str) -> bool:
    """Return whether a name is the pattern, or lies below one that ends in ``.*``. Private names never lie below."""
    if not pattern.endswith(".*"):
        return name == pattern
    prefix = pattern[:-1]
    return name.startswith(prefix) and not any(part.startswith("_") for part in name[len(prefix) :].split("."))


def check_pattern(pattern: object, *, where: str, error: type[UsageError] = ConfigError) -> str:
    """Return a pattern of the user as it is.

    Raises:
        UsageError: It is no dotted name, or it allows what nobody can have meant. `error` says which class.
    """
    reason = _why_not_a_pattern(pattern)
    if reason is not None or not isinstance(pattern, str):
        raise error(
            f"{where}: {pattern!r} is not a pattern of names to allow",
            why=reason,
            next="name one class (my_pkg.models.Net), or all classes of a package (my_pkg.*)",
        )
    return pattern


def _why_not_a_pattern(pattern: object) -> str | None:
    if not isinstance(pattern, str):
        return f"it is of type {type(pattern).__name__}, and names are text"
    if not pattern:
        return "it is empty"
    if not pattern.endswith(".*"):
        if pattern == "*":
            return "it would allow everything that Python can import, os.system included"
        if "*" in pattern:
            return "a star may only stand at the end, after a dot"
        return why_not_a_name(pattern)
    prefix = pattern[:-2]
    if "*" in prefix:
        return "a star may only stand at the end, after a dot"
    # A package of one word is a name here, so the rule of the dot is met by adding one.
    reason = why_not_a_name(f"{prefix}.x") if prefix else "nothing stands before the star"
    if reason is None and prefix.partition(".")[0] in sys.stdlib_module_names:
        return "classes of the standard library start processes and write files; name the one that is meant exactly"
    return reason
