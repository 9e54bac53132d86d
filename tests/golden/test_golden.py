"""Checkpoints of every format version, written once and committed: they must be readable forever."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_chain import SAMPLES, predict, tokenizer
from golden_state import STEP, golden_state, golden_values
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ckptmgr.golden.compare import compare_golden
from ckptmgr.golden.run import Chain
from ckptmgr.preprocess.handler import PREPROCESSOR
from ckptmgr.preprocess.kinds import build_preprocessor
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.state.capture import capture_state, check_state, restore_state
from ckptmgr.state.read_entries import load_entries
from ckptmgr.storage.local import LocalStorage
from ckptmgr.training_run import load_checkpoint

VERSIONS = sorted(path for path in Path(__file__).parent.glob("v*") if path.is_dir())
DIGESTS = {
    "v1": "d569c0acc45343cea00b7d873ce7ead072d9cef78f26061db1a5df879eb6e256",
    "v2": "5ea9fe9d2e578e8c67f1a6e6a3f443aaff909571668c38ac10ffe33e45d3e5f4",
    "v3": "7b82c3f58af589f771b0c7340d2b7accd6bb59603dd0b1b88c143629067a6144",
}
# Of two ranks: which dimension of a parameter is sharded, and what each rank has for itself.
SHARDED = {"first.weight": 1, "last.weight": 0, "last.bias": 0}
OWN = "own"
# Of version 3: a tokenizer, and golden samples.
CHAIN = ("preprocessor", "ckptmgr_golden")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if one.layout != torch.strided:
            one, other = one.to_dense(), other.to_dense()
        bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_the_committed_files_were_not_touched(root: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() == DIGESTS[root.name]


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_every_version_is_read_as_it_was_written(root: Path) -> None:
    catalog = Catalog(LocalStorage(root))
    latest = catalog.latest()
    assert (latest.step, latest.epoch) == (STEP, 1)
    assert catalog.resolve("best").step == STEP  # by the note that came after the commit
    assert catalog.resolve("pinned").step == STEP
    assert verify_checkpoint(catalog, latest.id) == []

    loaded = load_checkpoint(str(root))
    assert same(loaded.entries["extra"].tree, golden_values())
    assert loaded.entries["extra"].tree["channels_last"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_every_version_is_restored_into_live_objects(root: Path) -> None:
    expected, state = golden_state(), golden_state()
    with torch.no_grad():
        for tensor in state["model"].state_dict().values():
            tensor.zero_()
    state["optimizer"].state.clear()
    state["extra"].clear()
    entries = [entry for entry in load_checkpoint(str(root)).entries.values() if entry.name not in (OWN, *CHAIN)]
    check_state(state, entries)
    restore_state(state, entries)
    assert same(dict(state["model"].state_dict()), dict(expected["model"].state_dict()))
    assert same(state["optimizer"].state_dict(), expected["optimizer"].state_dict())
    assert same(state["scheduler"].state_dict(), expected["scheduler"].state_dict())
    assert same(state["extra"], expected["extra"])
    assert state["model"].tied.weight is state["model"].last.weight


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_the_weights_of_every_version_are_readable_without_ckptmgr(root: Path) -> None:
    folder = root / Catalog(LocalStorage(root)).latest().id.folder
    tensors = load_file(folder / "model.safetensors")
    for other in sorted(folder.glob("model-rank-*.safetensors")):
        for name, tensor in load_file(other).items():
            tensors[name] = torch.cat([tensors[name], tensor], SHARDED[name]) if name in tensors else tensor
    expected = golden_state()["model"].state_dict()
    assert tensors.keys() == expected.keys() - {"tied.weight"}
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_each_rank_gets_back_what_it_had_for_itself() -> None:
    catalog = Catalog(LocalStorage(Path(__file__).parent / "v2"))
    reader = CheckpointReader(catalog.storage, catalog.latest())
    for rank in range(2):
        assert load_entries(reader, [OWN], rank=rank)[OWN].tree == {"rank": rank}
    assert {entry.name: entry.scope for entry in catalog.latest().entries}[OWN] == "per-rank"
    assert {entry.name: entry.scope for entry in catalog.latest().entries}["extra"] == "replicated"


def test_a_tokenizer_of_version_3_is_built_as_it_was_and_its_golden_samples_hold() -> None:
    root = Path(__file__).parent / "v3"
    loaded = load_checkpoint(str(root))
    (record,) = [entry for entry in loaded.manifest.entries if entry.name == PREPROCESSOR]
    assert record.fingerprint == capture_state({PREPROCESSOR: tokenizer()})[0].fingerprint
    built = build_preprocessor(loaded.entries[PREPROCESSOR].tree, lambda name: pytest.fail(f"{name} was imported"))
    assert [built.encode(text).ids for text in SAMPLES] == [tokenizer().encode(text).ids for text in SAMPLES]
    chain = Chain(golden_state()["model"], built, predict=predict)
    assert compare_golden(loaded.entries["ckptmgr_golden"].tree, chain) == []


def test_the_tokenizers_own_file_is_readable_without_ckptmgr() -> None:
    (path, *_) = sorted((Path(__file__).parent / "v3").glob("checkpoints/*/preprocessor.tokenizer.json"))
    assert Tokenizer.from_file(str(path)).encode("To be").tokens == ["to", "be"]
