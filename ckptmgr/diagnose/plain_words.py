"""Text out of a file, made fit to be shown: short, and without characters that would write over a terminal."""

from __future__ import annotations

__all__ = ["clean", "listed", "plural"]


def clean(text: str, limit: int = 120) -> str:
    """Return the text with control and invisible characters spelled out, and its middle left out if it is long."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}…{text[-limit // 4 :]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def listed(names: list[str], limit: int = 5) -> str:
    """Return names in a sentence: ``a, b and 3 more``."""
    shown = [clean(name) for name in names[:limit]]
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest} more"
    return ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + (shown[-1] if shown else "")


def plural(count: int, word: str) -> str:
    """Return ``1 tensor``, ``2 tensors``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
