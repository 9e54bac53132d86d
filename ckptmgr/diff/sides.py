"""From what a user named to what is compared: a checkpoint of a run, or weights without one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptmgr.diff.records import Side
from ckptmgr.diff.run_tensors import tensors_of_checkpoint
from ckptmgr.diff.tensors import WholeTensor
from ckptmgr.diff.weights_files import find_weights, tensors_of_files
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
from ckptmgr.format.manifest import Manifest
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.reference import URL_PREFIX, parse_reference
from ckptmgr.storage.open import open_storage
from ckptmgr.words import printable_place

__all__ = ["WEIGHTS", "OpenSide", "open_pair"]

WEIGHTS = "weights"
"""What the only entry of a file of weights is called, until it is known what it is compared with."""


@dataclass(frozen=True, slots=True)
class OpenSide:
    """One of the two, opened.

    Attributes:
        label: As it was named, fit for printing.
        place: The run or the file.
        tensors: All of its tensors.
        catalog: The run; None for weights alone.
        reader: Of the checkpoint; likewise.
    """

    label: str
    place: str
    tensors: list[WholeTensor]
    catalog: Catalog | None = None
    reader: CheckpointReader | None = None

    @property
    def manifest(self) -> Manifest | None:
        """The checkpoint's manifest; None for weights alone."""
        return None if self.reader is None else self.reader.manifest

    def described(self) -> Side:
        """Return it as the record that is handed out."""
        manifest = self.manifest
        return Side(
            label=self.label,
            place=self.place,
            checkpoint=None if manifest is None else manifest.checkpoint,
            step=None if manifest is None else manifest.step,
            created_at=None if manifest is None else manifest.created_at,
            ntensors=len(self.tensors),
            nbytes=sum(tensor.nbytes for tensor in self.tensors),
        )


def open_pair(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[OpenSide, OpenSide]:
    """Open what two references name; of one alone, the checkpoint before it on its line is the first.

    Raises:
        RunNotFoundError, CheckpointNotFoundError: Nothing answers to a reference, or nothing stands before it.
        CorruptCheckpointError: It is damaged, as far as sizes and headers tell.
        UsageError: A reference cannot be meant so.
        StorageError, FormatVersionError: It cannot be read at this moment, or by this version.
    """
    first = _open(os.fspath(a), storage_options)
    if b is not None:
        return first, _open(os.fspath(b), storage_options)
    if first.catalog is None or first.manifest is None:
        raise UsageError(
            f"nothing to compare {first.label} with",
            why="one reference alone is compared with the checkpoint before it, and weights have none",
            next=f"name what to compare it with: ckptmgr diff {first.label} OTHER",
        )
    before = _before(first.catalog, first.manifest)
    run_dir = parse_reference(os.fspath(a)).run_dir
    return _side(run_dir, str(before.step), first.catalog, before), first


def _open(text: str, storage_options: Mapping[str, Any] | None) -> OpenSide:
    weights = find_weights(text)
    if weights is not None:
        return OpenSide(printable_place(text), str(weights), tensors_of_files(weights, WEIGHTS))
    reference = parse_reference(text)
    # A model may be called as a run is: `model@v2.safetensors` and its directory were looked for above.
    catalog = Catalog.of_existing_run(open_storage(reference.run_dir, storage_options=storage_options))
    typed = None if reference.run_dir == text.removeprefix(URL_PREFIX) else reference.selector
    return _side(reference.run_dir, typed, catalog, catalog.resolve(reference.selector))


def _side(run_dir: str, selector: str | None, catalog: Catalog, manifest: Manifest) -> OpenSide:
    problem = catalog.why_not_intact(manifest.id)
    if problem is not None:
        raise CorruptCheckpointError(
            f"step {manifest.step} of {catalog.storage.url} is damaged",
            why=problem,
            next=f"`ckptmgr ls {printable_place(run_dir)}` lists what is intact",
        )
    reader = CheckpointReader(catalog.storage, manifest)
    label = printable_place(run_dir) + ("" if selector is None else f"@{selector}")
    return OpenSide(label, catalog.storage.url, tensors_of_checkpoint(reader), catalog, reader)


def _before(catalog: Catalog, manifest: Manifest) -> Manifest:
    """Return the newest intact checkpoint before one: on the line, or of the same attempt where it is not on that."""
    on_line = catalog.on_line
    if manifest.id not in on_line:
        on_line = [id for id in catalog.committed if id.attempt == manifest.attempt]
    older = [id for id in on_line if id < manifest.id]
    for id in reversed(older):
        if catalog.why_not_intact(id) is None:
            return catalog.manifest(id)
    raise CheckpointNotFoundError(
        f"no checkpoint before step {manifest.step} in {catalog.storage.url}",
        why="none is intact" if older else "it is the first one",
        next="name both that are to be compared: ckptmgr diff A B",
    )
