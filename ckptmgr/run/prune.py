"""Deleting checkpoints: manifest first, then only files that our own manifests named and no kept manifest refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckptmgr.format.layout import CheckpointId, manifest_key, parse_attempt_key, parse_checkpoint_key
from ckptmgr.format.manifest import Manifest
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.protocol import HoldsTemporary

__all__ = ["collect_temporary", "collect_torn", "delete_checkpoints"]


def delete_checkpoints(
    catalog: Catalog, drop: Iterable[CheckpointId], *, check: Callable[[], None] = lambda: None
) -> None:
    """Remove checkpoints. Killed anywhere, each of them is either whole or does not exist.

    Args:
        catalog: The run. Must be as new as the decision.
        drop: What to remove. Only the newest attempt may ask for that, after its own commit is durable.
        check: Called before each checkpoint goes; whatever it raises ends the deletion.
    """
    drop = set(drop)
    kept_paths = {
        file.path for manifest in _readable(catalog, set(catalog.committed) - drop) for file in manifest.files
    }
    # All manifests before any payload: what is to go may refer to files of something else that is to go. Files that are
    # left over when this ends early are those of torn saves, and collected as such.
    for checkpoint in sorted(drop, reverse=True):
        check()
        catalog.storage.delete(manifest_key(checkpoint))
    for checkpoint in sorted(drop):
        for name in sorted(catalog.files_of(checkpoint) - {"manifest.json"}):
            if checkpoint.folder + name not in kept_paths:
                catalog.storage.delete(checkpoint.folder + name)


def collect_torn(catalog: Catalog, attempt: int) -> None:
    """Remove the files of saves that were cut off before their manifest.

    Args:
        catalog: The run.
        attempt: The newest attempt, which this process owns. Older attempts can acknowledge nothing any more, so what
            they left unfinished is nobody's; this attempt's own unfinished saves must have failed.
    """
    kept_paths = {file.path for manifest in _readable(catalog, catalog.committed) for file in manifest.files}
    for checkpoint in catalog.torn:
        if checkpoint.attempt <= attempt:
            for name in sorted(catalog.files_of(checkpoint)):
                if checkpoint.folder + name not in kept_paths:
                    catalog.storage.delete(checkpoint.folder + name)


def collect_temporary(catalog: Catalog, attempt: int) -> None:
    """Remove the temporary files of writes that were cut off, where the storage leaves such files.

    Args:
        catalog: The run.
        attempt: The newest attempt, which this process owns and for which it is writing nothing at this moment. What a
            newer one may be writing, its claim above all, is left alone.
    """
    if not isinstance(catalog.storage, HoldsTemporary):
        return
    for entry in catalog.storage.list_temporary():
        folder = entry.key.rpartition("/")[0]
        owner = parse_attempt_key(f"{folder}/claim.json") or parse_checkpoint_key(f"{folder}/manifest.json")
        if folder and owner is None:
            continue
        number = 0 if owner is None else owner[0].attempt if isinstance(owner[0], CheckpointId) else owner[0]
        if number <= attempt:
            catalog.storage.delete_temporary(entry.key)


def _readable(catalog: Catalog, checkpoints: Iterable[CheckpointId]) -> list[Manifest]:
    manifests = []
    for checkpoint in checkpoints:
        try:
            manifests.append(catalog.manifest(checkpoint))
        except (CorruptCheckpointError, CheckpointNotFoundError):
            # Nothing can be restored by it. Any other failure (storage, a newer format) must stop the deletion: what
            # such a manifest refers to is unknown.
            continue
    return manifests
