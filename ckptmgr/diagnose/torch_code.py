"""Lines of Python for proposals: short where a pattern says the same as a list of names, and never saying more."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from ckptmgr.diagnose.name_words import split_name

__all__ = ["names_in", "raw", "rename_line", "template"]

_LISTED = 3
_MAX_PATTERNS = 8


def raw(text: str) -> str:
    """Return a string literal, a raw one where that is possible."""
    return f'r"{text}"' if text.isprintable() and '"' not in text and not text.endswith("\\") else repr(text)


def names_in(names: Sequence[str], among: Collection[str], *, of: str = "state") -> str:
    """Return an expression whose value is these names.

    Args:
        names: At least one.
        among: All names that ``of`` has when the line runs.
        of: The variable that holds them.
    """
    if len(names) > _LISTED:
        patterns = list(dict.fromkeys(_pattern(name) for name in names))
        if len(patterns) <= min(_MAX_PATTERNS, len(names) // 2):
            pattern = "|".join(patterns)
            if {name for name in among if re.fullmatch(pattern, name)} == set(names):
                return f"[name for name in {of} if re.fullmatch({raw(pattern)}, name)]"
    return repr(tuple(names))


def template(names: Iterable[str], numbers: Sequence[str]) -> str | None:
    """Return an f-string over ``i``, ``j`` and so on that gives these names for these numbers; None if none does.

    Args:
        names: One for each tuple in ``numbers``.
        numbers: Names of the loop's variables, one for each number of a name.
    """
    made: set[str] = set()
    for name in names:
        split = split_name(name)
        if len(split.numbers) != len(numbers):
            return None
        variables = iter(numbers)
        parts = [
            f"{{{next(variables)}}}" if part == "*" else part.replace("{", "{{").replace("}", "}}")
            for part in split.skeleton
        ]
        made.add(".".join(parts) + split.joint + split.leaf.replace("{", "{{").replace("}", "}}"))
    text = made.pop() if len(made) == 1 else None
    return None if text is None else (f'f"{text}"' if text.isprintable() and not set(text) & set('"\\') else None)


def rename_line(names: Mapping[str, str], among: Collection[str], steps: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the lines that rename some tensors and no others.

    Args:
        names: Old names and new ones.
        among: All names in ``state`` when the line runs.
        steps: Patterns, and what to write for what they match, that may do the same one after the other.
    """

    def by_steps(name: str) -> str:
        for pattern, replacement in steps:
            name = re.sub(pattern, replacement, name)
        return name

    if steps and all(by_steps(name) == names.get(name, name) for name in among):
        change = "name"
        for pattern, replacement in steps:
            change = f"re.sub({raw(pattern)}, {raw(replacement)}, {change})"
        return (f"state = {{{change}: tensor for name, tensor in state.items()}}",)
    return (
        f"names = {dict(names)!r}",
        "state = {names.get(name, name): tensor for name, tensor in state.items()}",
    )


def _pattern(name: str) -> str:
    split = split_name(name)
    parts = [r"\d+" if part == "*" else re.escape(part) for part in split.skeleton]
    joint = "" if not parts else r"\." if split.joint == "." else "_"
    return r"\.".join(parts) + joint + re.escape(split.leaf)
