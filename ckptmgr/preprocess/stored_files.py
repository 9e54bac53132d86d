"""A tool's own files in a tree: their names are checked, and they are laid out in a directory for the tool to read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.state.stored_file import StoredFile

__all__ = ["checked_file", "files_of_directory", "write_files"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


def checked_file(file: Any, *, name: str | None = None) -> StoredFile:
    """Return the file if it is one, with a name that leaves no directory.

    Args:
        file: From a tree.
        name: The name that it must have, if that is known.

    Raises:
        CorruptCheckpointError: It is no file, or its name is not one of a file in a directory.
    """
    if not isinstance(file, StoredFile) or type(file.content) is not bytes or type(file.name) is not str:
        raise CorruptCheckpointError(
            f"the preprocessor of the checkpoint has a {type(file).__name__} where a file belongs",
            next="verify the checkpoint: `ckptmgr verify`",
        )
    if not _NAME.fullmatch(file.name) or (name is not None and file.name != name):
        raise CorruptCheckpointError(
            f"the preprocessor of the checkpoint has a file of the name {file.name[:200]!r}",
            why=f"{name!r} belongs there" if name else "names are letters, digits, '.', '_' and '-', and no path",
            next="the checkpoint was altered; do not load it",
        )
    return file


def write_files(files: Iterable[Any], directory: Path) -> None:
    """Write files of a tree into an empty directory.

    Raises:
        CorruptCheckpointError: One is no file, has a bad name, or has the name of another.
    """
    for file in files:
        stored = checked_file(file)
        try:
            # Exclusive, so that names that differ only by case do not replace each other.
            with (directory / stored.name).open("xb") as stream:
                stream.write(stored.content)
        except FileExistsError as error:
            raise CorruptCheckpointError(
                f"the preprocessor of the checkpoint has the file {stored.name!r} twice",
                next="verify the checkpoint: `ckptmgr verify`",
            ) from error


def files_of_directory(directory: Path) -> list[StoredFile]:
    """Return what a tool wrote into a directory, in the order of names.

    Raises:
        UnsupportedStateError: It wrote directories, or names that a checkpoint cannot hold.
    """
    files: list[StoredFile] = []
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        if not path.is_file() or path.is_symlink() or not _NAME.fullmatch(path.name):
            raise UnsupportedStateError(
                f"the preprocessor saves {path.name!r}, which a checkpoint cannot hold",
                why="its files must lie in one directory, with names of letters, digits, '.', '_' and '-'",
                next="pass a preprocessor that saves plain files only, or register a kind of your own with "
                "ckptmgr.preprocess.kinds.register_kind(...)",
            )
        files.append(StoredFile(path.name, path.read_bytes()))
    return files
