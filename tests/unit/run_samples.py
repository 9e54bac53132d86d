"""Small runs, made through the run floor alone, for its tests."""

import struct
from collections.abc import Sequence

from ckptmgr.format.layout import RUN_MARKER, CheckpointId
from ckptmgr.format.manifest import EntryRecord, Manifest, RunMarker
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.format.record import encode_record
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.commit import CheckpointFields, commit_checkpoint
from ckptmgr.run.lineage import claim_attempt, read_line, record_line
from ckptmgr.storage.protocol import Storage

STATE = b'{"entries":{"model":{"handler":"module","version":1,"tree":{}}}}'


def payload(step: int, nfloats: int = 8) -> list[FilePayload]:
    tensors = tuple(
        TensorPayload(
            name=name,
            entry="model",
            dtype="F32",
            shape=(nfloats,),
            data=memoryview(struct.pack(f"<{nfloats}f", *([step + offset] * nfloats))),
        )
        for offset, name in enumerate(["bias", "weight"])
    )
    return [FilePayload("model.safetensors", tensors=tensors), FilePayload("state.json", content=STATE, is_state=True)]


def create_run(storage: Storage, *, run_id: str = "00" * 8) -> None:
    marker = RunMarker(version=1, run_id=run_id, created_at="2026-01-01T00:00:00.000Z")
    storage.write(RUN_MARKER, [encode_record(marker)], exclusive=True)


def start(storage: Storage, continues: Manifest | None = None) -> int:
    attempt = claim_attempt(storage, Catalog(storage).attempts).attempt
    record_line(storage, attempt, continues)
    return attempt


def save(
    storage: Storage,
    attempt: int,
    step: int,
    *,
    number: int = 0,
    metrics: dict[str, float] | None = None,
    tags: Sequence[str] = (),
    files: list[FilePayload] | None = None,
    run_id: str = "00" * 8,
) -> Manifest:
    fields = CheckpointFields(
        run_id=run_id,
        reason="test",
        entries=(EntryRecord(name="model", handler="module", handler_version=1),),
        metrics=metrics or {},
        monitor="loss",
        mode="min",
        tags=tuple(tags),
        continues=read_line(storage, attempt).continues,
    )
    return commit_checkpoint(storage, CheckpointId(step, attempt, number), files or payload(step), fields)
