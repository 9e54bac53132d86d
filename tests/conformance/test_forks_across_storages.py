"""Forks from any storage to any other, and within an object store by the server."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server

from ckptmgr.errors import CorruptCheckpointError, UsageError
from ckptmgr.fork import fork_run
from ckptmgr.format.digest import BLOCK_NBYTES
from ckptmgr.format.layout import RUN_MARKER, CheckpointId
from ckptmgr.format.manifest import EntryRecord, RunMarker
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.format.record import encode_record
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.commit import CheckpointFields, commit_checkpoint
from ckptmgr.run.lineage import claim_attempt, record_line
from ckptmgr.run.reference import Reference
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.remote import FsspecStorage


def make_run(url: str, options: dict[str, Any] | None, *, nbytes: int) -> None:
    storage = open_storage(url, storage_options=options)
    storage.write(RUN_MARKER, [encode_record(RunMarker(version=1, run_id="00" * 8, created_at=""))], exclusive=True)
    attempt = claim_attempt(storage, []).attempt
    record_line(storage, attempt, None)
    data = memoryview(bytes(range(256)) * (nbytes // 256))
    tensor = TensorPayload(name="x", entry="model", dtype="U8", shape=(len(data),), data=data)
    files = [
        FilePayload("model.safetensors", tensors=(tensor,)),
        FilePayload("state.json", content=b"{}", is_state=True),
    ]
    entries = (EntryRecord(name="model", handler="module", handler_version=1),)
    fields = CheckpointFields(run_id="00" * 8, reason="test", entries=entries)
    commit_checkpoint(storage, CheckpointId(7, attempt, 0), files, fields)


def check(url: str, options: dict[str, Any] | None) -> None:
    catalog = Catalog.of_existing_run(open_storage(url, storage_options=options))
    assert verify_checkpoint(catalog, catalog.latest().id) == []
    assert catalog.latest().step == 7


def test_a_fork_goes_from_disk_to_memory_to_s3_and_back(s3_server: S3Server, tmp_path: Path) -> None:
    options = s3_server.storage_options
    local, memory, remote = str(tmp_path / "run"), f"memory://{uuid.uuid4().hex}/run", s3_server.new_root()
    make_run(local, None, nbytes=BLOCK_NBYTES + 512)
    fork_run(Reference(local), memory)
    fork_run(Reference(memory), remote, to_storage_options=options)
    fork_run(Reference(remote), str(tmp_path / "back"), storage_options=options)
    check(memory, None)
    check(remote, options)
    check(str(tmp_path / "back"), None)
    parent = Catalog(open_storage(tmp_path / "back")).marker.parent
    assert parent == f"{remote}@0000000007-000001-000000"


@pytest.mark.parametrize("is_large", [True, False])
def test_within_s3_the_server_copies_what_is_large(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    options = s3_server.storage_options
    parent, new = s3_server.new_root(), s3_server.new_root()
    make_run(parent, options, nbytes=2 * BLOCK_NBYTES if is_large else 512)
    copied: list[str] = []
    copy_from = FsspecStorage.copy_from

    def counting(self: FsspecStorage, source: Any, source_key: str, key: str) -> bool:
        is_copied = copy_from(self, source, source_key, key)
        copied.extend([key.rpartition("/")[2]] * is_copied)
        return is_copied

    monkeypatch.setattr(FsspecStorage, "copy_from", counting)
    fork_run(Reference(parent), new, storage_options=options)
    assert copied == (["model.safetensors"] if is_large else [])
    check(new, options)
    with pytest.raises(UsageError, match="this very fork"):
        fork_run(Reference(parent), new, storage_options=options)


def test_a_copy_by_the_server_that_is_cut_short_is_found(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    options = s3_server.storage_options
    parent, new = s3_server.new_root(), s3_server.new_root()
    make_run(parent, options, nbytes=2 * BLOCK_NBYTES)

    def cut(self: FsspecStorage, source: FsspecStorage, source_key: str, key: str) -> bool:
        self.write(key, [source.read(source_key, start=0, stop=1000)])
        return True

    monkeypatch.setattr(FsspecStorage, "copy_from", cut)
    with pytest.raises(CorruptCheckpointError, match="what was copied has not"):
        fork_run(Reference(parent), new, storage_options=options)
    assert open_storage(new, storage_options=options).list() == []


def test_other_storages_are_not_copied_from_by_the_server(s3_server: S3Server, tmp_path: Path) -> None:
    options = s3_server.storage_options
    storage = open_storage(s3_server.new_root(), storage_options=options)
    local = open_storage(tmp_path / "run")
    local.write("a", [b"x"])
    elsewhere = open_storage(s3_server.new_root(), storage_options={**options, "key": "somebody else's"})
    assert isinstance(storage, FsspecStorage)
    assert not storage.copy_from(local, "a", "a")
    assert not storage.copy_from(elsewhere, "a", "a")
    with pytest.raises(FileNotFoundError):
        storage.copy_from(open_storage(s3_server.new_root(), storage_options=options), "a", "a")
