"""State trees to host memory that no longer changes: the only part of a save that training waits for.

Every tensor is copied once, into a standing buffer of its file, at the place where the file will have it. The buffers
are kept and used again: fresh memory costs as much in page faults as the copy itself.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.format.encoding import ALIGNMENT
from ckptmgr.format.layout import payload_stem
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.shares import Share
from ckptmgr.state.tensors import StoredTensor

__all__ = ["SnapshotBuffers"]


class SnapshotBuffers:
    """Standing host buffers, one for each entry of the state.

    They grow when an entry does, and are page-locked where tensors come from a CUDA device. Not safe for use by several
    threads.
    """

    def __init__(self) -> None:
        self._arenas: dict[str, _Arena] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the buffers hold."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def reserve(self, entries: Sequence[CapturedEntry]) -> None:
        """Make and touch the buffers that these entries need, so that the first save does not pay for it.

        Optimizer state that does not exist before the first step is not foreseen.
        """
        for entry in entries:
            self._arena(entry.name, EntryEncoder(entry).tensors)

    def snapshot(
        self,
        entries: Sequence[CapturedEntry],
        *,
        encoders: Sequence[EntryEncoder] | None = None,
        share: Share = Share.OF_ONE,
    ) -> list[FilePayload]:
        """Copy what this rank writes of the entries; return it.

        The payloads are views of the buffers: they hold until the next snapshot, which must not begin before they are
        written.

        Args:
            entries: A capture. Its tensors may change again as soon as this returns.
            encoders: The entries, encoded, if they are already.
            share: What of them this rank writes. Every rank but 0 has files of its own names, and a document of its own
                for what is not the same on all.

        Returns:
            The files of each entry: those of other tools, and a safetensors file if it has tensors. Then the state
            document.

        Raises:
            UnsupportedStateError: A value that cannot be stored. Names its path and type.
        """
        files: list[FilePayload] = []
        trees: dict[str, Any] = {}
        devices: set[torch.device] = set()
        suffix = "" if share.rank == 0 else f"-rank-{share.rank:05d}"
        encoders = encoders if encoders is not None else [EntryEncoder(entry) for entry in entries]
        for position, (entry, encoder) in enumerate(zip(entries, encoders, strict=True)):
            if share.rank == 0 or entry.scope == "per-rank":
                trees[entry.name] = encoder.tree
            written = {t.name: scope for t in encoder.tensors if (scope := share.scope_of(entry, t)) is not None}
            own = share.rank if entry.scope == "per-rank" and share.world_size > 1 else None
            if share.rank == 0 or own is not None:
                files += [
                    FilePayload(
                        f"{payload_stem(entry.name, position)}{suffix}.{key}",
                        content=file.content,
                        entry=entry.name,
                        stored_as=key,
                        rank=own,
                    )
                    for key, file in encoder.files.items()
                ]
            if written:
                tensors = self._copy(entry.name, [t for t in encoder.tensors if t.name in written], devices)
                tensors = [
                    replace(t, scope="replicated", global_shape=None, global_offset=None)
                    if written[t.name] == "replicated"
                    else replace(t, scope=written[t.name], rank=share.rank)
                    for t in tensors
                ]
                files.append(FilePayload(f"{payload_stem(entry.name, position)}{suffix}.safetensors", tuple(tensors)))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        document = json.dumps({"entries": trees}, allow_nan=False, separators=(",", ":")).encode()
        files.append(FilePayload(f"state{suffix}.json", content=document, is_state=True))
        _refuse_one_name_twice(files)
        return files

    def _copy(self, entry: str, tensors: list[StoredTensor], devices: set[torch.device]) -> list[TensorPayload]:
        arena = self._arena(entry, tensors)
        payloads: list[TensorPayload] = []
        start = 0
        for stored in _in_file_order(tensors):
            end = start + stored.nbytes
            if end > start:
                arena.fill(start, end, stored.source)
                if isinstance(stored.source, torch.Tensor) and stored.source.is_cuda:
                    devices.add(stored.source.device)
            payloads.append(
                TensorPayload(
                    name=stored.name,
                    entry=entry,
                    dtype=stored.dtype,
                    shape=stored.shape,
                    data=arena.view[start:end],
                    encoding=stored.encoding,
                    logical_dtype=stored.logical_dtype,
                    logical_shape=stored.logical_shape,
                    order=stored.order,
                    global_shape=stored.global_shape,
                    global_offset=stored.global_offset,
                    aliases=tuple(stored.aliases),
                )
            )
            start = end
        return payloads

    def _arena(self, entry: str, tensors: list[StoredTensor]) -> _Arena:
        nbytes = sum(stored.nbytes for stored in tensors)
        pinned = any(isinstance(stored.source, torch.Tensor) and stored.source.is_cuda for stored in tensors)
        arena = self._arenas.get(entry)
        if arena is None or arena.nbytes < nbytes or (pinned and not arena.is_pinned):
            # The old memory goes first, or both would stand side by side.
            self._arenas.pop(entry, None)
            del arena
            arena = self._arenas[entry] = _Arena(nbytes, pinned=pinned)
        return arena


class _Arena:
    """One buffer, starting at a page so that its bytes can be written past the page cache."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.nbytes = nbytes
        memory = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
        offset = -memory.ctypes.data % ALIGNMENT
        array = memory[offset : offset + nbytes]
        # One write to each page: the system then has given the memory, and copying does not wait for it.
        array[::ALIGNMENT] = 0
        self._array = array
        self._bytes = torch.from_numpy(array)
        self.is_pinned = pinned and nbytes > 0 and _page_lock(array)
        self.view = memoryview(array.data)

    def fill(self, start: int, end: int, source: torch.Tensor | np.ndarray[Any, Any]) -> None:
        """Copy a tensor, row-major, to these bytes; from a CUDA device the copy may still be under way on return."""
        if isinstance(source, np.ndarray):
            np.copyto(self._array[start:end].view(source.dtype).reshape(source.shape), source)
            return
        place = self._bytes[start:end].view(source.dtype).view(source.shape)
        place.copy_(source, non_blocking=self.is_pinned and source.is_cuda)


def _refuse_one_name_twice(files: Sequence[FilePayload]) -> None:
    seen: set[str] = set()
    for file in files:
        if file.name in seen:
            raise UnsupportedStateError(
                f"two files of a checkpoint would be stored as {file.name}",
                next="give one of their entries, or the file of one, another name",
            )
        seen.add(file.name)


def _page_lock(array: np.ndarray[Any, Any]) -> bool:
    """Page-lock memory for CUDA, so that copies from the device run at full speed and by themselves.

    torch's own pinned memory is not used: its allocator rounds up to a power of two, which can double a large state.
    """
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cudart.cudaHostRegister(array.ctypes.data, array.nbytes, 0)) != 0:
        # Locked memory is limited by the system; unlocked memory is slower, and right all the same.
        return False
    weakref.finalize(array, cudart.cudaHostUnregister, array.ctypes.data)
    return True


def _in_file_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Sort wide elements first, so that every tensor is aligned without gaps; then by name."""
    return sorted(tensors, key=lambda stored: (-stored.source.dtype.itemsize, stored.name))
