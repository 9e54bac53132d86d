"""Copying a checkpoint's files into another run, every byte checked against its digest on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from xxhash import xxh3_128

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.digest import BLOCK_NBYTES, block_digests, combined_digest
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import FileRecord, Manifest, TensorRecord
from ckptmgr.format.record import parse_json
from ckptmgr.storage.protocol import Buffer, CopiesFrom, Storage

__all__ = ["copy_files"]

# Remote storages read several blocks at once.
_READ_NBYTES = 4 * BLOCK_NBYTES
_HEADER_LENGTH_NBYTES = 8


@dataclass(frozen=True, slots=True)
class _Region:
    """A range of a file that has block digests of its own; None where the manifest does not hold them."""

    stop: int
    blocks: bytes | None
    what: str


def copy_files(
    source: Storage,
    manifest: Manifest,
    target: Storage,
    checkpoint: CheckpointId,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[FileRecord, ...]:
    """Copy every file that a manifest refers to into the folder of a new checkpoint.

    Where both runs are in one object store, the server copies what is larger than a block. Then only sizes are
    compared here, and the digests are when the checkpoint is first read.

    Args:
        source: Root of the run that the manifest is of.
        manifest: Names the files, also those in the folders of earlier checkpoints.
        target: Root of the other run.
        checkpoint: Whose folder gets them, there. No file lies in it yet.
        on_progress: Called with the number of bytes that were copied since the last call.

    Returns:
        The files as the new manifest lists them, in the same order.

    Raises:
        CorruptCheckpointError: A file is missing, or its bytes are not those that were written.
    """
    names = _new_names(manifest.files)
    copied = []
    for index, (file, name) in enumerate(zip(manifest.files, names, strict=True)):
        path = checkpoint.folder + name
        try:
            if file.nbytes > BLOCK_NBYTES and isinstance(target, CopiesFrom):
                is_done = target.copy_from(source, file.path, path)
            else:
                is_done = False
            if is_done:
                _check_size(target, path, file, source)
                on_progress(file.nbytes)
            else:
                tensors = [tensor for tensor in manifest.tensors if tensor.file == index]
                target.write(path, _CheckedStream(source, file, _regions(source, file, tensors), on_progress))
        except FileNotFoundError as error:
            raise _damaged(source, file.path, "the file is missing") from error
        copied.append(msgspec.structs.replace(file, path=path))
    return tuple(copied)


class _CheckedStream:
    """A file's bytes. Iterating it raises where they are not those that were written, so that nothing is stored.

    Can be iterated again: a storage that retries a write starts over.
    """

    def __init__(
        self, source: Storage, file: FileRecord, regions: Sequence[_Region], on_progress: Callable[[int], None]
    ) -> None:
        self._source = source
        self._file = file
        self._regions = regions
        self._on_progress = on_progress
        self._ntold = 0

    def __iter__(self) -> Iterator[Buffer]:
        digests = _RegionDigests(self._regions)
        buffer = memoryview(bytearray(min(self._file.nbytes, _READ_NBYTES)))
        for start in range(0, self._file.nbytes, _READ_NBYTES):
            part = buffer[: min(_READ_NBYTES, self._file.nbytes - start)]
            try:
                self._source.readinto(self._file.path, part, start=start)
            except EOFError as error:
                raise _damaged(self._source, self._file.path, "the file is truncated") from error
            problem = digests.update(part)
            if problem is not None:
                raise _damaged(self._source, self._file.path, problem)
            yield part
            if start + part.nbytes > self._ntold:
                self._on_progress(start + part.nbytes - self._ntold)
                self._ntold = start + part.nbytes
        if combined_digest(bytes(digests.found)) != self._file.digest:
            raise _damaged(self._source, self._file.path, "its bytes do not match the digest of the file")
        if self._source.read(self._file.path, start=self._file.nbytes, stop=self._file.nbytes + 1):
            raise _damaged(self._source, self._file.path, f"it is longer than {self._file.nbytes} bytes")


class _RegionDigests:
    """Digests of the blocks of each region, from bytes that come in parts of any size."""

    def __init__(self, regions: Sequence[_Region]) -> None:
        self.found = bytearray()
        self._regions = iter(regions)
        self._region: _Region | None = None
        self._position = 0
        self._block = xxh3_128()
        self._room = BLOCK_NBYTES
        self._first = 0

    def update(self, part: memoryview) -> str | None:
        """Take the next bytes; return what is wrong with a region that ends in them."""
        used = 0
        while used < part.nbytes:
            if self._region is None:
                self._region = next(self._regions)
                self._first = len(self.found)
            count = min(part.nbytes - used, self._region.stop - self._position, self._room)
            self._block.update(part[used : used + count])
            used, self._position, self._room = used + count, self._position + count, self._room - count
            is_over = self._position == self._region.stop
            if is_over or self._room == 0:
                if self._room < BLOCK_NBYTES:
                    self.found += self._block.digest()
                self._block, self._room = xxh3_128(), BLOCK_NBYTES
            if is_over:
                expected, what = self._region.blocks, self._region.what
                self._region = None
                if expected is not None and bytes(self.found[self._first :]) != expected:
                    return f"the bytes of {what} do not match their digests"
        return None


def _regions(source: Storage, file: FileRecord, tensors: Sequence[TensorRecord]) -> list[_Region]:
    """Return the regions of a file, one after the other, without the empty ones."""
    if not file.header_nbytes:
        return [_Region(file.nbytes, bytes.fromhex(file.blocks), "the document")] if file.nbytes else []
    header = _Region(file.header_nbytes, bytes.fromhex(file.blocks), "the header")
    known = {
        tensor.offset: _Region(tensor.offset + tensor.nbytes, bytes.fromhex(tensor.blocks), f"tensor {tensor.name!r}")
        for tensor in tensors
        if tensor.nbytes
    }
    regions = [header]
    while regions[-1].stop < file.nbytes and regions[-1].stop in known:
        regions.append(known[regions[-1].stop])
    if regions[-1].stop == file.nbytes and len(regions) == len(known) + 1:
        return regions
    # Unchanged tensors may refer to the file of an earlier checkpoint, of which other tensors are none of this one's.
    regions = [header]
    for stop in _ends_in_header(source, file):
        found = known.pop(regions[-1].stop, None)
        regions.append(found if found is not None and found.stop == stop else _Region(stop, None, "a tensor"))
    if known or regions[-1].stop != file.nbytes:
        raise _damaged(source, file.path, "its header and the manifest do not agree on where tensors lie")
    return regions


def _ends_in_header(source: Storage, file: FileRecord) -> list[int]:
    data = source.read(file.path, start=0, stop=file.header_nbytes)
    if block_digests(data).hex() != file.blocks:
        raise _damaged(source, file.path, "the bytes of the header do not match their digests")
    header = parse_json(data[_HEADER_LENGTH_NBYTES:], where=file.path)
    try:
        spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
        return [file.header_nbytes + stop for start, stop in spans if start < stop]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(source, file.path, "its header does not say where tensors lie") from error


def _check_size(target: Storage, path: str, file: FileRecord, source: Storage) -> None:
    # Bytes [nbytes - 1, nbytes + 1) are one byte exactly if the copy is as long as it should be.
    if len(target.read(path, start=file.nbytes - 1, stop=file.nbytes + 1)) != 1:
        raise _damaged(source, file.path, f"what was copied has not the {file.nbytes} bytes that were written")


def _new_names(files: Sequence[FileRecord]) -> list[str]:
    """Return a name for each file in one folder; files of several folders may have had the same one."""
    taken = {"manifest.json"}
    names = []
    for index, file in enumerate(files):
        name = file.path.rpartition("/")[2]
        # Some file systems take two names for one that differ in case only.
        if name.lower() in taken or name.lower().startswith("note-"):
            name = f"file-{index:06d}.{'safetensors' if file.header_nbytes else 'json'}"
        taken.add(name.lower())
        names.append(name)
    return names


def _damaged(source: Storage, path: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} in {source.url} is damaged, so nothing was copied",
        why=why,
        next=f"`ckptmgr verify {source.url}` names the checkpoints that are whole: copy one of them",
    )
