"""What differs between two configurations, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from omegaconf import DictConfig

from ckptmgr.config.tree import Path, is_same, join_key, plain
from ckptmgr.config.yaml_source import dump_flow
from ckptmgr.launch.redact import REDACTED, is_secret_name, redact_text

__all__ = ["ABSENT", "Absent", "Change", "changes_between"]

_MAX_SHOWN = 60


class Absent(Enum):
    """The type of `ABSENT`."""

    ABSENT = "(absent)"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT
"""Stands for the value of a key that is not there; `None` is a value."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. As text it is one line, without secrets.

    Attributes:
        key: Dotted key, as an override writes it. Names the whole mapping or list where that came or went.
        old: Value before, unresolved; `ABSENT` if the key is new.
        new: Value after, unresolved; `ABSENT` if the key is gone.

    Example:
        >>> print(Change("optimizer.lr", 0.1, 0.01))
        optimizer.lr: 0.1 -> 0.01
        >>> print(Change("seed", ABSENT, 1), Change("name", None, ABSENT), sep="; ")
        seed: added, 1; name: removed, was null
    """

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        if self.old is ABSENT:
            text = f"added, {self._shown(self.new)}"
        elif self.new is ABSENT:
            text = f"removed, was {self._shown(self.old)}"
        else:
            text = f"{self._shown(self.old)} -> {self._shown(self.new)}"
        # A key may hold anything that YAML can quote.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{self.key}: {text}")

    @property
    def texts(self) -> tuple[str | None, str | None]:
        """Old and new value as short text without secrets; None for what is not there."""
        old, new = (None if value is ABSENT else self._shown(value) for value in (self.old, self.new))
        return old, new

    def _shown(self, value: object) -> str:
        text = dump_flow(value)
        is_plain_reference = isinstance(value, str) and value.startswith("${")
        if isinstance(value, (str, int)) and is_secret_name(self.key.rpartition(".")[2]) and not is_plain_reference:
            text = REDACTED
        text = redact_text(text)
        return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def changes_between(old: DictConfig, new: DictConfig) -> list[Change]:
    """List what differs between two configurations, in the order of their keys, old ones first.

    Values are compared as they are written: interpolations by their text, ``1`` and ``1.0`` and ``true`` as different.
    A mapping or list that came, went or changed its kind is one change.
    """
    return list(_changes(plain(old), plain(new), ()))


def _changes(old: Any, new: Any, path: Path) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _changes(old.get(key, ABSENT), new.get(key, ABSENT), (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            before, after = (each[index] if index < len(each) else ABSENT for each in (old, new))
            yield from _changes(before, after, (*path, index))
    elif not is_same(old, new):
        yield Change(key=join_key(path), old=old, new=new)
