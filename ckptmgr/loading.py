"""Find a checkpoint by its reference and read it into host memory; the damaged newest one is set aside, loudly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckptmgr.format.manifest import Manifest
from ckptmgr.progress import progress
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.state.codec import load_entries
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.storage.open import open_storage
from ckptmgr.words import printable_place

__all__ = ["LoadedCheckpoint", "choose_checkpoint", "load_checkpoint"]

_log = logging.getLogger("ckptmgr")


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint in host memory, every digest verified.

    Attributes:
        manifest: Its manifest.
        entries: Captured entries by name. Their tensors are fresh CPU tensors.
        run_dir: The run that it was read from.
    """

    manifest: Manifest
    entries: dict[str, CapturedEntry]
    run_dir: str

    @property
    def reference(self) -> str:
        """The reference that names exactly this checkpoint."""
        return f"{self.run_dir}@{self.manifest.checkpoint}"


def load_checkpoint(
    reference: str | Reference, *, names: Sequence[str] | None = None, storage_options: Mapping[str, Any] | None = None
) -> LoadedCheckpoint:
    """Read a checkpoint without claiming its run.

    Args:
        reference: ``RUN_DIR`` or ``RUN_DIR@SELECTOR``.
        names: Only these entries; all by default.
        storage_options: For the storage; never recorded.

    Raises:
        RunNotFoundError, CheckpointNotFoundError: Nothing answers to the reference.
        CorruptCheckpointError: It is damaged. For ``latest`` an older intact one is used instead, with a warning.
        StorageError, FormatVersionError: It cannot be read at this moment, or by this version.
    """
    if isinstance(reference, str):
        reference = parse_reference(reference)
    storage = open_storage(reference.run_dir, storage_options=storage_options)
    catalog = Catalog.of_existing_run(storage)
    try:
        return choose_checkpoint(catalog, reference, names)
    except CorruptCheckpointError:
        # The run may be alive, and its retention faster than this reader.
        fresh = Catalog.of_existing_run(storage)
        if fresh.committed == catalog.committed:
            raise
        return choose_checkpoint(fresh, reference, names)


def choose_checkpoint(catalog: Catalog, reference: Reference, names: Sequence[str] | None) -> LoadedCheckpoint:
    """Load the checkpoint that a reference names; for ``latest`` the newest one that is whole.

    Args:
        catalog: The run.
        reference: Names the checkpoint; its run directory is only told on.
        names: Only these entries; all if None.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError: As `load_checkpoint`.
    """
    if reference.selector != "latest":
        return _load(catalog, catalog.resolve(reference.selector), reference.run_dir, names)
    failures: list[str] = []
    for manifest in _candidates(catalog, failures):
        try:
            return _load(catalog, manifest, reference.run_dir, names)
        except CorruptCheckpointError as error:
            failures.append(f"{error.what}: {error.why}")
            _log.warning("set aside the checkpoint of step %d: %s", manifest.step, error)
    if failures:
        raise CorruptCheckpointError(
            f"none of the {len(failures)} checkpoints in {catalog.storage.url} is whole",
            why="; ".join(failures),
            next=f"`ckptmgr verify {catalog.storage.url}` names every damage; resume='never' starts from nothing",
        )
    raise CheckpointNotFoundError(
        f"no committed checkpoint in {catalog.storage.url}",
        next=f"`ckptmgr ls {catalog.storage.url}` shows what is there",
    )


def _candidates(catalog: Catalog, failures: list[str]) -> Iterator[Manifest]:
    for checkpoint in reversed(catalog.on_line):
        # What cannot be read at this moment, or by this version, is no reason to lose what was trained since.
        with suppress(CorruptCheckpointError, CheckpointNotFoundError):
            catalog.manifest(checkpoint)
        reason = catalog.why_not_intact(checkpoint)
        if reason is None:
            yield catalog.manifest(checkpoint)
        else:
            failures.append(f"{checkpoint}: {reason}")
            _log.warning("set aside the checkpoint of step %d, which is not intact: %s", checkpoint.step, reason)


def _load(catalog: Catalog, manifest: Manifest, run_dir: str, names: Sequence[str] | None) -> LoadedCheckpoint:
    nbytes = sum(tensor.nbytes for tensor in manifest.tensors if names is None or tensor.entry in names)
    with progress(f"restoring step {manifest.step} of {printable_place(run_dir)}", nbytes) as advance:
        entries = load_entries(CheckpointReader(catalog.storage, manifest, advance), names)
    return LoadedCheckpoint(manifest, entries, run_dir)
