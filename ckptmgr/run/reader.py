"""Reading one checkpoint: every byte that leaves this module has been checked against its digest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.digest import BLOCK_NBYTES, DIGEST_NBYTES, block_digests, combined_digest
from ckptmgr.format.manifest import FileRecord, Manifest, TensorRecord
from ckptmgr.format.record import parse_json
from ckptmgr.storage.protocol import Storage

__all__ = ["CheckpointReader"]

# Remote storages read several blocks at once.
_READ_NBYTES = 4 * BLOCK_NBYTES


class CheckpointReader:
    """Reads the tensors and the state documents of one committed checkpoint.

    Args:
        storage: The run's root.
        manifest: The checkpoint's manifest, already checked.
        on_progress: Called with the number of bytes that were read and checked since the last call.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, on_progress: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        self.storage = storage
        self.manifest = manifest
        self._on_progress = on_progress

    def read_tensor(self, record: TensorRecord, into: memoryview | None = None) -> memoryview:
        """Return a tensor's stored bytes, row-major.

        Args:
            record: One of the manifest's tensors.
            into: Writable buffer of exactly ``record.nbytes`` bytes; a fresh one by default. Holds unchecked bytes if
                this raises, so it must not be a live object's memory.

        Raises:
            CorruptCheckpointError: The file is missing or short, or the bytes are not those that were written.
        """
        buffer = memoryview(bytearray(record.nbytes)) if into is None else into
        file = self.manifest.files[record.file]
        what = f"tensor {record.name!r} of {record.entry!r} in {file.path}"
        blocks = bytearray()
        for start in range(0, record.nbytes or 1, _READ_NBYTES):
            part = buffer[start : start + _READ_NBYTES]
            try:
                self.storage.readinto(file.path, part, start=record.offset + start)
            except FileNotFoundError as error:
                raise self._damaged(what, "the file is missing") from error
            except EOFError as error:
                raise self._damaged(what, "the file is truncated") from error
            blocks += block_digests(part)
            self._on_progress(part.nbytes)
        if blocks.hex() != record.blocks:
            raise self._damaged(what, "its bytes do not match their digests")
        return buffer

    def read_range(self, record: TensorRecord, start: int, stop: int) -> memoryview:
        """Return some of a tensor's stored bytes. The blocks that hold them are read whole, and checked.

        Args:
            record: One of the manifest's tensors.
            start: First byte within the tensor.
            stop: The byte after the last one.

        Raises:
            CorruptCheckpointError: As `read_tensor`.
        """
        first, last = start // BLOCK_NBYTES, -(-stop // BLOCK_NBYTES)
        begin, end = first * BLOCK_NBYTES, min(last * BLOCK_NBYTES, record.nbytes)
        digests = record.blocks[2 * DIGEST_NBYTES * first : 2 * DIGEST_NBYTES * last]
        part = msgspec.structs.replace(record, offset=record.offset + begin, nbytes=end - begin, blocks=digests)
        return self.read_tensor(part)[start - begin : stop - begin]

    def read_state(self, rank: int = 0) -> Any:
        """Return a rank's state document, as parsed JSON.

        Raises:
            CorruptCheckpointError: It is missing, damaged, or not among the manifest's documents.
        """
        try:
            file = self.manifest.files[self.manifest.states[rank]]
        except IndexError as error:
            raise self._damaged(f"the state document of rank {rank}", "the manifest lists none") from error
        return parse_json(self.read_document(file), where=file.path)

    def read_stored(self, entry: str, name: str, rank: int) -> bytes:
        """Return the bytes of a tool's own file.

        Args:
            entry: The entry that it belongs to.
            name: What the entry's tree calls it.
            rank: The rank whose file it is, where each has its own.

        Raises:
            CorruptCheckpointError: As `read_document`; or the manifest lists none of that name.
        """
        for owner in (rank, None):
            if isinstance(name, str) and (file := self._stored.get((entry, name, owner))) is not None:
                return self.read_document(file)
        raise self._damaged(f"the file {name!r:.80} of {entry!r}", "the manifest lists none")

    def read_document(self, file: FileRecord) -> bytes:
        """Return the bytes of a file that is no tensor file.

        Raises:
            CorruptCheckpointError: It is missing, or its bytes are not those that were written.
        """
        try:
            data = self.storage.read(file.path)
        except FileNotFoundError as error:
            raise self._damaged(file.path, "the file is missing") from error
        blocks = block_digests(data)
        if len(data) != file.nbytes or blocks.hex() != file.blocks or combined_digest(blocks) != file.digest:
            raise self._damaged(file.path, "its bytes do not match their digest")
        return data

    @cached_property
    def _stored(self) -> dict[tuple[str | None, str | None, int | None], FileRecord]:
        # Looked up by each reference of a tree: going through all files each time could take hours.
        return {(file.entry, file.name, file.rank): file for file in self.manifest.files if file.entry is not None}

    def _damaged(self, what: str, why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{what} is damaged, in step {self.manifest.step} of {self.storage.url}",
            why=why,
            next=f"resume falls back to an intact checkpoint; `ckptmgr verify {self.storage.url}` lists the damage",
        )
