"""Takes a snapshot through a real safetensors file in memory and reads it back, without a run around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptmgr.format.digest import block_digests
from ckptmgr.format.encoding import safetensors_header
from ckptmgr.format.manifest import EntryRecord, FileRecord, Manifest, TensorRecord, Topology, check_manifest
from ckptmgr.format.payload import FilePayload
from ckptmgr.format.record import parse_json
from ckptmgr.state.capture import capture_state, dry_check, restore_state
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.handlers import HandlerRegistry
from ckptmgr.state.read_entries import load_entries
from ckptmgr.state.snapshot import SnapshotBuffers


class InMemoryReader:
    """Reads what a snapshot would have written: the same surface as `CheckpointReader`."""

    def __init__(self, entries: list[CapturedEntry], payloads: list[FilePayload]) -> None:
        self.files = {payload.name: file_bytes(payload) for payload in payloads}
        records: list[TensorRecord] = []
        for index, payload in enumerate(payloads):
            offset = len(safetensors_header(payload.tensors)) if payload.content is None else 0
            for tensor in payload.tensors:
                fields = ("encoding", "logical_dtype", "logical_shape", "order", "scope", "rank", "aliases")
                records.append(
                    TensorRecord(
                        name=tensor.name,
                        entry=tensor.entry,
                        file=index,
                        offset=offset,
                        nbytes=tensor.data.nbytes,
                        dtype=tensor.dtype,
                        shape=tensor.shape,
                        blocks=block_digests(tensor.data).hex(),
                        **{name: getattr(tensor, name) for name in fields},
                    )
                )
                offset += tensor.data.nbytes
        self.manifest = Manifest(
            version=1,
            run_id="run",
            checkpoint="0000000001-000001-000001",
            attempt=1,
            step=1,
            reason="test",
            created_at="2026-01-01T00:00:00Z",
            files=tuple(FileRecord(path=name, nbytes=len(data), digest="0" * 32) for name, data in self.files.items()),
            tensors=tuple(records),
            entries=tuple(EntryRecord(name=e.name, handler=e.handler, handler_version=e.version) for e in entries),
            states=(len(payloads) - 1,),
            topology=Topology(),
        )
        check_manifest(self.manifest)

    @property
    def storage(self) -> InMemoryReader:
        return self

    url = "memory://test"

    def read_tensor(self, record: TensorRecord) -> memoryview:
        data = list(self.files.values())[record.file]
        return memoryview(bytearray(data[record.offset : record.offset + record.nbytes]))

    def read_stored(self, entry: str, name: str, rank: int) -> bytes:
        return next(data for path, data in self.files.items() if path.startswith(entry) and path.endswith(name))

    def read_state(self, rank: int = 0) -> Any:
        return parse_json(list(self.files.values())[self.manifest.states[rank]], where="state.json")


def file_bytes(payload: FilePayload) -> bytes:
    if payload.content is not None:
        return payload.content
    return safetensors_header(payload.tensors) + b"".join(tensor.data for tensor in payload.tensors)


def saved(state: Mapping[str, object], *, registry: HandlerRegistry | None = None) -> dict[str, CapturedEntry]:
    """Capture, prove, snapshot and load: what a later process would get."""
    return load_entries(reader_of(state, registry=registry))  # type: ignore[arg-type]


def reader_of(state: Mapping[str, object], *, registry: HandlerRegistry | None = None) -> InMemoryReader:
    entries = capture_state(state, registry=registry or HandlerRegistry())
    dry_check(entries)
    return InMemoryReader(entries, SnapshotBuffers().snapshot(entries))


def restored(state: Mapping[str, object], entries: Mapping[str, CapturedEntry]) -> None:
    restore_state(state, entries, registry=HandlerRegistry())


def bits(value: Any) -> Any:
    """Turn a nested value into one that is equal exactly if every bit of every tensor is."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().clone(memory_format=torch.contiguous_format) if value.numel() else torch.empty(0)
        return str(value.dtype), tuple(value.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bits(item) for item in value)
    return value
