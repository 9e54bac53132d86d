"""Links in a run directory: whoever handed over the run could have let one lead to a file of the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ckptmgr.errors import ResumeRefusedError
from ckptmgr.format.layout import ATTEMPTS, CHECKPOINTS
from ckptmgr.words import printable_place

__all__ = ["refuse_links_out"]

# The storage follows no link there.
_OWN = frozenset({ATTEMPTS.rstrip("/"), CHECKPOINTS.rstrip("/")})


def refuse_links_out(run_dir: str) -> None:
    """Refuse to train where loggers and callbacks would write through a link to somewhere else.

    Args:
        run_dir: Absolute path of the run, or a URL. It may itself be a link: the user named it.

    Raises:
        ResumeRefusedError: Something in it links to what is not in it. Names the first.
    """
    if "://" in run_dir:
        return
    root = Path(run_dir).resolve()
    for link in _links(root):
        target = Path(os.path.realpath(link))
        if target != root and root not in target.parents:
            name, place = link.relative_to(root), printable_place(run_dir)
            raise ResumeRefusedError(
                f"{printable_place(str(name))} in {place} links to {printable_place(str(target))}",
                why="loggers write into the run directory, and would write through the link to a file outside of it",
                next="remove the link; a logger that is to write elsewhere says so in its save_dir",
            )


def _links(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [name for name in folders if name not in _OWN]
        yield from (path for name in sorted((*folders, *files)) if (path := here / name).is_symlink())
