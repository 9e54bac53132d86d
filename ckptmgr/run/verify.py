"""Recompute every digest of a checkpoint and name what does not match. Repairs nothing, deletes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.digest import BLOCK_NBYTES, DIGEST_NBYTES, block_digests, combined_digest
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import FileRecord, TensorRecord
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.protocol import Storage

__all__ = ["Damage", "verify_checkpoint"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a checkpoint.

    Attributes:
        path: The file, below the run's root.
        problem: What is wrong with it.
        tensor: The damaged tensor, as ``entry/name``; None where the damage is not within one.
    """

    path: str
    problem: str
    tensor: str | None = None


def verify_checkpoint(
    catalog: Catalog, checkpoint: CheckpointId, on_progress: Callable[[int], None] | None = None
) -> list[Damage]:
    """Read all of a checkpoint and compare it with its manifest.

    Args:
        catalog: The run.
        checkpoint: A committed checkpoint.
        on_progress: Called with the number of bytes that were checked since the last call.

    Returns:
        Everything that is wrong; an empty list for a whole checkpoint.

    Raises:
        CheckpointNotFoundError: There is no such checkpoint.
        StorageError: The storage failed, so nothing can be said.
    """
    try:
        manifest = catalog.manifest(checkpoint)
    except CorruptCheckpointError as error:
        return [Damage(f"{checkpoint.folder}manifest.json", error.why or error.what)]
    damages: list[Damage] = []
    for index, file in enumerate(manifest.files):
        tensors = sorted((t for t in manifest.tensors if t.file == index), key=lambda tensor: tensor.offset)
        try:
            damages += _verify_file(catalog.storage, file, tensors, on_progress or (lambda nbytes: None))
        except FileNotFoundError:
            damages.append(Damage(file.path, "the file is missing"))
    return damages


def _verify_file(
    storage: Storage,
    file: FileRecord,
    tensors: list[TensorRecord],
    on_progress: Callable[[int], None],
) -> list[Damage]:
    regions: list[tuple[int, int, str, str | None]] = [
        (0, file.header_nbytes if tensors or file.header_nbytes else file.nbytes, file.blocks, None)
    ]
    regions += [(t.offset, t.nbytes, t.blocks, f"{t.entry}/{t.name}") for t in tensors]
    found = bytearray()
    damages: list[Damage] = []
    for start, nbytes, expected, tensor in regions:
        try:
            blocks = _digest_range(storage, file.path, start, nbytes, on_progress)
        except EOFError:
            damages.append(Damage(file.path, f"the file is truncated; it should have {file.nbytes} bytes", tensor))
            return damages
        found += blocks
        if blocks.hex() != expected:
            damages.append(Damage(file.path, _where(blocks, bytes.fromhex(expected), start), tensor))
    is_whole = sum(nbytes for _, nbytes, _, _ in regions) == file.nbytes
    if is_whole and not damages and combined_digest(bytes(found)) != file.digest:
        damages.append(Damage(file.path, "the digest of the file does not match that of its parts in the manifest"))
    if storage.read(file.path, start=file.nbytes, stop=file.nbytes + 1):
        damages.append(Damage(file.path, f"the file is longer than the {file.nbytes} bytes that were written"))
    return damages


def _digest_range(storage: Storage, path: str, start: int, nbytes: int, on_progress: Callable[[int], None]) -> bytes:
    digests = []
    buffer = memoryview(bytearray(min(nbytes, BLOCK_NBYTES)))
    for offset in range(0, nbytes, BLOCK_NBYTES):
        block = buffer[: min(BLOCK_NBYTES, nbytes - offset)]
        storage.readinto(path, block, start=start + offset)
        digests.append(block_digests(block))
        on_progress(block.nbytes)
    return b"".join(digests)


def _where(found: bytes, expected: bytes, start: int) -> str:
    for index in range(0, len(expected), DIGEST_NBYTES):
        if found[index : index + DIGEST_NBYTES] != expected[index : index + DIGEST_NBYTES]:
            first = start + index // DIGEST_NBYTES * BLOCK_NBYTES
            return f"the bytes from offset {first} on do not match their digest"
    return "the digests do not match"
