"""The documents of the format as frozen records: the manifest that makes a checkpoint, and an attempt's records.

Field by field they are described in FORMAT.md. `check_manifest` holds everything that a reader relies on but a type
cannot say.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from ckptmgr.errors import CorruptCheckpointError, UsageError
from ckptmgr.format.digest import ALGORITHM, DIGEST_NBYTES, combined_digest, nblocks
from ckptmgr.format.encoding import ITEM_NBITS, numel, payload_nbytes
from ckptmgr.format.layout import CheckpointId, check_key
from ckptmgr.format.payload import Scope
from ckptmgr.format.record import MAX_MANIFEST_NBYTES, NEWEST_VERSION, RANKS_VERSION, decode_excerpt, decode_record
from ckptmgr.format.tiling import covers_once

__all__ = [
    "MAX_TENSORS",
    "AttemptClaim",
    "AttemptEnd",
    "AttemptLine",
    "Continuation",
    "EntryRecord",
    "FileRecord",
    "Manifest",
    "ManifestExcerpt",
    "MetricValue",
    "Note",
    "Outcome",
    "RunMarker",
    "TensorRecord",
    "Topology",
    "check_manifest",
    "check_shards",
    "decode_manifest",
    "decode_manifest_excerpt",
    "metric_from_value",
    "metric_to_value",
]

MAX_TENSORS = 1_000_000

# No framework has tensors of more, or larger ones. Products of sizes without these bounds could take hours.
_MAX_DIMS = 64
_MAX_SIZE = 2**63 - 1
_MAX_SHOWN = 400

MetricValue: TypeAlias = float | Literal["nan", "inf", "-inf"]
"""JSON has no non-finite numbers, so they are words."""

Outcome: TypeAlias = Literal["finished", "failed", "preempted"]


class _Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Unknown fields are ignored: a later writer of the same version may add what readers need not know."""


class RunMarker(_Record, frozen=True):
    """``ckptmgr.json``: says that a directory is a run, and which."""

    version: int
    run_id: str
    created_at: str
    parent: str | None = None


class AttemptClaim(_Record, frozen=True):
    """``claim.json``: its exclusive creation makes this process the run's newest attempt."""

    version: int
    attempt: int
    nonce: str
    claimed_at: str
    host: str
    pid: int


class Continuation(_Record, frozen=True):
    """The checkpoint after which an attempt goes on."""

    checkpoint: str
    attempt: int
    step: int


class AttemptLine(_Record, frozen=True):
    """``line.json``: what the attempt continues; None for a start from nothing."""

    version: int
    attempt: int
    continues: Continuation | None
    recorded_at: str


class AttemptEnd(_Record, frozen=True):
    """``end.json``: how the attempt ended. A killed attempt has none."""

    version: int
    attempt: int
    outcome: Outcome
    step: int | None
    ended_at: str
    error: str | None = None


class FileRecord(_Record, frozen=True):
    """One file: path below the run's root, size, and digest over all its blocks.

    ``blocks`` lists the digests of a document's blocks, or of a safetensors file's header, in hex. A tool's own file
    has the entry that it belongs to, the name by which the entry's tree refers to it, and the rank whose it is, where
    each rank has its own.
    """

    path: str
    nbytes: int
    digest: str
    header_nbytes: int = 0
    blocks: str = ""
    entry: str | None = None
    name: str | None = None
    rank: int | None = None


class TensorRecord(_Record, frozen=True):
    """One stored tensor. See `payload.TensorPayload` for the fields that stand there too.

    Attributes:
        file: Index into the manifest's files.
        offset: Of its first byte, from the start of the file.
        blocks: Digests of its blocks, in hex, laid end to end.
    """

    name: str
    entry: str
    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    blocks: str
    encoding: str = "plain"
    logical_dtype: str | None = None
    logical_shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    scope: Scope = "replicated"
    rank: int | None = None
    global_shape: tuple[int, ...] | None = None
    global_offset: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the whole tensor, derived from its blocks."""
        return combined_digest(bytes.fromhex(self.blocks))


class EntryRecord(_Record, frozen=True):
    """One entry of the state, and the handler that captured it.

    Attributes:
        scope: ``replicated``: rank 0's document holds it for all. ``per-rank``: each rank's document holds its own.
        fingerprint: Digest of what a preprocessor does, 32 hex digits; None for other entries.
        classes: Code that a module is made of: class → digest of its source, 32 hex digits; None where it has none.
    """

    name: str
    handler: str
    handler_version: int
    scope: Literal["replicated", "per-rank"] = "replicated"
    fingerprint: str | None = None
    classes: dict[str, str | None] = {}


class Topology(_Record, frozen=True):
    """The ranks that wrote the checkpoint."""

    world_size: int = 1
    mesh: dict[str, int] = {}


class Manifest(_Record, frozen=True):
    """``manifest.json``: the document whose existence makes a checkpoint exist."""

    version: int
    run_id: str
    checkpoint: str
    attempt: int
    step: int
    reason: str
    created_at: str
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    entries: tuple[EntryRecord, ...]
    states: tuple[int, ...]
    topology: Topology
    epoch: int | None = None
    metrics: dict[str, MetricValue] = {}
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    tags: tuple[str, ...] = ()
    continues: Continuation | None = None
    environment: dict[str, str] = {}
    digest_algorithm: str = ALGORITHM

    @property
    def id(self) -> CheckpointId:
        """The checkpoint's id, parsed."""
        return CheckpointId.parse(self.checkpoint)

    @property
    def nbytes(self) -> int:
        """Bytes of all files that this manifest names, including those of earlier checkpoints."""
        return sum(file.nbytes for file in self.files)


class ManifestExcerpt(_Record, frozen=True):
    """The fields of a manifest that a list of many checkpoints shows."""

    version: int
    run_id: str
    checkpoint: str
    step: int
    created_at: str
    files: tuple[FileRecord, ...]
    epoch: int | None = None
    metrics: dict[str, MetricValue] = {}
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    tags: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(file.nbytes for file in self.files)


class Note(_Record, frozen=True):
    """A record beside a manifest: metrics and tags that arrived after the commit. Later notes win."""

    version: int
    checkpoint: str
    attempt: int
    created_at: str
    metrics: dict[str, MetricValue] = {}
    tags: tuple[str, ...] = ()


def metric_to_value(number: float) -> MetricValue:
    """Return a metric as the manifest stores it."""
    if number != number:
        return "nan"
    if number in (float("inf"), float("-inf")):
        return "inf" if number > 0 else "-inf"
    return number


def metric_from_value(value: MetricValue) -> float:
    """Return a stored metric as a number."""
    return float(value)


def decode_manifest(data: bytes, *, where: str, checkpoint: CheckpointId) -> Manifest:
    """Parse a stored manifest and check all of it.

    Raises:
        CorruptCheckpointError: It is damaged, belongs to another checkpoint, or contradicts itself.
        FormatVersionError: It was written by a newer format.
    """
    manifest = decode_record(data, Manifest, where=where, max_nbytes=MAX_MANIFEST_NBYTES)
    try:
        if manifest.checkpoint != str(checkpoint):
            raise ValueError(f"it is the manifest of {manifest.checkpoint}")
        check_manifest(manifest)
    except (ValueError, UsageError) as error:
        raise CorruptCheckpointError(
            f"{where} contradicts itself",
            # What it quotes may be as long as the manifest.
            why=text if len(text := str(error)) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…",
            next="resume from another checkpoint; `ckptmgr ls` lists them",
        ) from error
    return manifest


def decode_manifest_excerpt(data: bytes, *, where: str, checkpoint: CheckpointId) -> ManifestExcerpt:
    """Parse what a list shows of a manifest; its tensors are neither read nor checked.

    Raises:
        CorruptCheckpointError, FormatVersionError: As `decode_manifest`, as far as that is looked at.
    """
    excerpt = decode_excerpt(data, ManifestExcerpt, where=where, max_nbytes=MAX_MANIFEST_NBYTES)
    if excerpt.checkpoint != str(checkpoint):
        raise CorruptCheckpointError(
            f"{where} contradicts itself", why=f"it is the manifest of {excerpt.checkpoint[:_MAX_SHOWN]}"
        )
    return excerpt


def check_manifest(manifest: Manifest) -> None:
    """Check what readers rely on: indices, sizes, offsets, shapes, names and digests agree with each other.

    Raises:
        ValueError: They do not; the message says which.
    """
    if manifest.version > NEWEST_VERSION or manifest.digest_algorithm != ALGORITHM:
        raise ValueError(f"version {manifest.version} with {manifest.digest_algorithm} is not readable here")
    if (manifest.id.step, manifest.id.attempt) != (manifest.step, manifest.attempt):
        raise ValueError("its id is not that of its step and attempt")
    if len(manifest.tensors) > MAX_TENSORS:
        raise ValueError(f"{len(manifest.tensors)} tensors are more than {MAX_TENSORS}")
    paths = [check_key(file.path) for file in manifest.files]
    if len(set(paths)) != len(paths):
        raise ValueError("a file is listed twice")
    for file in manifest.files:
        if not 0 <= file.header_nbytes <= file.nbytes:
            raise ValueError(f"{file.path}: the header is larger than the file")
        _check_blocks(file.path, file.header_nbytes or (0 if not file.blocks else file.nbytes), file.blocks)
        _check_blocks(file.path, 1, file.digest)
    if any(not 0 <= index < len(manifest.files) for index in manifest.states):
        raise ValueError("a state document is not among the files")
    if manifest.version >= RANKS_VERSION and len(manifest.states) != manifest.topology.world_size:
        raise ValueError(
            f"{len(manifest.states)} state documents are not those of {manifest.topology.world_size} ranks"
        )
    if len(set(manifest.states)) != len(manifest.states):
        raise ValueError("two ranks have one state document")
    names = {entry.name for entry in manifest.entries}
    if len(names) != len(manifest.entries):
        raise ValueError("an entry is listed twice")
    stored = [(file.entry, file.name, file.rank) for file in manifest.files if file.entry is not None]
    if len(set(stored)) != len(stored) or any(entry not in names or name is None for entry, name, _ in stored):
        raise ValueError("a file of an entry is listed twice, has no name, or its entry is not listed")
    seen: set[tuple[str, str, int | None]] = set()
    for tensor in manifest.tensors:
        _check_tensor(tensor, manifest.files)
        key = (tensor.entry, tensor.name, tensor.rank)
        if key in seen or tensor.entry not in names:
            raise ValueError(f"{tensor.entry}/{tensor.name} is listed twice, or its entry is not listed")
        seen.add(key)
    check_shards(manifest.tensors)


def check_shards(tensors: Iterable[TensorRecord]) -> None:
    """Check that the shards of each tensor make the whole: none is missing, none stands twice.

    Raises:
        ValueError: They do not.
    """
    whole: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    found: dict[tuple[str, str], int] = {}
    boxes: dict[tuple[str, str], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for tensor in tensors:
        if tensor.scope != "sharded":
            continue
        key, where = (tensor.entry, tensor.name), f"{tensor.entry}/{tensor.name}"
        shape, offset = tensor.global_shape or (), tensor.global_offset or ()
        if tensor.rank is None or not len(shape) == len(offset) == len(tensor.shape):
            raise ValueError(f"{where}: a shard without a rank, or without its place in the whole")
        if any(not 0 <= o <= o + n <= size for o, n, size in zip(offset, tensor.shape, shape, strict=True)):
            raise ValueError(f"{where}: the shard of rank {tensor.rank} lies outside of the whole, {shape}")
        if whole.setdefault(key, (shape, tensor.dtype)) != (shape, tensor.dtype):
            raise ValueError(f"{where}: its shards are of different tensors")
        boxes.setdefault(key, []).append((offset, tensor.shape))
        found[key] = found.get(key, 0) + numel(tensor.shape)
    for key, (shape, _) in whole.items():
        if found[key] != numel(shape):
            raise ValueError(f"{'/'.join(key)}: its shards hold {found[key]} of {numel(shape)} elements")
        if not covers_once(shape, boxes[key]):
            raise ValueError(f"{'/'.join(key)}: its shards overlap, and leave a part of it out")


def _check_tensor(tensor: TensorRecord, files: tuple[FileRecord, ...]) -> None:
    where = f"{tensor.entry}/{tensor.name}"
    if not 0 <= tensor.file < len(files):
        raise ValueError(f"{where}: file {tensor.file} is not listed")
    for sizes in (tensor.shape, tensor.logical_shape, tensor.global_shape, tensor.global_offset, tensor.order):
        if sizes is not None and (len(sizes) > _MAX_DIMS or any(abs(size) > _MAX_SIZE for size in sizes)):
            raise ValueError(f"{where}: {str(sizes)[:_MAX_SHOWN]} is more than a tensor has")
    if tensor.dtype not in ITEM_NBITS or any(size < 0 for size in tensor.shape):
        raise ValueError(f"{where}: {tensor.dtype} {tensor.shape} is no dtype and shape of the format")
    if payload_nbytes(tensor.dtype, tensor.shape) != tensor.nbytes:
        raise ValueError(f"{where}: {tensor.nbytes} bytes are not {numel(tensor.shape)} elements of {tensor.dtype}")
    file = files[tensor.file]
    if tensor.offset < file.header_nbytes or tensor.offset + tensor.nbytes > file.nbytes:
        raise ValueError(f"{where}: bytes {tensor.offset}+{tensor.nbytes} are outside of {file.path}")
    if tensor.order is not None and sorted(tensor.order) != list(range(len(tensor.shape))):
        raise ValueError(f"{where}: {tensor.order} is no order of its dimensions")
    _check_blocks(where, tensor.nbytes, tensor.blocks)


def _check_blocks(where: str, nbytes: int, blocks: str) -> None:
    if len(bytes.fromhex(blocks)) != nblocks(nbytes) * DIGEST_NBYTES:
        raise ValueError(f"{where}: the digests are not those of {nbytes} bytes")
