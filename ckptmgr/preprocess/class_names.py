"""Names of classes and functions, and digests of their source. Nothing is imported for it."""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import tokenize
from typing import Any

from ckptmgr.state.sources import module_of

__all__ = ["class_name", "is_a", "object_name", "root_packages", "source_digest"]


def object_name(obj: Any) -> str:
    """Return ``module.qualified_name`` of a class or function, by which a program can import it.

    What trains is often a script, and what predicts imports it.
    """
    return f"{module_of(obj)}.{obj.__qualname__}"


def class_name(value: object) -> str:
    """Return ``module.qualified_name`` of the value's class."""
    return object_name(type(value))


def root_packages(value: object) -> frozenset[str]:
    """Return the top-level packages that define the value's class and the classes that it derives from."""
    return frozenset(base.__module__.partition(".")[0] for base in type(value).__mro__)


def is_a(value: object, package: str, *names: str) -> bool:
    """Say whether the value's class is, or derives from, a class of these names defined in the package."""
    return any(
        base.__name__ in names and (base.__module__ == package or base.__module__.startswith(f"{package}."))
        for base in type(value).__mro__
    )


def source_digest(obj: Any) -> str | None:
    """Return a digest of the source of a class or function; None where there is none to read.

    Comments, blank lines and the indentation of the whole do not count. What the source calls is not looked at.
    """
    try:
        source = inspect.getsource(obj)
    except (OSError, TypeError):
        return None
    code = _without_comments(textwrap.dedent(source).strip())
    return hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _without_comments(source: str) -> str:
    lines: list[str | None] = list(source.splitlines())
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        # The source of a lambda, say, is a part of a line.
        return source
    for token in tokens:
        row, column = token.start
        line = lines[row - 1] if row <= len(lines) else None
        if token.type == tokenize.COMMENT and line is not None:
            lines[row - 1] = line[:column].rstrip()
        # A line that ends no statement, and not one of a text over several lines.
        elif token.type == tokenize.NL and line is not None and not line.strip():
            lines[row - 1] = None
    return "\n".join(line for line in lines if line is not None)
