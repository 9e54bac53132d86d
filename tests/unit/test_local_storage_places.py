"""Where a directory is none, or holds what is no object, or is full, or is not ours."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptmgr.errors import StorageError
from ckptmgr.storage import Entry
from ckptmgr.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


@pytest.fixture
def root(storage: LocalStorage) -> Path:
    path = Path(storage.url)
    path.mkdir()
    return path


@pytest.fixture
def tiny_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command: a really full disk is not tested")
    if mounted.returncode != 0:
        pytest.skip(f"no right to mount: a really full disk is not tested ({mounted.stderr.decode().strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_what_was_there_and_is_named(tiny_filesystem: Path) -> None:
    storage = LocalStorage(tiny_filesystem / "run")
    storage.write("old", [bytes(1 << 19)])
    with pytest.raises(StorageError) as caught:
        storage.write("new", [bytes(1 << 16)] * 32)
    assert caught.value.errno == errno.ENOSPC
    assert "free some space" in str(caught.value.next)
    assert storage.list() == [Entry("old", 1 << 19)]
    assert storage.list_temporary() == []
    storage.write("new", [bytes(1 << 18)])


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """An existing directory that this process may read but not write, whoever runs the tests."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (Path(place) / "run").mkdir(mode=0o555)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield Path(place) / "run"
        finally:
            if was_root:
                os.seteuid(0)


def test_a_directory_without_write_permission_is_named(unwritable: Path) -> None:
    storage = LocalStorage(unwritable)
    assert storage.list() == []
    with pytest.raises(StorageError) as caught:
        storage.write("a", [b"x"])
    assert caught.value.errno == errno.EACCES
    assert "owner" in str(caught.value.next)


@pytest.mark.parametrize("place", ["run", "run/inner", "link"])
def test_a_file_in_place_of_the_root_is_a_storage_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "run").write_text("a file")
    (tmp_path / "link").symlink_to("run")
    storage = LocalStorage(tmp_path / place)
    operations: list[Callable[[], object]] = [
        storage.list,
        storage.list_temporary,
        lambda: storage.read("a"),
        lambda: storage.write("a", [b"x"]),
        lambda: storage.write("a", [b"x"], exclusive=True),
        lambda: storage.delete("a"),
    ]
    for operation in operations:
        with pytest.raises(StorageError) as caught:
            operation()
        assert isinstance(caught.value.__cause__, NotADirectoryError)
        assert caught.value.next
    assert (tmp_path / "run").read_text() == "a file"


def test_a_dangling_link_in_place_of_the_root_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    storage = LocalStorage(tmp_path / "run")
    assert storage.list() == []
    with pytest.raises(StorageError):
        storage.write("a", [b"x"], exclusive=True)


def test_an_object_in_place_of_a_directory_is_a_storage_error(storage: LocalStorage) -> None:
    storage.write("a", [b"x"])
    with pytest.raises(StorageError) as caught:
        storage.write("a/b", [b"x"])
    assert caught.value.errno == errno.ENOTDIR
    with pytest.raises(FileNotFoundError):
        storage.read("a/b")


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    storage = LocalStorage(tmp_path / "run")
    storage.write("a/b", [b"x"])
    assert (tmp_path / "disk/a/b").read_bytes() == b"x"
    assert storage.list() == [Entry("a/b", 1)]


@pytest.mark.parametrize("moved", ["checkpoints", "attempts", "checkpoints/0000000001-000001-000000"])
def test_a_run_that_keeps_its_checkpoints_elsewhere_is_no_empty_run(tmp_path: Path, moved: str) -> None:
    root = tmp_path / "run"
    storage = LocalStorage(root)
    for key in ("attempts/000001/claim.json", "checkpoints/0000000001-000001-000000/manifest.json"):
        storage.write(key, [b"x"])
    (root / moved).rename(tmp_path / "scratch")
    (root / moved).symlink_to(tmp_path / "scratch")
    with pytest.raises(StorageError, match=f"{moved} is a symbolic link"):
        LocalStorage(root).list()


def test_links_below_the_root_are_neither_listed_nor_followed(
    storage: LocalStorage, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("secret")
    (root / "file").symlink_to(tmp_path / "secret/file")
    (root / "folder").symlink_to(tmp_path / "secret")
    assert storage.list() == []
    for key in ("file", "folder/file"):
        with pytest.raises(StorageError, match="symbolic link"):
            storage.read(key)
        with pytest.raises(StorageError, match="symbolic link"):
            storage.readinto(key, memoryview(bytearray(1)))
    for operation in (lambda: storage.write("folder/new", [b"x"]), lambda: storage.delete("folder/file")):
        with pytest.raises(StorageError) as caught:
            operation()
        assert caught.value.errno == errno.ELOOP
    with pytest.raises(StorageError):
        storage.list("folder/")
    assert [path.name for path in (tmp_path / "secret").iterdir()] == ["file"]


def test_pipes_and_sockets_are_refused_and_do_not_hang(storage: LocalStorage, root: Path) -> None:
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(root, os.O_RDONLY)
        try:
            # The path of a socket may have 107 bytes only.
            listener.bind(f"/proc/self/fd/{here}/socket")
        finally:
            os.close(here)
        assert storage.list() == []
        for key in ("pipe", "socket"):
            with pytest.raises(StorageError):
                storage.read(key)


def test_foreign_files_are_not_objects(storage: LocalStorage, root: Path) -> None:
    for name in (".DS_Store", "notes.txt~", "a b", "\udcff"):
        (root / name).write_text("x")
    storage.write("a", [b"x"])
    assert storage.list() == [Entry("a", 1)]
