"""Weights without a run around them: files of the real library, directories as models are shared, and hostile ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diff_samples import Training, save_state
from safetensors.torch import save_file

from ckptmgr.cli.main import run
from ckptmgr.diff import compare
from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, StorageError, UsageError

Output = pytest.CaptureFixture[str]

WEIGHTS = {"fc.weight": torch.arange(12.0).view(3, 4), "fc.bias": torch.ones(3, dtype=torch.bfloat16)}


def changed(**values: torch.Tensor) -> dict[str, torch.Tensor]:
    return WEIGHTS | {name.replace("_", "."): value for name, value in values.items()}


def directory_of(folder: Path, *files: dict[str, torch.Tensor], index: dict[str, str] | None = None) -> Path:
    """Make a model's directory with several files and the index that names them."""
    folder.mkdir()
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name)
    found = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    document = {"metadata": {"total_size": 1}, "weight_map": found if index is None else index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return folder


def test_two_files_are_compared(tmp_path: Path, capsys: Output) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    save_file(changed(fc_bias=torch.tensor([1, 1.5, 1]).bfloat16()), tmp_path / "b.safetensors")
    (tensor,) = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").changed
    assert tensor.path == "weights/fc.bias"
    assert tensor.measured is not None
    assert (tensor.measured.max_abs, tensor.measured.ndifferent) == (0.5, 1)
    assert run(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--exit-code"]) == 1
    assert "bfloat16 [3]" in capsys.readouterr().out
    assert run(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors"), "--exit-code"]) == 0


def test_a_directory_in_several_files_is_the_whole_model(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    save_file(WEIGHTS, tmp_path / "one" / "model.safetensors")
    halves = [{name: tensor} for name, tensor in WEIGHTS.items()]
    directory_of(tmp_path / "two", *halves)
    diff = compare(tmp_path / "one", tmp_path / "two")
    assert {tensor.verdict for tensor in diff.tensors} == {"equal"}
    assert len(diff.tensors) == 2
    assert compare(tmp_path / "two" / "model.safetensors.index.json", tmp_path / "one").is_same


def test_a_run_is_compared_with_weights_that_were_taken_out_of_it(tmp_path: Path, capsys: Output) -> None:
    training = Training()
    run_dir = save_state(tmp_path / "run", {"first": torch.nn.Linear(2, 2), **training.state})
    exported = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    exported["0.bias"][2] += 0.5
    save_file(exported, tmp_path / "model.safetensors")
    for arguments in ((run_dir, tmp_path / "model.safetensors"), (tmp_path / "model.safetensors", run_dir)):
        diff = compare(*arguments)
        (tensor,) = diff.changed
        assert tensor.path == "model/0.bias"
        assert tensor.measured is not None
        assert tensor.measured.max_abs == pytest.approx(0.5)
        assert len(diff.tensors) == len(exported)
        assert any("'model'" in note for note in diff.notes)
        assert (diff.facts, diff.values, diff.entries) == ((), (), ())
    assert run(["diff", run_dir, str(tmp_path / "model.safetensors"), "--only", "model/0.*", "--exit-code"]) == 1
    assert "weights alone" in capsys.readouterr().err


def test_a_file_of_a_checkpoint_is_weights_as_well(tmp_path: Path) -> None:
    run_dir = save_state(tmp_path / "run", Training().state)
    (path,) = Path(run_dir).glob("checkpoints/*/model.safetensors")
    assert compare(run_dir, path).is_same


def test_weights_without_digests_are_not_compared_unless_they_are_read(tmp_path: Path, capsys: Output) -> None:
    for name in ("a", "b"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    assert run(["diff", *paths, "--no-weights"]) == 0
    assert "2 of the same form, not compared" in capsys.readouterr().out


def test_one_file_alone_has_nothing_before_it(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(tmp_path / "a.safetensors")


def test_dtypes_that_are_packed_or_unknown_to_torch_are_compared_by_bits(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4, 3], "data_offsets": [0, 9]}}).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
        return tmp_path / name

    a, same, other = (
        write(name, data) for name, data in (("a.safetensors", bytes(9)), ("b.safetensors", bytes(9)),
                                             ("c.safetensors", bytes(8) + b"\1"))
    )  # fmt: skip
    assert compare(a, same).tensors[0].verdict == "equal bits"
    (tensor,) = compare(a, other).changed
    assert (tensor.verdict, tensor.measured is not None and tensor.measured.max_abs) == ("different", None)


# Hostile ones


def test_links_are_not_followed_out_of_a_directory(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(StorageError, match="symbolic link"):
        compare(tmp_path / "one", tmp_path / "secret.safetensors")
    folder = directory_of(tmp_path / "two", WEIGHTS)
    (folder / "model-00001-of-00001.safetensors").unlink()
    (folder / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(StorageError, match="symbolic link"):
        compare(folder, folder)
    # What a user names by itself may be a link, as a run may.
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert compare(tmp_path / "link.safetensors", tmp_path / "secret.safetensors").is_same
    (tmp_path / "three").symlink_to(directory_of(tmp_path / "real", WEIGHTS))
    assert compare(tmp_path / "three", tmp_path / "secret.safetensors").is_same


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..\\s.safetensors", "model.bin", "",
     "a\0.safetensors", "\x1b[2J.safetensors"],
)  # fmt: skip
def test_an_index_names_files_of_its_own_directory_alone(tmp_path: Path, name: str) -> None:
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    folder = directory_of(tmp_path / "model", WEIGHTS, index=dict.fromkeys(WEIGHTS, name))
    with pytest.raises(CorruptCheckpointError, match="same directory"):
        compare(folder, folder)


def test_an_index_that_disagrees_with_its_files_is_damage(tmp_path: Path) -> None:
    halves = [{name: tensor} for name, tensor in WEIGHTS.items()]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    lies: dict[str, Any] = {
        "lost": {"fc.weight": first, "fc.bias": second, "other": second},
        "swapped": {"fc.weight": second, "fc.bias": first},
        "missing": {"fc.weight": first, "fc.bias": "gone.safetensors"},
    }
    for name, index in lies.items():
        folder = directory_of(tmp_path / name, *halves, index=index)
        assert run(["diff", str(folder), str(folder)]) == 12
    twice = directory_of(tmp_path / "twice", WEIGHTS, WEIGHTS, index={"fc.weight": first, "fc.bias": second})
    with pytest.raises(CorruptCheckpointError, match="stands in"):
        compare(twice, twice)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"[" * 100_000, b"\xff\xfe", b"{}"]
)
def test_an_index_that_is_none_is_damage(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CorruptCheckpointError):
        compare(tmp_path, tmp_path)


def test_a_damaged_file_exits_with_12_whatever_it_claims(tmp_path: Path, capsys: Output) -> None:
    good = tmp_path / "good.safetensors"
    save_file(WEIGHTS, good)
    lies = {
        "elements": json.dumps({"a": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}).encode(),
        "overlap": json.dumps({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}).encode(),
        "nested": b'{"a":' + b"[" * 100_000,
    }
    for name, header in lies.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        for arguments in ([path, good], [good, path]):
            assert run(["diff", *map(str, arguments)]) == 12
            assert path.name in capsys.readouterr().err
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-1])
    assert run(["diff", str(good), str(tmp_path / "short.safetensors")]) == 12


def test_a_pipe_or_a_directory_under_the_name_of_a_file_hangs_nobody(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(WEIGHTS, good)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(StorageError):
        compare(good, tmp_path / "pipe.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").mkdir()
    with pytest.raises(StorageError):
        compare(good, tmp_path / "folder")


def test_what_is_neither_a_run_nor_safetensors_is_not_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"x": Bomb()}, tmp_path / "model.pt")
    shutil.copy(tmp_path / "model.pt", tmp_path / "disguised.safetensors")
    for name in ("model.pt", "disguised.safetensors"):
        with pytest.raises(CkptmgrError):
            compare(tmp_path / name, tmp_path / name)
    assert not (tmp_path / "executed").exists()


# Memory

MEASURE = """
import pathlib, sys
from ckptmgr.diff import compare

def peak():
    # Not getrusage: a process that was forked begins with the peak of the one that forked it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

small, *pair = sys.argv[1:]
compare(small, small, read=True)
before = peak()
diff = compare(*pair, read=True)
(tensor,) = [one for one in diff.tensors if one.name.endswith("big")]
assert tensor.measured.ndifferent == 1, tensor
assert "torch" not in sys.modules
print(peak() - before)
"""


def peak_mib(*arguments: object) -> int:
    """Return by how much the memory of a process grows while it compares, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, arguments)],
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    return int(done.stdout)


def test_large_checkpoints_are_compared_block_by_block(tmp_path: Path) -> None:
    # What is widened for arithmetic is four times as large.
    big = torch.zeros(100 << 20, dtype=torch.bfloat16)
    runs = []
    for name in ("a", "b"):
        runs.append(save_state(tmp_path / name, {"extra": {"big": big}}))
        big[-1] = 1
    save_file({"x": torch.ones(3)}, tmp_path / "small.safetensors")
    # Of 200 MiB on each side.
    assert peak_mib(tmp_path / "small.safetensors", *runs) < 80
    files = [next(Path(run_dir).glob("checkpoints/*/extra.safetensors")) for run_dir in runs]
    assert peak_mib(tmp_path / "small.safetensors", *files) < 40
