"""Write, seal, commit: the one way in which a checkpoint comes to exist.

The order is the guarantee. Payload files first, each durable when its write returns; then the manifest, by exclusive
create. Before the manifest and after it the writer looks for a newer attempt: a save is acknowledged only if there was
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from xxhash import xxh3_128_digest

from ckptmgr.errors import CorruptCheckpointError, SaveFailedError, StorageError
from ckptmgr.format.digest import block_digests, combined_digest, split_blocks
from ckptmgr.format.encoding import safetensors_header
from ckptmgr.format.layout import CheckpointId, check_key, manifest_key
from ckptmgr.format.manifest import (
    Continuation,
    EntryRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    Topology,
    decode_manifest,
    metric_to_value,
)
from ckptmgr.format.payload import FilePayload
from ckptmgr.format.record import FILES_VERSION, FORMAT_VERSION, RANKS_VERSION, encode_record
from ckptmgr.run.clock import utc_now
from ckptmgr.run.lineage import refuse_if_fenced
from ckptmgr.storage.protocol import Buffer, Storage

__all__ = ["CheckpointFields", "Sealed", "commit_checkpoint", "commit_sealed", "told_if_fenced", "write_files"]

_JOIN_NBYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CheckpointFields:
    """What a manifest says about a checkpoint besides its files."""

    run_id: str
    reason: str
    entries: tuple[EntryRecord, ...]
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    tags: tuple[str, ...] = ()
    continues: Continuation | None = None
    environment: dict[str, str] = field(default_factory=dict)
    topology: Topology = field(default_factory=Topology)


@dataclass(frozen=True, slots=True)
class Sealed:
    """What one rank has written of a checkpoint, all of it durable.

    Attributes:
        files: In the order in which they were written.
        tensors: Their ``file`` is an index into ``files``.
        state: Index of the state document in ``files``.
    """

    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    state: int


def write_files(storage: Storage, checkpoint: CheckpointId, files: Sequence[FilePayload]) -> Sealed:
    """Write one rank's part of a checkpoint. Nothing refers to it yet.

    Args:
        storage: The run's root.
        checkpoint: An id that was never used before, of an attempt that this job has claimed.
        files: The payload, one of them a state document. The buffers must not change until this returns.

    Raises:
        StorageError: The storage failed.
    """
    records: list[FileRecord] = []
    tensors: list[TensorRecord] = []
    state = 0
    for file in files:
        if file.content is not None:
            if file.is_state:
                state = len(records)
            records.append(_write_document(storage, checkpoint, file, file.content))
        else:
            records.append(_write_tensors(storage, checkpoint, file, len(records), tensors))
    return Sealed(tuple(records), tuple(tensors), state)


def commit_sealed(
    storage: Storage, checkpoint: CheckpointId, parts: Sequence[Sealed], fields: CheckpointFields
) -> Manifest:
    """Make a checkpoint exist, all files of which are written.

    Args:
        storage: The run's root.
        checkpoint: Its id.
        parts: What the ranks have written, by rank.
        fields: The rest of its manifest.

    Returns:
        The committed manifest. When this returns, the checkpoint is durable and acknowledged.

    Raises:
        Fenced: A newer attempt owns the run. If the manifest was already written it lies on nobody's line.
        SaveFailedError: The manifest would be too large, or a field of it is of a wrong type.
        StorageError: The storage failed. The checkpoints before it are untouched.
    """
    records: list[FileRecord] = []
    tensors: list[TensorRecord] = []
    states: list[int] = []
    for part in parts:
        first = len(records)
        records += part.files
        tensors += [msgspec.structs.replace(tensor, file=first + tensor.file) for tensor in part.tensors]
        states.append(first + part.state)
    manifest = Manifest(
        version=_version(parts, records),
        run_id=fields.run_id,
        checkpoint=str(checkpoint),
        attempt=checkpoint.attempt,
        step=checkpoint.step,
        epoch=fields.epoch,
        reason=fields.reason,
        created_at=utc_now(),
        files=tuple(records),
        tensors=tuple(tensors),
        entries=fields.entries,
        states=tuple(states),
        topology=fields.topology,
        metrics={name: metric_to_value(value) for name, value in fields.metrics.items()},
        monitor=fields.monitor,
        mode=fields.mode,
        tags=fields.tags,
        continues=fields.continues,
        environment=fields.environment,
    )
    key = manifest_key(checkpoint)
    record = encode_record(manifest)
    # What no reader would accept must not be acknowledged: too large, contradictory, or of a wrong type.
    try:
        decode_manifest(record, where=key, checkpoint=checkpoint)
    except CorruptCheckpointError as error:
        raise SaveFailedError(f"{key} would not be readable", why=error.why) from error
    with told_if_fenced(storage, checkpoint.attempt):
        storage.write(key, [record], exclusive=True)
    refuse_if_fenced(storage, checkpoint.attempt)
    return manifest


def _version(parts: Sequence[Sealed], files: Sequence[FileRecord]) -> int:
    """Return the oldest version whose readers understand the manifest."""
    if any(file.entry is not None for file in files):
        return FILES_VERSION
    return FORMAT_VERSION if len(parts) == 1 else RANKS_VERSION


@contextmanager
def told_if_fenced(storage: Storage, attempt: int) -> Iterator[None]:
    """Run a part of a save after a look for a newer attempt, and look again if the storage fails.

    Raises:
        Fenced: There is one. It may have collected our unfinished files: then its existence is the cause worth telling.
    """
    refuse_if_fenced(storage, attempt)
    try:
        yield
    except StorageError:
        refuse_if_fenced(storage, attempt)
        raise


def commit_checkpoint(
    storage: Storage, checkpoint: CheckpointId, files: Sequence[FilePayload], fields: CheckpointFields
) -> Manifest:
    """Write a checkpoint of one rank and make it exist: `write_files` and `commit_sealed` in one.

    Raises:
        Fenced, SaveFailedError, StorageError: As these.
    """
    with told_if_fenced(storage, checkpoint.attempt):
        sealed = write_files(storage, checkpoint, files)
    return commit_sealed(storage, checkpoint, [sealed], fields)


def _write_document(storage: Storage, checkpoint: CheckpointId, file: FilePayload, content: bytes) -> FileRecord:
    path = check_key(checkpoint.folder + file.name)
    storage.write(path, [content])
    blocks = block_digests(content)
    return FileRecord(
        path=path,
        nbytes=len(content),
        digest=combined_digest(blocks),
        blocks=blocks.hex(),
        entry=file.entry,
        name=file.stored_as,
        rank=file.rank,
    )


def _write_tensors(
    storage: Storage, checkpoint: CheckpointId, file: FilePayload, index: int, tensors: list[TensorRecord]
) -> FileRecord:
    path = check_key(checkpoint.folder + file.name)
    header = safetensors_header(file.tensors)
    header_blocks = block_digests(header)
    per_tensor: list[bytes] = []
    storage.write(path, _TensorStream(header, file, per_tensor))
    offset = len(header)
    for tensor, blocks in zip(file.tensors, per_tensor, strict=True):
        tensors.append(
            TensorRecord(
                name=tensor.name,
                entry=tensor.entry,
                file=index,
                offset=offset,
                nbytes=tensor.data.nbytes,
                dtype=tensor.dtype,
                shape=tensor.shape,
                blocks=blocks.hex(),
                encoding=tensor.encoding,
                logical_dtype=tensor.logical_dtype,
                logical_shape=tensor.logical_shape,
                order=tensor.order,
                scope=tensor.scope,
                rank=tensor.rank,
                global_shape=tensor.global_shape,
                global_offset=tensor.global_offset,
                aliases=tensor.aliases,
            )
        )
        offset += tensor.data.nbytes
    return FileRecord(
        path=path,
        nbytes=offset,
        digest=combined_digest(b"".join((header_blocks, *per_tensor))),
        header_nbytes=len(header),
        blocks=header_blocks.hex(),
    )


class _TensorStream:
    """A file's bytes, digesting each block just before it is written, while it is warm in the cache.

    Can be iterated again: a storage that retries a write starts over, and the digests with it. Small tensors are
    joined, or ten thousand of them would be ten thousand system calls.
    """

    def __init__(self, header: bytes, file: FilePayload, per_tensor: list[bytes]) -> None:
        self._header = header
        self._file = file
        self._per_tensor = per_tensor

    def __iter__(self) -> Iterator[Buffer]:
        self._per_tensor.clear()
        joined = bytearray(self._header)
        for tensor in self._file.tensors:
            digests: list[bytes] = []
            for block in split_blocks(tensor.data):
                digests.append(xxh3_128_digest(block))
                if block.nbytes < _JOIN_NBYTES:
                    joined += block
                else:
                    if joined:
                        yield joined
                        joined = bytearray()
                    yield block
                if len(joined) >= _JOIN_NBYTES:
                    yield joined
                    joined = bytearray()
            self._per_tensor.append(b"".join(digests))
        if joined:
            yield joined
