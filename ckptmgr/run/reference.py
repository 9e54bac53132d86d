"""References: how a user names a checkpoint, in every command, in Python and as Lightning's ``ckpt_path``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ckptmgr.errors import UsageError

__all__ = ["Reference", "parse_reference"]

_SELECTOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """A run, and which of its checkpoints: ``latest``, ``best``, a step, a tag or a checkpoint's full id."""

    run_dir: str
    selector: str = "latest"

    def __str__(self) -> str:
        return f"{self.run_dir}@{self.selector}"


def parse_reference(text: str) -> Reference:
    """Read ``RUN_DIR`` or ``RUN_DIR@SELECTOR``.

    The last ``@`` divides, unless a slash follows it (credentials in a URL) or a local directory has the whole text as
    its name.

    Raises:
        UsageError: Nothing stands before or after the ``@``, or what stands after it cannot be a selector.
    """
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
