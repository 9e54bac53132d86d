"""References: how a user names a checkpoint, in every command, in Python and as Lightning's ``ckpt_path``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckptmgr.errors import UsageError
from ckptmgr.format.layout import CheckpointId

__all__ = ["URL_PREFIX", "Reference", "checked_tags", "parse_reference"]

URL_PREFIX = "ckptmgr://"
"""Before a reference, where Lightning and fsspec want a URL."""

_SELECTOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_MAX_TAG_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Reference:
    """A run, and which of its checkpoints: ``latest``, ``best``, a step, a tag or a checkpoint's full id."""

    run_dir: str
    selector: str = "latest"

    def __str__(self) -> str:
        return f"{self.run_dir}@{self.selector}"


def parse_reference(text: str) -> Reference:
    """Read ``RUN_DIR`` or ``RUN_DIR@SELECTOR``, also as the URL ``ckptmgr://…`` that Lightning is given.

    The last ``@`` divides, unless a slash follows it (credentials in a URL) or a local directory has the whole text as
    its name.

    Raises:
        UsageError: Nothing stands before or after the ``@``, or what stands after it cannot be a selector.
    """
    text = text.removeprefix(URL_PREFIX)
    run_dir, at, selector = text.rpartition("@")
    if not at or "/" in selector or ("://" not in text and Path(text).is_dir()):
        run_dir, selector = text, "latest"
    if not run_dir or not _SELECTOR.fullmatch(selector):
        raise UsageError(
            f"{text!r} does not name a checkpoint",
            why="a reference is RUN_DIR, or RUN_DIR@ followed by latest, best, a step, a tag or a checkpoint id",
            next="for example runs/digits, runs/digits@best or runs/digits@1200",
        )
    return Reference(run_dir, selector)


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return tags that can be used in a reference.

    Raises:
        UsageError: One of them could not be referred to, or means something else there.
    """
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise UsageError(f"tags={tags!r}", why="it is a list of names", next=f"write tags=[{tags!r}]")
    checked = tuple(tags)
    for tag in checked:
        if not isinstance(tag, str) or not _SELECTOR.fullmatch(tag) or len(tag) > _MAX_TAG_LENGTH:
            raise UsageError(
                f"{tag!r} cannot be a tag",
                why=f"a tag is at most {_MAX_TAG_LENGTH} letters, digits, '.', '_' and '-', as in RUN_DIR@tag",
            )
        if tag in ("latest", "best") or tag.isdecimal() or _is_id(tag):
            raise UsageError(
                f"{tag!r} cannot be a tag",
                why=f"RUN_DIR@{tag} means something else",
                next=f"choose another name, such as 'tag-{tag}'",
            )
    return checked


def _is_id(text: str) -> bool:
    try:
        CheckpointId.parse(text)
    except ValueError:
        return False
    return True
