"""A tool's own file as a value in the state: stored beside the tensors, byte for byte, and digested like them."""

from pathlib import Path

import pytest
import torch
from saved_state import saved

from ckptmgr import Checkpointer
from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.fork import fork_run
from ckptmgr.loading import load_checkpoint
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reference import parse_reference
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.capture import CapturedEntry
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.snapshot import SnapshotBuffers
from ckptmgr.state.stored_file import StoredFile
from ckptmgr.storage.open import open_storage

CONTENT = b'{"model": "\xff"}\n'


class Holder:
    """Something whose state is a file."""

    def __init__(self, *files: StoredFile) -> None:
        self.files = list(files)

    def state_dict(self) -> dict[str, object]:
        return {"files": self.files, "scale": torch.ones(2)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.files = state["files"]  # type: ignore[assignment]


def save(run_dir: Path, *files: StoredFile, step: int = 1) -> None:
    with Checkpointer(run_dir, {"holder": Holder(*files)}, every_n_steps=1, background=False) as ckpt:
        ckpt.resume()
        ckpt.step(step)


def test_a_file_comes_back_as_it_was() -> None:
    files = [StoredFile("a.json", CONTENT), StoredFile("b.model", b"")]
    entry = saved({"holder": Holder(*files)})["holder"]
    assert entry.tree["files"] == files


def test_it_lies_in_the_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    save(tmp_path, StoredFile("tokenizer.json", CONTENT))
    (path,) = (tmp_path / "checkpoints").glob("*/holder.tokenizer.json")
    assert path.read_bytes() == CONTENT
    manifest = Catalog(open_storage(str(tmp_path))).latest()
    assert manifest.version == 3
    assert [(f.entry, f.name) for f in manifest.files if f.entry] == [("holder", "tokenizer.json")]


def test_two_files_of_one_name_do_not_become_one(tmp_path: Path) -> None:
    save(tmp_path, StoredFile("vocab.txt", b"one"), StoredFile("vocab.txt", b"two"))
    tree = load_checkpoint(str(tmp_path)).entries["holder"].tree
    assert [file.content for file in tree["files"]] == [b"one", b"two"]
    assert [file.name for file in tree["files"]] == ["vocab.txt", "vocab.txt"]


def test_a_checkpoint_without_such_files_keeps_its_version(tmp_path: Path) -> None:
    save(tmp_path)
    assert Catalog(open_storage(str(tmp_path))).latest().version == 1


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, StoredFile("tokenizer.json", CONTENT))
    (path,) = (tmp_path / "checkpoints").glob("*/holder.tokenizer.json")
    path.unlink() if damage == "missing" else path.write_bytes(CONTENT[::-1])
    catalog = Catalog(open_storage(str(tmp_path)))
    (found,) = verify_checkpoint(catalog, catalog.committed[0])
    assert found.path.endswith("holder.tokenizer.json")
    with pytest.raises(CorruptCheckpointError, match=r"holder\.tokenizer\.json"):
        load_checkpoint(f"{tmp_path}@1")


def test_a_fork_has_its_own_copy(tmp_path: Path) -> None:
    save(tmp_path / "one", StoredFile("vocab.txt", CONTENT), StoredFile("vocab.txt", b"2"))
    fork_run(parse_reference(f"{tmp_path}/one@1"), str(tmp_path / "two"))
    tree = load_checkpoint(str(tmp_path / "two")).entries["holder"].tree
    assert [file.content for file in tree["files"]] == [CONTENT, b"2"]


@pytest.mark.parametrize("name", ["../escape", ".hidden", "a/b", "", "x" * 65, "a\0b", "ä"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedStateError, match="cannot be stored"):
        EntryEncoder(CapturedEntry("holder", "stateful", 1, {"file": StoredFile(name, b"")}))


def test_a_file_that_would_take_the_place_of_the_tensors_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match=r"holder\.safetensors"):
        SnapshotBuffers().snapshot(
            [CapturedEntry("holder", "stateful", 1, {"t": torch.ones(1), "file": StoredFile("safetensors", b"")})]
        )
