"""Where things lie below the root of a run, and which names are allowed there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptmgr.errors import UsageError

__all__ = [
    "ATTEMPTS",
    "CHECKPOINTS",
    "MAX_SEGMENT",
    "MAX_STEP",
    "RUN_MARKER",
    "CheckpointId",
    "attempt_key",
    "check_key",
    "manifest_key",
    "note_key",
    "parse_attempt_key",
    "parse_checkpoint_key",
    "payload_stem",
]

RUN_MARKER = "ckptmgr.json"
ATTEMPTS = "attempts/"
CHECKPOINTS = "checkpoints/"
MAX_STEP = 9_999_999_999
MAX_SEGMENT = 128
"""Characters in one segment of a key."""

_SEGMENT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_SEGMENT - 1}}}", re.ASCII)
_ID = re.compile(r"(\d{10})-(\d{6})-(\d{6})", re.ASCII)
_ATTEMPT_KEY = re.compile(
    r"attempts/(\d{6})/(?:(claim|line|start|end|loggers)\.json|(config|resolved)\.yaml)", re.ASCII
)
_YAML = ("config", "resolved")
_STEM = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """Names one save: at which step, by which attempt, and the how-manieth save of that attempt.

    The order of ids is by step, then attempt, then save. No two saves ever share an id, so no file is written twice.
    """

    step: int
    attempt: int
    save: int

    def __str__(self) -> str:
        return f"{self.step:010d}-{self.attempt:06d}-{self.save:06d}"

    @property
    def folder(self) -> str:
        """The prefix of all keys of this checkpoint, with a slash at its end."""
        return f"{CHECKPOINTS}{self}/"

    @classmethod
    def parse(cls, text: str) -> CheckpointId:
        """Read an id back.

        Raises:
            ValueError: The text is not an id.
        """
        match = _ID.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a checkpoint id")
        return cls(*(int(group) for group in match.groups()))


def check_key(key: str) -> str:
    """Return the key if every segment of it is one that the format allows.

    Letters, digits, ``.``, ``_`` and ``-``, not starting with a dot: so neither ``..`` nor an absolute path, drive,
    URL, backslash or NUL can leave the run's root.

    Raises:
        UsageError: The key is not allowed.
    """
    if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise UsageError(
            f"{key!r} is not a name that a run directory may hold",
            why="names are segments of letters, digits, '.', '_' and '-', joined by '/', none starting with a dot",
            next="if this name comes from a manifest, the manifest was not written by ckptmgr: do not trust it",
        )
    return key


def attempt_key(attempt: int, record: str) -> str:
    """Return the key of one of an attempt's documents.

    Records are ``claim``, ``line``, ``start``, ``end`` and ``loggers``; ``config`` and ``resolved`` are YAML.
    """
    return f"{ATTEMPTS}{attempt:06d}/{record}.{'yaml' if record in _YAML else 'json'}"


def parse_attempt_key(key: str) -> tuple[int, str] | None:
    """Return the attempt number and the document's name, or None for a key that is no attempt's document."""
    match = _ATTEMPT_KEY.fullmatch(key)
    return (int(match.group(1)), match.group(2) or match.group(3)) if match else None


def manifest_key(checkpoint: CheckpointId) -> str:
    """Return the key whose existence makes the checkpoint exist."""
    return f"{checkpoint.folder}manifest.json"


def note_key(checkpoint: CheckpointId, attempt: int, number: int) -> str:
    """Return the key of a record that an attempt adds beside a manifest after the commit."""
    return f"{checkpoint.folder}note-{attempt:06d}-{number:06d}.json"


def parse_checkpoint_key(key: str) -> tuple[CheckpointId, str] | None:
    """Split a key below ``checkpoints/`` into checkpoint id and file name; None if it is not of that form."""
    parts = key.split("/")
    if len(parts) != 3 or f"{parts[0]}/" != CHECKPOINTS:
        return None
    try:
        return CheckpointId.parse(parts[1]), parts[2]
    except ValueError:
        return None


def payload_stem(entry: str, position: int) -> str:
    """Return the file name, without its ending, for the tensors of a state entry.

    The entry's own name where every file system can hold it and cannot confuse it with another; else its position.
    """
    if _STEM.fullmatch(entry) and entry not in ("manifest", "state") and not entry.startswith(("note-", "entry-")):
        return entry
    return f"entry-{position:04d}"
