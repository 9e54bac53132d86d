"""A run that begins with one checkpoint, which no manager of it has saved.

Files first, then the run's marker, then the manifest: before that there is no checkpoint. What fails leaves nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.format.layout import MAX_STEP, RUN_MARKER, CheckpointId, attempt_key, payload_stem
from ckptmgr.format.manifest import EntryRecord, Manifest
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.interop.cut_off import clear_cut_off_import, removal_command
from ckptmgr.progress import progress
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.commit import CheckpointFields, commit_sealed, write_files
from ckptmgr.run.lineage import claim_attempt, create_marker, record_end, record_line
from ckptmgr.run.reference import parse_reference
from ckptmgr.state.capture import dry_check
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.tensors import StoredTensor
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.words import printable_place

__all__ = ["create_run", "open_empty"]


def open_empty(run_dir: str, *, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage of a run that is not there yet. What a killed import has left there is removed.

    Raises:
        UsageError: Something is there.
        RunInUseError: Another import writes there.
    """
    if parse_reference(run_dir).run_dir != run_dir:
        raise UsageError(
            f"{run_dir!r} names a checkpoint, not a run directory",
            why="what stands after the last @ chooses a checkpoint of a run",
            next="give the new run a name without @",
        )
    storage = open_storage(run_dir, storage_options=storage_options)
    catalog = Catalog(storage)
    if clear_cut_off_import(catalog, run_dir):
        catalog = Catalog(storage)
    others = sorted(catalog.sizes)
    if isinstance(storage, LocalStorage) and not others and Path(storage.url).is_dir():
        # A storage lists what can be its own only. What else lies there is somebody's, too. Empty directories are
        # nobody's: an import that failed leaves them.
        root = Path(storage.url)
        others = [str(p.relative_to(root)) for p in islice((p for p in root.rglob("*") if not p.is_dir()), 4)]
    next = "give a directory that is empty, or not there yet"
    if catalog.is_run or catalog.committed:
        why = f"it holds a run with {len(catalog.committed)} checkpoints"
    elif others and all(".tmp-" in other for other in others):
        command = removal_command(printable_place(run_dir), is_local=True)
        why, next = "a write that was cut off has left temporary files there", f"if nothing else is in it: {command}"
    elif others:
        why = f"it holds {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
    else:
        return storage
    raise UsageError(
        f"cannot import into {printable_place(run_dir)}",
        why=why,
        next=next,
    )


def create_run(
    storage: Storage,
    entries: Sequence[CapturedEntry],
    *,
    step: int,
    epoch: int | None,
    reason: str,
    environment: Mapping[str, str],
) -> Manifest:
    """Make a run with one committed checkpoint.

    Args:
        storage: From `open_empty`.
        entries: The state. Tensors are written from where they are.
        step: Optimizer updates completed.
        epoch: The epoch that they end in; None where nobody knows.
        reason: Why the checkpoint exists, for people.
        environment: Versions that it was written with.

    Raises:
        UnsupportedStateError: A value cannot be stored. Names its path and type; nothing was written.
        StorageError, Fenced: The storage failed, or another process has begun in the same place. Nothing is left.
    """
    if not 0 <= step <= MAX_STEP:
        raise UsageError(f"step {step} is none that a checkpoint can have", next="give --step")
    dry_check(entries)
    files, nbytes = _payloads(entries)
    written: list[str] = []
    attempt = claim_attempt(storage, (), is_patient=False).attempt
    checkpoint = CheckpointId(step, attempt, 0)
    run_id = secrets.token_hex(8)
    try:
        written += [attempt_key(attempt, "claim"), attempt_key(attempt, "line")]
        record_line(storage, attempt, None)
        with progress(f"importing step {step}", nbytes):
            sealed = write_files(storage, checkpoint, files)
        written.append(RUN_MARKER)
        create_marker(storage, run_id)
        fields = CheckpointFields(
            run_id=run_id,
            reason=reason,
            entries=tuple(
                EntryRecord(
                    name=e.name,
                    handler=e.handler,
                    handler_version=e.version,
                    scope=e.scope,
                    fingerprint=e.fingerprint,
                )
                for e in entries
            ),
            epoch=epoch,
            environment=dict(environment),
        )
        manifest = commit_sealed(storage, checkpoint, [sealed], fields)
    except BaseException:
        with suppress(CkptmgrError):
            for entry in storage.list(checkpoint.folder):
                storage.delete(entry.key)
            # The claim last: as long as a file of it is there, its number must not be used again.
            for key in reversed(written):
                storage.delete(key)
        raise
    record_end(storage, attempt, "finished", step=step)
    return manifest


def _payloads(entries: Sequence[CapturedEntry]) -> tuple[list[FilePayload], int]:
    """Return what is to be written: views of the tensors, which lie in files that are mapped into memory."""
    files: list[FilePayload] = []
    trees: dict[str, Any] = {}
    for position, entry in enumerate(entries):
        encoder = EntryEncoder(entry)
        trees[entry.name] = encoder.tree
        stem = payload_stem(entry.name, position)
        files += [
            FilePayload(f"{stem}.{key}", content=file.content, entry=entry.name, stored_as=key)
            for key, file in encoder.files.items()
        ]
        stored = sorted(encoder.tensors, key=lambda item: (-item.source.dtype.itemsize, item.name))
        if stored:
            tensors = tuple(_payload(entry.name, item) for item in stored)
            files.append(FilePayload(f"{stem}.safetensors", tensors))
    document = json.dumps({"entries": trees}, allow_nan=False, separators=(",", ":")).encode()
    files.append(FilePayload("state.json", content=document, is_state=True))
    return files, sum(file.nbytes for file in files)


def _payload(entry: str, stored: StoredTensor) -> TensorPayload:
    source = stored.source
    if isinstance(source, torch.Tensor):
        source = source.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorPayload(
        name=stored.name,
        entry=entry,
        dtype=stored.dtype,
        shape=stored.shape,
        data=memoryview(np.ascontiguousarray(source).reshape(-1).view(np.uint8).data),
        encoding=stored.encoding,
        logical_dtype=stored.logical_dtype,
        logical_shape=stored.logical_shape,
        order=stored.order,
        aliases=tuple(stored.aliases),
    )
