"""A tool's own file as a value in the state: stored beside the tensors, byte for byte, and digested like them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_state import saved

from ckptmgr import Checkpointer
from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.fork import fork_run
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import EntryRecord
from ckptmgr.format.payload import FilePayload
from ckptmgr.loading import load_checkpoint
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.commit import CheckpointFields, commit_checkpoint
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.reference import parse_reference
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.capture import CapturedEntry
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.read_entries import load_entries
from ckptmgr.state.snapshot import SnapshotBuffers
from ckptmgr.state.stored_file import StoredFile
from ckptmgr.storage.open import open_storage
from ckptmgr.testing.memory import MemoryStorage

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


@pytest.mark.parametrize(
    ("entry", "file", "words"),
    [
        ("a" * 64, StoredFile("b" * 64, b""), "up to 128 characters"),
        ("holder", StoredFile("safetensors", b""), "the tensors of the entry"),
        ("holder", StoredFile("a.json", "text"), "a file is bytes"),  # type: ignore[arg-type]
    ],
)
def test_what_no_save_could_write_is_told_before_the_first_step(
    tmp_path: Path, entry: str, file: StoredFile, words: str
) -> None:
    with pytest.raises(UnsupportedStateError, match=words):
        Checkpointer(tmp_path / "run", {entry: Holder(file)}).resume()
    assert not (tmp_path / "run").exists()


def test_the_longest_names_that_are_taken_can_be_written(tmp_path: Path) -> None:
    longest = StoredFile("b" * 64, CONTENT)
    with Checkpointer(tmp_path, {"a" * 52: Holder(longest)}, every_n_steps=1, background=False) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    assert load_checkpoint(str(tmp_path)).entries["a" * 52].tree["files"] == [longest]


class CountingStorage(MemoryStorage):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def read(self, key: str, *arguments: Any, **options: Any) -> bytes:
        self.reads.append(key)
        return super().read(key, *arguments, **options)


def test_a_file_that_a_tree_refers_to_often_is_read_once() -> None:
    storage = CountingStorage()
    trees = {"holder": [{"$file": ["x", "x.json"]}] * 50}
    payloads = [
        FilePayload("holder.x", content=CONTENT, entry="holder", stored_as="x"),
        FilePayload("state.json", content=json.dumps({"entries": trees}).encode(), is_state=True),
    ]
    records = (EntryRecord(name="holder", handler="stateful", handler_version=1),)
    manifest = commit_checkpoint(
        storage, CheckpointId(1, 1, 0), payloads, CheckpointFields("0" * 16, "asked for", records)
    )
    entries = load_entries(CheckpointReader(storage, manifest))
    assert entries["holder"].tree == [StoredFile("x.json", CONTENT)] * 50
    assert sum(key.endswith("holder.x") for key in storage.reads) == 1


@pytest.mark.parametrize("key", ["nothing", ["x"], {"a": 1}, None, "y" * 10_000])
def test_a_reference_to_no_file_of_the_entry_is_told(key: Any) -> None:
    storage = CountingStorage()
    trees = {"holder": {"$file": [key, "x.json"]}, "other": {}}
    payloads = [
        FilePayload("other.nothing", content=CONTENT, entry="other", stored_as="nothing"),
        FilePayload("state.json", content=json.dumps({"entries": trees}).encode(), is_state=True),
    ]
    records = tuple(EntryRecord(name=name, handler="stateful", handler_version=1) for name in trees)
    manifest = commit_checkpoint(
        storage, CheckpointId(1, 1, 0), payloads, CheckpointFields("0" * 16, "asked for", records)
    )
    with pytest.raises(CorruptCheckpointError) as refusal:
        load_entries(CheckpointReader(storage, manifest))
    assert len(str(refusal.value)) < 1000
    assert not any(read.endswith("other.nothing") for read in storage.reads)
