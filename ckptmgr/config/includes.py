"""Read a configuration's file and the files that it includes."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptmgr.config.merge import merged
from ckptmgr.config.tree import Tree
from ckptmgr.config.yaml_source import MAX_NBYTES, parse_tree
from ckptmgr.errors import ConfigError

__all__ = ["HYDRA_CONFIG", "load_with_includes"]

HYDRA_CONFIG = Path(".hydra", "config.yaml")
_MAX_FILES = 100


def load_with_includes(path: str | Path) -> tuple[Tree, list[str]]:
    """Read a file and everything that it includes.

    Returns:
        The merged tree, without ``includes``, and the files in the order in which they were merged, the given one last.

    Raises:
        ConfigError: A file cannot be read or is no mapping, or files include each other. Names the chain of files.
    """
    start = Path(path)
    with suppress(OSError, ValueError):
        if (start / HYDRA_CONFIG).is_file():
            start = start / HYDRA_CONFIG
    files: list[str] = []
    return _load(start, (), files), files


def _load(path: Path, chain: tuple[Path, ...], files: list[str]) -> Tree:
    where = _where(path, chain)
    identity = _real(path, where)
    if identity in [_real(each, where) for each in chain]:
        circle = [*chain[[_real(each, where) for each in chain].index(identity) :], path]
        raise ConfigError(
            f"{chain[-1]}: includes go in a circle: {' -> '.join(str(each) for each in circle)}",
            next=f"take {circle[-1].name} out of the includes of {chain[-1].name}",
        )
    if len(files) + len(chain) >= _MAX_FILES:
        raise ConfigError(f"{where}: more than {_MAX_FILES} includes", next="include each file once")
    tree = parse_tree(_read(path, chain), where=where)
    below: Tree = {}
    for name in _names(tree.pop("includes", None), where):
        below = merged(below, _load(path.parent / name, (*chain, path), files))
    files.append(str(path))
    return merged(below, tree)


def _names(includes: Any, where: str) -> list[str]:
    names = [includes] if isinstance(includes, str) else includes or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{where}: includes is no list of paths: {includes!r}", next="write `includes: [base.yaml]`")
    for name in names:
        if "${" in name:
            raise ConfigError(
                f"{where}: the include {name!r} has an interpolation", next="write a path relative to this file"
            )
    return names


def _read(path: Path, chain: tuple[Path, ...]) -> bytes:
    where = _where(path, chain)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{where}: this is a directory", next=_in_directory(path))
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{where}: this is no regular file", next="give a YAML file")
        with path.open("rb") as file:
            return file.read(MAX_NBYTES + 1)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        hint = f"paths are relative to {chain[-1].parent}" if chain else "check the path"
        raise ConfigError(f"{where}: there is no such file", next=hint) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{where}: the file cannot be read", why=reason, next="check the path and its mode"
        ) from error


def _in_directory(path: Path) -> str:
    found = [name for name in ("config.yaml", "config.yml") if (path / name).is_file()]
    return f"give the file: {path / found[0]}" if found else "give the YAML file in it"


def _real(path: Path, where: str) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where}: the path cannot be read", why=str(error), next="check the path") from error


def _where(path: Path, chain: tuple[Path, ...]) -> str:
    return f"{path}" + (f" (included by {' <- '.join(str(each) for each in reversed(chain))})" if chain else "")
