"""From what a user typed to the storage that serves it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ckptmgr.errors import UsageError
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage
from ckptmgr.storage.redact import printable_url

__all__ = ["open_storage"]

_LOCAL = ("file", "local")
# `Path("s3://bucket/run")` silently becomes this; two letters at least, so that it is no drive.
_SQUEEZED_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


def open_storage(
    url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None, single_writer: bool = False
) -> Storage:
    """Return the storage for a path or URL. Nothing is read or created yet.

    Args:
        url: A path (``~`` is expanded), ``file://``, ``memory://``, or any URL that fsspec knows.
        storage_options: What fsspec's filesystem takes: credentials, endpoint. Never printed or recorded.
        single_writer: Go on, with a warning, where the storage has no exclusive create; the caller then answers for
            there being one writer. Local directories never need it.

    Raises:
        UsageError: The location cannot be meant so, or needs a package that is not installed.
    """
    text = os.fspath(url)
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is no location", next="give a directory or a URL such as s3://bucket/run")
    squeezed = _SQUEEZED_URL.match(text)
    if squeezed and squeezed.group(1) not in _LOCAL:
        raise UsageError(
            f"{text!r} is neither a path nor a URL",
            why="a URL has two slashes after its colon; pathlib removes one of them",
            next=f"pass the URL as a string: '{squeezed.group(1)}://{text[squeezed.end() :]}'",
        )
    scheme, separator, rest = text.partition("://")
    if separator and scheme not in _LOCAL:
        # Imported here: fsspec and stamina would double the start of every command on a local directory.
        from ckptmgr.storage.remote import FsspecStorage

        return FsspecStorage(text, storage_options=storage_options, single_writer=single_writer)
    if storage_options:
        raise UsageError(f"storage options were given for the local path {printable_url(text)}", next="leave them out")
    return LocalStorage(rest if separator else re.sub(r"^(file|local):(?=/)", "", text))
