"""Trees that may come from a damaged or hostile file: one error for whatever is wrong with them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, UsageError

__all__ = ["library", "reading_state"]


@contextmanager
def reading_state(kind: str) -> Iterator[None]:
    """Turn what goes wrong while an object is built into one error.

    Raises:
        CorruptCheckpointError: Anything that is not an error of this package.
    """
    try:
        yield
    except CkptmgrError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CorruptCheckpointError(
            f"what the checkpoint holds is no state of a preprocessor of the kind {kind!r}",
            why=f"{type(error).__name__}: {str(error)[:500]}",
            next="verify the checkpoint (`ckptmgr verify`); if it is intact, another version of the preprocessor's "
            "library wrote it",
        ) from error


def library(name: str, *, extra: str | None = None) -> ModuleType:
    """Import a library that a preprocessor needs.

    Args:
        name: Of the module.
        extra: The extra of this package that installs it, or what to install instead.

    Raises:
        UsageError: It is not installed. Says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UsageError(
            f"the preprocessor of this checkpoint needs {package}, which cannot be imported",
            why=str(error),
            next=f"install it: pip install '{extra or package}'",
        ) from error
