"""One checkpoint of a run, opened for reading: nothing of it is in memory before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptmgr.errors import UsageError
from ckptmgr.format.manifest import Manifest
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.reference import parse_reference
from ckptmgr.state.read_entries import load_entries
from ckptmgr.storage.open import open_storage

__all__ = ["StoredCheckpoint", "model_entry", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint on storage.

    Attributes:
        manifest: Its manifest.
        reader: Reads its bytes, and checks each against its digest.
        run_dir: The run, as it was typed.
    """

    manifest: Manifest
    reader: CheckpointReader
    run_dir: str

    @property
    def reference(self) -> str:
        """The reference that names exactly this checkpoint."""
        return f"{self.run_dir}@{self.manifest.checkpoint}"

    @property
    def handlers(self) -> dict[str, str]:
        """Entry name → name of the handler that captured it."""
        return {entry.name: entry.handler for entry in self.manifest.entries}

    def load(self, names: Iterable[str]) -> LoadedCheckpoint:
        """Read entries into memory, put together from all ranks that saved them."""
        return LoadedCheckpoint(self.manifest, load_entries(self.reader, names, world_size=1), self.run_dir)

    def nbytes_of(self, names: Iterable[str]) -> int:
        """Return how many bytes of tensors entries have."""
        wanted = set(names)
        return sum(tensor.nbytes for tensor in self.manifest.tensors if tensor.entry in wanted)

    def watched(self, on_progress: Callable[[int], None]) -> StoredCheckpoint:
        """Return the same, telling how many bytes were read since the last call."""
        reader = CheckpointReader(self.reader.storage, self.manifest, on_progress)
        return StoredCheckpoint(self.manifest, reader, self.run_dir)


def open_checkpoint(reference: str, *, storage_options: Mapping[str, Any] | None = None) -> StoredCheckpoint:
    """Find a checkpoint. What is found damaged later is an error, also for ``latest``: another one is not what was
    asked for.

    Raises:
        RunNotFoundError, CheckpointNotFoundError, CorruptCheckpointError: Nothing answers to the reference.
    """
    named = parse_reference(reference)
    storage = open_storage(named.run_dir, storage_options=storage_options)
    manifest = Catalog.of_existing_run(storage).resolve(named.selector)
    return StoredCheckpoint(manifest, CheckpointReader(storage, manifest), named.run_dir)


def model_entry(checkpoint: StoredCheckpoint, entry: str | None) -> str:
    """Return the entry that holds the module to export.

    Args:
        checkpoint: The checkpoint.
        entry: What the user said; None to find it.

    Raises:
        UsageError: There is no such entry, it is no module, or there are several and none was named.
    """
    handlers = checkpoint.handlers
    modules = [name for name, handler in handlers.items() if handler == "module"]
    if entry is None:
        if "model" in modules or len(modules) == 1:
            return "model" if "model" in modules else modules[0]
        raise UsageError(
            f"{checkpoint.reference} holds {len(modules) or 'no'} modules",
            why=f"its entries are {_listed(handlers)}",
            next=f"name one of them: --entry {modules[0]}" if modules else "export a checkpoint that holds a module",
        )
    if handlers.get(entry) != "module":
        raise UsageError(
            f"{checkpoint.reference} has no module {entry!r}",
            why=f"its entries are {_listed(handlers)}",
            next=f"name one of the modules: {', '.join(modules) or 'there is none'}",
        )
    return entry


def _listed(handlers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({handler})" for name, handler in sorted(handlers.items()))
