"""Whether the tool that reads a foreign file is installed here, and in which version; nothing is imported."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["compared", "installed_version"]


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed; None where none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError, OSError):
            continue
    return None


def compared(tool: str, wrote: str | None, here: str | None) -> str:
    """Return a sentence about the version that wrote a file and the one that is installed here."""
    if here is None:
        return f"{tool} is not installed here" + (f"; install {tool} {wrote} or newer" if wrote else "")
    if wrote is None:
        return f"{tool} {here} is installed here"
    older = _numbers(here) < _numbers(wrote)
    if older:
        return (
            f"{tool} {here} is installed here, older than the {wrote} that wrote it: what {wrote} added is unknown to"
            f" it, so install {tool} {wrote} or newer"
        )
    return f"{tool} {here} is installed here; {wrote} wrote it"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in re.findall(r"\d+", version)[:2])
