"""Text from a run directory, made fit for a terminal."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, *, keep: str = "") -> str:
    """Spell out control and invisible characters: whoever wrote a run must not write over a terminal.

    Args:
        text: Anything.
        keep: Characters that stay although they are not printable, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )
