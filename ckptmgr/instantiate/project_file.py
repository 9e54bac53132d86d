"""The list of allowed names in the project's ``pyproject.toml``."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

from ckptmgr.errors import ConfigError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.instantiate.patterns import check_pattern
from ckptmgr.launch.project import find_project_root

__all__ = ["allowed_by_project", "project_file", "run_directory_around"]

_KEY = "allow"


def run_directory_around(path: Path) -> Path | None:
    """Return the outermost run directory that a path lies in, links followed; None if it lies in none."""
    found = None
    for folder in (path.resolve(), *path.resolve().parents):
        try:
            found = folder if (folder / RUN_MARKER).exists() else found
        except OSError:
            continue
    return found


def project_file(cwd: Path) -> Path | None:
    """Return where the ``pyproject.toml`` of the project around a directory would be; None if there is no project.

    A run directory is never the project: whoever handed over the run could have put the file into it.
    """
    run = run_directory_around(cwd)
    start = cwd.resolve() if run is None else run.parent
    root = find_project_root(start)
    if root == root.parent:
        return None
    file = root / "pyproject.toml"
    return None if run_directory_around(file) is not None else file


def allowed_by_project(file: Path) -> list[str]:
    """Return ``[tool.ckptmgr] allow`` of a ``pyproject.toml``; nothing if it has none.

    Raises:
        ConfigError: The file cannot be read, or the list is not one of patterns.
    """
    try:
        document = tomllib.loads(file.read_bytes().decode())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}", why=str(error), next="it says which names configurations may use: make it readable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid TOML", why=str(error), next="correct the file") from error
    table: object = document
    for name in ("tool", "ckptmgr"):
        table = table.get(name, {}) if isinstance(table, dict) else table
    if not isinstance(table, dict):
        raise ConfigError(
            f"{file}: [tool.ckptmgr] is not a table", next="write [tool.ckptmgr], and below it allow = […]"
        )
    for key in table:
        if key != _KEY and difflib.get_close_matches(key.lower(), [_KEY, "allowed", "allow_targets"], cutoff=0.75):
            raise ConfigError(f"{file}: [tool.ckptmgr] has no key {key!r}", next=f"did you mean {_KEY!r}?")
    patterns = table.get(_KEY, [])
    if not isinstance(patterns, list):
        raise ConfigError(
            f"{file}: [tool.ckptmgr] allow is not a list",
            why=f"it is of type {type(patterns).__name__}",
            next='write it as allow = ["my_pkg.*"]',
        )
    return [check_pattern(pattern, where=f"{file}: [tool.ckptmgr] allow") for pattern in patterns]
