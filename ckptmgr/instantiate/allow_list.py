"""What a configuration may name: what was reviewed here, and what the user's own side allows. All else is denied.

A list of what is forbidden is no boundary: there is always one more function that runs a file. So this is a list of
what is allowed, and a run directory has no say in it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ckptmgr.errors import UsageError
from ckptmgr.instantiate.patterns import check_pattern, matches, why_not_a_name
from ckptmgr.instantiate.project_file import allowed_by_project, project_file
from ckptmgr.instantiate.reviewed import REVIEWED, Reviewed

__all__ = ["BUILT_IN", "AllowList", "Entry", "allow_targets", "factory", "is_factory"]

BUILT_IN = "built in"

_FACTORY_MARK = "__ckptmgr_factory__"
_declared: list[str] = []

F = TypeVar("F")


def allow_targets(*patterns: str) -> None:
    """Allow configurations to name more than what is built in, from now on and in this process.

    Args:
        patterns: Dotted names: ``my_pkg.models.Net``, or ``my_pkg.*`` for all classes below a package, and for the
            functions that are declared with `factory`. A function without declaration must be named exactly.

    Raises:
        UsageError: A pattern is no dotted name, or would allow everything.
    """
    checked = [check_pattern(pattern, where="allow_targets()", error=UsageError) for pattern in patterns]
    _declared.extend(pattern for pattern in checked if pattern not in _declared)


def factory(function: F) -> F:
    """Declare that configurations may call this function. Its name must be allowed too, as that of a class.

    Example:
        >>> @factory
        ... def resnet(depth: int = 18) -> str:
        ...     return f"a ResNet of depth {depth}"
        >>> resnet(34)
        'a ResNet of depth 34'

    Raises:
        UsageError: It is a class, which needs no declaration, or nothing that can be called.
    """
    inner = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
    if isinstance(inner, type) or not callable(inner):
        raise UsageError(
            f"factory() declares functions, and got {function!r}",
            next="a class needs no declaration" if isinstance(inner, type) else "declare the function that makes it",
        )
    try:
        setattr(inner, _FACTORY_MARK, True)
    except (AttributeError, TypeError) as error:
        raise UsageError(
            f"factory() cannot declare {function!r}", next="wrap it into a function of your own, and declare that"
        ) from error
    return function


def is_factory(function: object) -> bool:
    """Return whether a function was declared with `factory`."""
    return getattr(getattr(function, "__func__", function), _FACTORY_MARK, False) is True


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list, and where it stands."""

    pattern: str
    source: str
    reviewed: Reviewed | None = None

    @property
    def is_exact(self) -> bool:
        return not self.pattern.endswith(".*")

    def allows(self, name: str) -> bool:
        """Return whether this line allows a name, before anything is imported."""
        if self.reviewed is None or self.is_exact or not matches(self.pattern, name):
            return matches(self.pattern, name)
        # A package offers its classes at its top; deeper modules are imported only where something was reviewed.
        is_at_top = "." not in name[len(self.pattern) - 1 :]
        return is_at_top or any(name.startswith(f"{place}.") for place in self.reviewed.homes)

    def covers(self, obj: object, home: str) -> bool:
        """Return whether something that is defined at `home` is what this line means, under whatever name."""
        if self.reviewed is None or self.is_exact:
            # Where something is defined is often a private module; what counts is whose it is.
            return home == self.pattern if self.is_exact else home.startswith(self.pattern[:-1])
        if not any(home.startswith(f"{place}.") for place in self.reviewed.homes):
            return False
        lineage = {f"{cls.__module__}.{cls.__qualname__}" for cls in getattr(obj, "__mro__", ())}
        return not lineage.isdisjoint(self.reviewed.bases)


_REVIEWED = tuple(Entry(reviewed.pattern, BUILT_IN, reviewed) for reviewed in REVIEWED)


class AllowList:
    """The names that one configuration may use.

    Attributes:
        project_file: The ``pyproject.toml`` that was asked, whether or not it exists; None where there is no project.
    """

    def __init__(self, entries: Sequence[Entry] = (), *, project_file: Path | None = None) -> None:
        self._entries = (*_REVIEWED, *entries)
        self._exact = {entry.pattern: entry for entry in reversed(self._entries) if entry.is_exact}
        self._open = tuple(entry for entry in self._entries if not entry.is_exact)
        self.project_file = project_file

    @classmethod
    def gather(cls, *, cwd: Path, extra: Sequence[str] = ()) -> AllowList:
        """Collect the built-in names, the project's ``[tool.ckptmgr] allow``, `extra`, and what user code allowed.

        Args:
            cwd: Where the command was started. The project around it is asked; never one within a run directory.
            extra: Patterns that were typed.

        Raises:
            ConfigError: The project's file cannot be read, or its list is not one of patterns.
            UsageError: A typed pattern is none.
        """
        file = project_file(cwd)
        entries = [Entry(pattern, "pyproject.toml") for pattern in (allowed_by_project(file) if file else ())]
        entries += [Entry(check_pattern(text, where="--allow", error=UsageError), "--allow") for text in extra]
        entries += [Entry(pattern, "allow_targets()") for pattern in _declared]
        return cls(entries, project_file=file)

    def source_of(self, name: str) -> str | None:
        """Return who allows a name; None if nobody does. Nothing is imported."""
        if why_not_a_name(name) is not None:
            return None
        if name in self._exact:
            return self._exact[name].source
        return next((entry.source for entry in self._open if entry.allows(name)), None)

    def names_exactly(self, name: str) -> bool:
        """Return whether a line of the list is this very name: that also allows a function."""
        return name in self._exact

    def exact_names(self) -> list[str]:
        """Return every name that is spelled out."""
        return [entry.pattern for entry in self._entries if entry.is_exact]

    def covers(self, obj: object, home: str) -> bool:
        """Return whether what an allowed name stands for is itself allowed, by the place of its definition.

        A package may offer what it took from elsewhere: ``my_pkg.os`` is not ``my_pkg``'s. What it took from another
        allowed place is.

        Args:
            obj: What an allowed name stands for.
            home: Module and qualified name of the definition.
        """
        lines = (*self._open, *self._exact.values())
        return any(entry.covers(obj, home) for entry in lines) or self._is_named_elsewhere(obj, home)

    def _is_named_elsewhere(self, obj: object, home: str) -> bool:
        # Public names differ from the place of the definition (torch.utils.data.dataloader). Nothing is imported to
        # find out: the object exists, so its package is loaded.
        root, last = home.partition(".")[0], home.rpartition(".")[2]
        for name in self._exact:
            module, _, attribute = name.rpartition(".")
            if attribute == last and name.partition(".")[0] == root and _loaded(module, attribute) is obj:
                return True
        return False


def _loaded(module: str, attribute: str) -> Any:
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
