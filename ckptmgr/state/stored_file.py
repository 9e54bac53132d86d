"""A file of some tool's own, as a value in the state: stored beside the tensors under its name, byte for byte."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.format.layout import MAX_SEGMENT, payload_stem

__all__ = ["StoredFile", "check_stored_key", "check_stored_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A small file that the tool which made it can read again, such as ``tokenizer.json``.

    Attributes:
        name: As the tool calls it: letters, digits, ``.``, ``_`` and ``-``.
        content: Its bytes.
    """

    name: str
    content: bytes


def check_stored_name(name: str, where: str) -> str:
    """Return the name of a tool's own file, if every storage can hold it and no reader is led elsewhere by it.

    Args:
        name: As the tool calls the file.
        where: Where it stands in the state, for the message.

    Raises:
        UnsupportedStateError: It is no such name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UnsupportedStateError(
            f"{where} has a file with the name {name!r}, which cannot be stored",
            why="names of files are up to 64 letters, digits, '.', '_' and '-', and do not begin with a dot",
            next="give the file another name",
        )
    return name


def check_stored_key(entry: str, key: str, where: str) -> None:
    """Check that the file in a checkpoint, which is named after its entry and itself, gets a name that it can have.

    Args:
        entry: The name of the entry.
        key: What the entry's tree calls the file.
        where: Where it stands in the state, for the message.

    Raises:
        UnsupportedStateError: The name would be too long, or that of the entry's tensors.
    """
    if key == "safetensors":
        raise UnsupportedStateError(
            f"{where} is a file that would be stored as {entry}.safetensors",
            why="that is where the tensors of the entry are",
            next="give the file another name",
        )
    if len(f"{payload_stem(entry, 0)}-rank-00000.{key}") > MAX_SEGMENT:
        raise UnsupportedStateError(
            f"{where} is a file that would be stored as {entry}.{key}",
            why=f"names in a checkpoint have up to {MAX_SEGMENT} characters, of which some are for the rank",
            next="give the entry, or the file, a shorter name",
        )
