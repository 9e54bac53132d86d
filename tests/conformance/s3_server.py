"""A real S3 server on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# moto looks for the name and then stores it, with no lock: without the long interval two threads may change places in
# between, and then it is no longer a store with exclusive create.
SERVE = "import sys; sys.setswitchinterval(1.0); from moto.server import main; main()"
READY_WITHIN_S = 60.0
STOPPED_WITHIN_S = 10.0


@dataclass(frozen=True)
class S3Server:
    """Where the server listens, and what a client of it needs."""

    endpoint: str
    bucket: str

    @property
    def storage_options(self) -> dict[str, Any]:
        return {
            "key": "test-key-id",
            "secret": "test-secret/with+slash",
            "client_kwargs": {"endpoint_url": self.endpoint},
        }

    def new_root(self) -> str:
        """A URL that nobody has used."""
        return f"s3://{self.bucket}/{uuid.uuid4().hex}/run"

    def request(self, path: str, method: str = "GET", body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.endpoint + path, data=body, method=method)
        request.add_header("Content-Type", "text/plain")
        with urllib.request.urlopen(request) as reply:
            return bytes(reply.read())


@contextmanager
def running_s3_server(log: Path) -> Iterator[S3Server]:
    """Run moto_server in a process of its own, with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "server", "AWS_SECRET_ACCESS_KEY": "server"}
    with log.open("wb") as output:
        command = [sys.executable, "-c", SERVE, "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        _wait_until_ready(server, port, log)
        s3 = S3Server(f"http://127.0.0.1:{port}", "checkpoints")
        s3.request(f"/{s3.bucket}", "PUT")
        yield s3
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(STOPPED_WITHIN_S)


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            # Refusals come at once, so this is what keeps the loop from spinning.
            time.sleep(0.05)
    pytest.fail(f"moto_server is not ready:\n{log.read_text()}")
