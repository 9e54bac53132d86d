"""The shipped conformance suite against every storage that we ship."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from s3_server import S3Server

from ckptmgr.storage import Storage, open_storage
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.remote import FsspecStorage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.testing.memory import MemoryStorage
from ckptmgr.testing.storage_suite import StorageConformance


class TestLocal(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "deep" / "run")

    def reopen(self, storage: Storage) -> Storage:
        return LocalStorage(storage.url)


class TestMemoryUrl(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return open_storage(f"memory://{uuid.uuid4().hex}/run")

    def reopen(self, storage: Storage) -> Storage:
        return FsspecStorage(storage.url)


class TestS3(StorageConformance):
    large_nbytes = 80 << 20
    race_names = 8

    @pytest.fixture
    def storage(self, s3_server: S3Server) -> Storage:
        self.server = s3_server
        return open_storage(s3_server.new_root(), storage_options=s3_server.storage_options)

    def reopen(self, storage: Storage) -> Storage:
        return open_storage(storage.url, storage_options=self.server.storage_options)


class TestMemoryFake(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage()

    def reopen(self, storage: Storage) -> Storage:
        assert isinstance(storage, MemoryStorage)
        return MemoryStorage(storage.objects)


class TestFaultyWithoutFault(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FaultyStorage(LocalStorage(tmp_path))

    def reopen(self, storage: Storage) -> Storage:
        return FaultyStorage(LocalStorage(storage.url))
