"""What commands and managers say beside their results, and when they say nothing."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_samples import create_run, save, start

from ckptmgr import loading
from ckptmgr.cli import verify
from ckptmgr.cli.main import run
from ckptmgr.cli.output import show_log
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.digest import BLOCK_NBYTES
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.progress import is_quiet, set_quiet
from ckptmgr.run import reader
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.storage.local import LocalStorage

Output = pytest.CaptureFixture[str]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "run")
    create_run(storage)
    return storage


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Our logger, as it is in a process of its own."""
    logger = logging.getLogger("ckptmgr")
    before = logger.handlers[:], logger.level
    logger.handlers.clear()
    yield logger
    logger.handlers[:] = before[0]
    logger.setLevel(before[1])
    set_quiet(False)


class Shown:
    def __init__(self) -> None:
        self.works: list[tuple[str, int]] = []
        self.done = 0

    @contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        self.works.append((what, total))

        def advance(nbytes: int) -> None:
            self.done += nbytes

        yield advance


def test_quiet_leaves_out_remarks_and_warnings_but_no_error(storage: LocalStorage, capsys: Output) -> None:
    assert run(["ls", storage.url]) == 0
    assert "no checkpoint was committed" in capsys.readouterr().err
    assert run(["ls", "--quiet", storage.url]) == 0
    assert capsys.readouterr().err == ""
    assert not is_quiet()
    assert run(["verify", "--quiet", storage.url]) == 10
    assert "nothing to verify" in capsys.readouterr().err


def test_quiet_silences_what_is_logged_and_only_for_that_command(
    storage: LocalStorage, logger: logging.Logger, capsys: Output
) -> None:
    attempt = start(storage)
    save(storage, attempt, 10)
    (Path(storage.url) / "ckptmgr.json").write_text("{}")
    assert run(["ls", "--quiet", storage.url]) == 0
    assert capsys.readouterr().err == ""
    assert logger.level == logging.NOTSET


def test_the_log_is_shown_line_by_line_once(logger: logging.Logger, capsys: Output) -> None:
    show_log()
    show_log()
    logger.info("saved step %d", 10)
    logger.warning("set aside step %d", 20)
    logger.debug("nobody wants this")
    assert capsys.readouterr().err.splitlines() == ["ckptmgr: saved step 10", "ckptmgr: warning: set aside step 20"]


def test_what_the_users_code_logs_to_the_terminal_is_not_said_twice(logger: logging.Logger, capsys: Output) -> None:
    show_log()
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    logger.info("saved")
    logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "saved\n"


def test_a_quiet_log_shows_errors_only(logger: logging.Logger, capsys: Output) -> None:
    set_quiet(True)
    show_log()
    logger.warning("set aside")
    logger.error("lost")
    assert capsys.readouterr().err == "ckptmgr: error: lost\n"


def test_a_stderr_that_nobody_reads_does_not_stop_training(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    show_log()
    monkeypatch.setattr(sys, "stderr", Broken())
    logger.info("saved")
    logger.info("saved again")


def test_verifying_shows_every_byte_as_progress(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = save(storage, start(storage), 10)
    shown = Shown()
    monkeypatch.setattr(verify, "progress", shown)
    assert run(["verify", storage.url]) == 0
    assert shown.works == [("verifying step 10 (1 of 1)", manifest.nbytes)]
    assert shown.done == manifest.nbytes


def test_restoring_shows_every_byte_of_what_is_wanted_as_progress(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"entries":{"model":{"a":{"$tensor":"bias"},"b":{"$tensor":"weight"}}}}'
    files = [save_payload(8), FilePayload("state.json", content=content, is_state=True)]
    save(storage, start(storage), 10, files=files)
    shown = Shown()
    monkeypatch.setattr(loading, "progress", shown)
    monkeypatch.chdir(Path(storage.url).parent)
    loading.load_checkpoint(storage.url)
    assert shown.works == [("restoring step 10 of run", 2 * 8)]
    assert shown.done == 2 * 8
    loading.load_checkpoint(storage.url, names=["other"])
    assert shown.works[-1][1] == 0


def save_payload(nbytes: int) -> FilePayload:
    return FilePayload(
        "model.safetensors",
        tensors=tuple(
            TensorPayload(name=name, entry="model", dtype="U8", shape=(nbytes,), data=memoryview(bytes(nbytes)))
            for name in ("bias", "weight")
        ),
    )


def test_a_large_tensor_is_read_and_checked_in_parts(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_READ_NBYTES", BLOCK_NBYTES)
    manifest = save(storage, start(storage), 10, files=[save_payload(2 * BLOCK_NBYTES + 5)])
    parts: list[int] = []
    reading = CheckpointReader(storage, manifest, parts.append)
    assert bytes(reading.read_tensor(manifest.tensors[0])) == bytes(2 * BLOCK_NBYTES + 5)
    assert parts == [BLOCK_NBYTES, BLOCK_NBYTES, 5]
    with (Path(storage.url) / manifest.files[0].path).open("r+b") as file:
        file.seek(manifest.tensors[0].offset + BLOCK_NBYTES + 1)
        file.write(b"x")
    with pytest.raises(CorruptCheckpointError, match="'bias'"):
        reading.read_tensor(manifest.tensors[0])
