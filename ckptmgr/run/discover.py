"""Finding the runs in a directory of runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ckptmgr.format.layout import CHECKPOINTS, RUN_MARKER
from ckptmgr.storage.below import FolderView
from ckptmgr.storage.failures import failing_as
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Entry, Storage

__all__ = ["MAX_DEPTH", "find_runs", "holds_run"]

MAX_DEPTH = 4
"""How far below a directory its runs may lie."""

_log = logging.getLogger("ckptmgr")


def holds_run(storage: Storage) -> bool:
    """Say whether a storage's root is a run: by its marker, or, where that is lost, by its checkpoints."""
    try:
        storage.read(RUN_MARKER)
    except FileNotFoundError:
        return bool(storage.list(CHECKPOINTS))
    return True


def find_runs(storage: Storage) -> dict[str, Storage]:
    """Find the runs below a storage's root: name relative to it → storage, sorted by name.

    At most four levels deep, and not within runs. A local directory is walked without following links; anything else
    is listed once, whole, and the runs are views of that listing.
    """
    if isinstance(storage, LocalStorage):
        root = Path(storage.url)
        with failing_as("list", storage.url, None):
            found = list(_walk(root, 0)) if root.is_dir() else []
        return {str(path.relative_to(root)): LocalStorage(path) for path in sorted(found)}
    entries: dict[str, list[Entry]] = {}
    keys = storage.list()
    roots = {entry.key.removesuffix(RUN_MARKER) for entry in keys if entry.key.rpartition("/")[2] == RUN_MARKER}
    for entry in keys:
        folder = _run_of(entry.key, roots)
        if folder is not None:
            entries.setdefault(folder, []).append(entry)
    return {folder.rstrip("/"): FolderView(storage, folder, entries[folder]) for folder in sorted(entries)}


def _run_of(key: str, roots: set[str]) -> str | None:
    """Return the outermost run that a key lies in."""
    parts = key.split("/")
    for depth in range(1, min(len(parts), MAX_DEPTH + 1)):
        folder = "/".join(parts[:depth]) + "/"
        if folder in roots:
            return folder
    return None


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    inner = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == RUN_MARKER and depth and entry.is_file(follow_symlinks=False):
                    yield folder
                    return
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    inner.append(Path(entry.path))
    except (PermissionError, FileNotFoundError) as error:
        if not depth:
            raise
        _log.warning("%s is left out: %s", folder, error.strerror)
        return
    if depth < MAX_DEPTH:
        for path in inner:
            yield from _walk(path, depth + 1)
