"""Servers that run for as long as the tests of this room do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from s3_server import S3Server, running_s3_server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3_server(tmp_path_factory.mktemp("moto") / "server.log") as server:
        yield server
