"""Which storage serves what a user typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.storage import open_storage
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.remote import FsspecStorage


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}", "file:{}", "{}/", "{}/../run"])
def test_paths_and_file_urls_are_local(tmp_path: Path, form: str) -> None:
    storage = open_storage(form.format(tmp_path / "run"))
    assert isinstance(storage, LocalStorage)
    assert storage.url == str(tmp_path / "run")
    assert open_storage(storage.url).url == storage.url


def test_relative_paths_are_fixed_when_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage(Path("runs/digits"))
    monkeypatch.chdir("/")
    assert storage.url == str(tmp_path / "runs/digits")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/run").url == str(tmp_path / "run")


def test_memory_is_remote() -> None:
    storage = open_storage("memory://bucket/run")
    assert isinstance(storage, FsspecStorage)
    assert storage.url == "memory://bucket/run"


@pytest.mark.parametrize("location", ["", "a\0b"])
def test_no_location_is_refused(location: str) -> None:
    with pytest.raises(UsageError):
        open_storage(location)


def test_a_url_that_went_through_pathlib_is_told_so() -> None:
    with pytest.raises(UsageError, match="'s3://bucket/run'"):
        open_storage(Path("s3://bucket/run"))


def test_storage_options_for_a_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_storage(tmp_path, storage_options={"key": "k"})


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match="Protocol not known"):
        open_storage("nosuch://bucket/run")


def test_a_chained_url_is_refused() -> None:
    with pytest.raises(UsageError, match="chained"):
        open_storage("simplecache::memory://bucket/run")


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [("s3://b/r", "s3fs", "s3"), ("gs://b/r", "gcsfs", "gcs"), ("abfs://b/r", "adlfs", "azure")],
)
def test_a_protocol_without_its_package_names_the_extra(url: str, module: str, extra: str) -> None:
    # In a process of its own: fsspec remembers what it has imported.
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from ckptmgr.errors import UsageError\n"
        "from ckptmgr.storage import open_storage\n"
        f"try: open_storage({url!r})\n"
        "except UsageError as error: print(error.next)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert f"'ckptmgr[{extra}]'" in output


def test_a_local_storage_needs_neither_fsspec_nor_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ckptmgr.storage import open_storage\n"
        "open_storage(sys.argv[1]).write('a', [b'x'])\n"
        "print([name for name in ('fsspec', 'stamina', 'torch', 'asyncio') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
