"""A file of some tool's own, as a value in the state: stored beside the tensors under its name, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StoredFile"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A small file that the tool which made it can read again, such as ``tokenizer.json``.

    Attributes:
        name: As the tool calls it: letters, digits, ``.``, ``_`` and ``-``.
        content: Its bytes.
    """

    name: str
    content: bytes
