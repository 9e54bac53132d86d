"""The fsspec protocol ``ckptmgr://``: a checkpoint of a run as one file that ``torch.load`` reads.

``LightningModule.load_from_checkpoint("ckptmgr://runs/digits@best")`` works in any program in which ckptmgr is
installed, with no callback. What follows ``ckptmgr://`` is a reference: a path or a URL, and perhaps ``@`` and a
selector.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError, UsageError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reference import URL_PREFIX, Reference, parse_reference
from ckptmgr.storage.open import open_storage

__all__ = ["PROTOCOL", "CheckpointFileSystem", "own_reference", "register", "url_of"]

PROTOCOL = URL_PREFIX.removesuffix("://")
_IN_MEMORY = 256 * 2**20


def url_of(reference: str) -> str:
    """Return the URL by which Lightning and fsspec know a reference."""
    return reference if reference.startswith(URL_PREFIX) else f"{URL_PREFIX}{reference}"


def own_reference(path: str | os.PathLike[str] | None) -> Reference | None:
    """Return the reference that a Lightning ``ckpt_path`` means, or None if it is no checkpoint of ours.

    Raises:
        UsageError: It begins with ``ckptmgr://`` and what follows is no reference.
    """
    if path is None:
        return None
    text = os.fspath(path)
    if text.startswith(URL_PREFIX):
        return parse_reference(text.removeprefix(URL_PREFIX))
    if "://" not in text and Path(text).is_file():
        return None
    try:
        reference = parse_reference(text)
    except UsageError:
        return None
    if "://" not in reference.run_dir:
        return reference if (Path(reference.run_dir) / RUN_MARKER).is_file() else None
    if reference.run_dir.endswith(".ckpt"):
        return None
    try:
        return reference if Catalog(open_storage(reference.run_dir)).is_run else None
    except (CkptmgrError, OSError, ImportError):
        return None


class CheckpointFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Read-only view of checkpoints as files of ``torch.save``."""

    protocol = PROTOCOL
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return os.fspath(path).removeprefix(URL_PREFIX)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode not in ("rb", "r"):
            raise UsageError(
                f"{URL_PREFIX}{path} cannot be opened with mode {mode!r}",
                why="checkpoints of a run are only written by a manager",
                next="Trainer.save_checkpoint wants a path of its own, such as model.ckpt",
            )
        import torch

        from ckptmgr.lightning.assemble import INFERENCE_ENTRIES, plain_checkpoint
        from ckptmgr.loading import load_checkpoint

        checkpoint = plain_checkpoint(load_checkpoint(self._strip_protocol(path), names=INFERENCE_ENTRIES))
        file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115
        torch.save(checkpoint, file)
        file.seek(0)
        return file

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """Open a checkpoint for reading."""
        return self._open(path, mode, **kwargs)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Describe a checkpoint; its size is that of its payload."""
        reference = parse_reference(self._strip_protocol(path))
        manifest = Catalog.of_existing_run(open_storage(reference.run_dir)).resolve(reference.selector)
        return {
            "name": self._strip_protocol(path),
            "size": manifest.nbytes,
            "type": "file",
            "created": datetime.datetime.fromisoformat(manifest.created_at),
        }

    def exists(self, path: str, **_: Any) -> bool:
        """Say whether a checkpoint answers to the reference."""
        try:
            self.info(path)
        except CheckpointNotFoundError:
            return False
        return True

    def modified(self, path: str) -> datetime.datetime:
        """Return when the checkpoint was written, for Lightning, which takes the newest of several."""
        created = self.info(path)["created"]
        assert isinstance(created, datetime.datetime)
        # Lightning compares with what the local file system gives: aware, in UTC.
        return created if created.tzinfo else created.replace(tzinfo=datetime.UTC)

    created = modified

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List the file that a reference is."""
        info = self.info(path)
        return [info] if detail else [info["name"]]


def register() -> None:
    """Make the protocol known in this process."""
    fsspec.register_implementation(PROTOCOL, CheckpointFileSystem, clobber=True)
