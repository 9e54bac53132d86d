"""Find a checkpoint by its reference and read it into host memory; the damaged newest one is set aside, loudly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError, CorruptCheckpointError, StorageError
from ckptmgr.format.layout import CheckpointId, manifest_key
from ckptmgr.format.manifest import Manifest, decode_manifest
from ckptmgr.progress import progress
from ckptmgr.ranks.group import Ranks
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.other_ranks import for_ranks
from ckptmgr.state.read_entries import load_entries
from ckptmgr.state.sharding import LiveShards
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
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
    reference: str | Reference,
    *,
    names: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    shards: LiveShards | None = None,
) -> LoadedCheckpoint:
    """Read a checkpoint without claiming its run.

    Args:
        reference: ``RUN_DIR`` or ``RUN_DIR@SELECTOR``.
        names: Only these entries; all by default.
        storage_options: For the storage; never recorded.
        ranks: The processes that load it together; by default this one alone.
        shards: Live sharded tensors, of which only this rank's parts are read.

    Raises:
        RunNotFoundError, CheckpointNotFoundError: Nothing answers to the reference.
        CorruptCheckpointError: It is damaged. For ``latest`` an older intact one is used instead, with a warning.
        StorageError, FormatVersionError: It cannot be read at this moment, or by this version.
    """
    if isinstance(reference, str):
        reference = parse_reference(reference)
    storage = open_storage(reference.run_dir, storage_options=storage_options)
    ranks = ranks or Ranks.alone()
    catalogs: list[Catalog] = []

    def look() -> bool:
        catalogs.append(Catalog.of_existing_run(storage))
        return len(catalogs) == 1 or catalogs[0].committed != catalogs[1].committed

    def choose() -> LoadedCheckpoint:
        catalog = catalogs[-1] if catalogs else None
        return choose_checkpoint(catalog, storage, reference, names, ranks=ranks, shards=shards)

    ranks.loop.decide("looking into the run", look)
    try:
        return choose()
    except CorruptCheckpointError:
        # The run may be alive, and its retention faster than this reader.
        if not ranks.loop.decide("looking into the run again", look):
            raise
        return choose()


def choose_checkpoint(
    catalog: Catalog | None,
    storage: Storage,
    reference: Reference,
    names: Sequence[str] | None,
    *,
    ranks: Ranks,
    shards: LiveShards | None = None,
) -> LoadedCheckpoint:
    """Load the checkpoint that a reference names; for ``latest`` the newest one that is whole. On all ranks the same.

    Args:
        catalog: The run; rank 0 decides by it, the others need none.
        storage: The run's root.
        reference: Names the checkpoint; its run directory is only told on.
        names: Only these entries; all if None.
        ranks: The processes that load it together. What one of them finds damaged is set aside by all.
        shards: Live sharded tensors, of which only this rank's parts are read.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError: As `load_checkpoint`.
        RankFailure: A rank cannot read it, is gone, or late.
    """
    failures: list[str] = []
    proposals = _proposals(catalog, reference, failures) if catalog is not None else iter(())

    def propose() -> str:
        for manifest in proposals:
            return manifest.checkpoint
        assert catalog is not None
        raise _none_left(catalog, failures)

    while True:
        checkpoint = CheckpointId.parse(ranks.loop.decide("choosing the checkpoint to restore", propose))

        def load(checkpoint: CheckpointId = checkpoint) -> LoadedCheckpoint:
            manifest = _manifest(storage, checkpoint) if catalog is None else catalog.manifest(checkpoint)
            return _load(storage, manifest, reference.run_dir, names, ranks, shards)

        try:
            return ranks.loop.together(f"reading {checkpoint}", load)
        except CorruptCheckpointError as error:
            if reference.selector != "latest":
                raise
            failures.append(f"{error.what}: {error.why}")
            _log.warning("set aside the checkpoint of step %d: %s", checkpoint.step, error)


def _proposals(catalog: Catalog, reference: Reference, failures: list[str]) -> Iterator[Manifest]:
    if reference.selector != "latest":
        yield catalog.resolve(reference.selector)
    else:
        yield from _candidates(catalog, failures)


def _none_left(catalog: Catalog, failures: Sequence[str]) -> CkptmgrError:
    if failures:
        return CorruptCheckpointError(
            f"none of the {len(failures)} checkpoints in {catalog.storage.url} is whole",
            why="; ".join(failures),
            next=f"`ckptmgr verify {catalog.storage.url}` names every damage; resume='never' starts from nothing",
        )
    return CheckpointNotFoundError(
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


def _manifest(storage: Storage, checkpoint: CheckpointId) -> Manifest:
    """Read a manifest that rank 0 has found."""
    key = manifest_key(checkpoint)
    try:
        data = storage.read(key)
    except FileNotFoundError as error:
        raise StorageError(
            f"{key} is not in {storage.url}, as this rank sees it",
            why="rank 0 has found it there",
            next="the run directory must be the same place on all hosts: a shared file system, or an object store",
        ) from error
    return decode_manifest(data, where=key, checkpoint=checkpoint)


def _load(
    storage: Storage,
    manifest: Manifest,
    run_dir: str,
    names: Sequence[str] | None,
    ranks: Ranks,
    shards: LiveShards | None,
) -> LoadedCheckpoint:
    nbytes = sum(tensor.nbytes for tensor in manifest.tensors if names is None or tensor.entry in names)
    with progress(f"restoring step {manifest.step} of {printable_place(run_dir)}", nbytes) as advance:
        reader = CheckpointReader(storage, manifest, advance)
        entries = load_entries(reader, names, rank=ranks.rank, world_size=ranks.world_size, live=shards)
    return LoadedCheckpoint(manifest, for_ranks(entries, manifest, ranks), run_dir)
