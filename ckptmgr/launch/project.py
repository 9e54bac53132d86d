"""The user's project: where its root is, and which files in it are the user's own code."""

from __future__ import annotations

import sys
from pathlib import Path

from ckptmgr.format.layout import RUN_MARKER

__all__ = ["find_project_root", "path_in_project", "why_not_own_code"]

_MARKERS = ("pyproject.toml", ".git")


def find_project_root(start: Path) -> Path:
    """Return the nearest directory upwards that holds a ``pyproject.toml`` or ``.git``; else ``start`` itself."""
    start = start.resolve()
    for folder in (start, *start.parents):
        if any((folder / marker).exists() for marker in _MARKERS):
            return folder
    return start


def path_in_project(path: Path, root: Path) -> str | None:
    """Return a path relative to the project's root, with ``/``; None if it lies elsewhere."""
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except (ValueError, OSError, RuntimeError):
        return None


def why_not_own_code(path: Path, root: Path) -> str | None:
    """Return why a file or directory is not to be taken for the user's own code; None if it is.

    Symbolic links are followed first. Installed packages are not the user's, even where the environment lies within the
    project: a record could name `pip`. Nor is anything in a run directory: whoever handed over the run could have put a
    script into it.
    """
    if root == root.parent:
        return f"the project would be the whole file system ({root}); change to the project's directory first"
    try:
        real, root = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError):
        return f"{str(path)!r} does not exist"
    if real != root and root not in real.parents:
        return f"{real} lies outside of the project {root}"
    for prefix in {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()} - {root}:
        if prefix in (real, *real.parents) and prefix not in root.parents:
            return f"{real} belongs to the Python installation in {prefix}"
    for folder in (real, *real.parents):
        if folder.name in ("site-packages", "dist-packages") or (folder / "pyvenv.cfg").exists():
            return f"{real} belongs to the Python environment in {folder}"
        if (folder / RUN_MARKER).exists():
            return f"{real} lies in the run directory {folder}"
        if folder == root:
            break
    return None
