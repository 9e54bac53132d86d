"""Import of ``torch.save`` files and of safetensors: what is in them comes over, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_samples import Tied, same_tensors
from safetensors.torch import save_file, save_model
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.cli.main import run
from ckptmgr.errors import (
    CkptmgrError,
    CorruptCheckpointError,
    NotAllowedError,
    StateMismatchError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.interop import pickled
from ckptmgr.interop.import_run import import_run


class Config:
    """An object of a user's own."""

    def __init__(self, width: int = 3) -> None:
        self.width = width


class RunsACommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(1)
    return Tied()


def restored(run_dir: Path, root: Path) -> Tied:
    other = Tied()
    with Checkpointer(root / "next", state={"model": other}) as checkpointer:
        checkpointer.restore(str(run_dir))
    return other


def refused(path: Path, root: Path, kind: type[CkptmgrError], match: str, **options: Any) -> CkptmgrError:
    """Import what must be refused; nothing may be left of it."""
    with pytest.raises(kind, match=match) as caught:
        import_run(str(path), str(root / "run"), **options)
    assert not (root / "run").exists()
    return caught.value


def test_a_state_dict_is_restored_by_a_checkpointer(tmp_path: Path, model: Tied) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    told = import_run(str(tmp_path / "model.pt"), str(tmp_path / "run"))
    assert told.entries == ("model",)
    other = restored(tmp_path / "run", tmp_path)
    assert same_tensors(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight


def test_a_checkpointer_in_the_imported_run_itself_says_what_to_do(tmp_path: Path, model: Tied) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    import_run(str(tmp_path / "model.pt"), str(tmp_path / "run"))
    checkpointer = Checkpointer(tmp_path / "run", state={"model": Tied()})
    with pytest.raises(StateMismatchError, match="restore"):
        checkpointer.resume()


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        sum(p.float().pow(2).sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_dict_of_a_training_script_gives_model_optimizer_and_step(tmp_path: Path, model: Tied) -> None:
    optimizer = trained(model)
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3, "epoch": 1, "args": {"lr": 0.01}}
    torch.save(saved, tmp_path / "train.pt")
    told = import_run(str(tmp_path / "train.pt"), str(tmp_path / "run"))
    assert (told.step, told.entries) == (3, ("model", "optimizer"))
    assert "model: the state dict at 'model', the only one" in told.notes
    assert "not taken: args" in told.notes
    other = Tied()
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    with Checkpointer(tmp_path / "next", state={"model": other, "optimizer": again}) as checkpointer:
        assert checkpointer.restore(str(tmp_path / "run")) == 3
    assert again.param_groups[0]["lr"] == 1e-2
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same_tensors(optimizer.state[one], again.state[two])


def test_a_key_chooses_among_several_and_a_wrong_one_names_them(tmp_path: Path, model: Tied) -> None:
    average = Tied()
    torch.save({"net": model.state_dict(), "ema": {"net": average.state_dict()}}, tmp_path / "two.pt")
    error = refused(tmp_path / "two.pt", tmp_path, UsageError, "2 state dicts")
    assert "'net', 'ema.net'" in str(error)
    refused(tmp_path / "two.pt", tmp_path, UsageError, "no state dict at 'modell'", key="modell")
    import_run(str(tmp_path / "two.pt"), str(tmp_path / "run"), key="ema.net")
    assert same_tensors(restored(tmp_path / "run", tmp_path).state_dict(), average.state_dict())


def test_a_pickled_object_needs_its_class_by_name_and_loads_with_it(tmp_path: Path, model: Tied) -> None:
    torch.save({"state_dict": model.state_dict(), "config": Config()}, tmp_path / "with.pt")
    name = f"{Config.__module__}.Config"
    error = refused(tmp_path / "with.pt", tmp_path, NotAllowedError, "more than tensors")
    assert f"--allow {name}" in str(error)
    import_run(str(tmp_path / "with.pt"), str(tmp_path / "run"), allow=[name])
    assert same_tensors(restored(tmp_path / "run", tmp_path).state_dict(), model.state_dict())


def test_a_whole_module_is_imported_and_every_class_that_it_needs_is_listed(tmp_path: Path, model: Tied) -> None:
    torch.save(model, tmp_path / "module.pt")
    told = import_run(str(tmp_path / "module.pt"), str(tmp_path / "run"))
    for name in ("interop_samples.Tied", "torch.nn.modules.sparse.Embedding", "torch.nn.modules.batchnorm.BatchNorm1d"):
        assert name in str(told.notes)
    assert same_tensors(restored(tmp_path / "run", tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_would_run_a_command_is_refused_even_if_it_is_allowed(tmp_path: Path, is_zip: bool) -> None:
    witness = tmp_path / "witness"
    value = {"state_dict": {"a": torch.ones(1)}, "x": RunsACommand(f"touch {witness}")}
    torch.save(value, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
    refused(tmp_path / "evil.pt", tmp_path, NotAllowedError, "system")
    for name in ("os.system", "posix.system"):
        refused(tmp_path / "evil.pt", tmp_path, NotAllowedError, "refused", allow=[name])
    assert not witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "builtins.eval",
        "functools.partial",
        "torch.hub.load",
        "runpy.run_path",
        "importlib.import_module",
        "ckptmgr.interop.pickled.pickle",
        "ckptmgr.interop.pickled.os",
        f"{__name__}.restored",
        f"{__name__}.os.system",
        "json.loads",
        "code.InteractiveInterpreter",
    ],
)
def test_what_could_run_code_cannot_be_allowed(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", tmp_path, CkptmgrError, "--allow", allow=[name])


def test_numpy_values_can_be_allowed_as_they_are_listed(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    value = {"model": {"a": torch.ones(1)}, "score": np.float64(0.5), "history": np.arange(3)}
    torch.save(value, tmp_path / "np.pt")
    error = refused(tmp_path / "np.pt", tmp_path, NotAllowedError, "numpy")
    names = [word for word in str(error).replace(";", " ").split() if word.startswith("numpy") and word[-1] != ","]
    assert names
    assert import_run(str(tmp_path / "np.pt"), str(tmp_path / "run"), allow=names).entries == ("model",)


def test_an_old_pickle_of_torch_is_read_restricted_too(tmp_path: Path, model: Tied) -> None:
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    import_run(str(tmp_path / "old.pt"), str(tmp_path / "run"))
    assert same_tensors(restored(tmp_path / "run", tmp_path).state_dict(), model.state_dict())


def test_dtypes_and_layouts_come_back_as_they_are(tmp_path: Path) -> None:
    state = {
        "double": torch.rand(3, dtype=torch.float64),
        "complex": torch.rand(3, dtype=torch.complex128),
        "eight": torch.rand(4).to(torch.float8_e5m2),
        "sparse": torch.eye(3).to_sparse(),
        "flag": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(3),
        "columns": torch.arange(6.0).reshape(2, 3).t(),
        "net._extra_state": {"seen": 3},
    }
    torch.save(state, tmp_path / "odd.pt")
    import_run(str(tmp_path / "odd.pt"), str(tmp_path / "run"))
    # torch.load of a state dict's export must give the same again.
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert back["net._extra_state"] == {"seen": 3}
    for name in ("double", "complex", "flag", "nothing", "scalar", "columns"):
        assert back[name].dtype == state[name].dtype
        assert torch.equal(back[name], state[name])
    assert torch.equal(back["eight"].view(torch.uint8), state["eight"].view(torch.uint8))
    assert torch.equal(back["sparse"].to_dense(), torch.eye(3))


def test_quantized_and_meta_tensors_are_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # torch says that this is deprecated; files of it remain.
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for name, tensor in (("q", quantized), ("m", torch.ones(2, device="meta"))):
        torch.save({name: tensor, "ok": torch.ones(1)}, tmp_path / "m.pt")
        error = refused(tmp_path / "m.pt", tmp_path, UnsupportedStateError, "cannot be stored")
        assert f"model/tensors/{name}" in str(error)


def test_a_file_saved_on_a_gpu_is_read_without_one(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "cpu.pt")
    with zipfile.ZipFile(tmp_path / "cpu.pt") as old, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(b"X\x03\x00\x00\x00cpu") == 1
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
            new.writestr(entry.filename, data)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "gpu.pt", weights_only=True)
    import_run(str(tmp_path / "gpu.pt"), str(tmp_path / "run"))
    live = nn.Module()
    live.register_buffer("a", torch.zeros(4))
    with Checkpointer(tmp_path / "next", state={"model": live}) as checkpointer:
        checkpointer.restore(str(tmp_path / "run"))
    assert torch.equal(live.a, torch.arange(4.0))


def test_a_model_tied_by_save_model_is_tied_again(tmp_path: Path, model: Tied) -> None:
    save_model(model, str(tmp_path / "tied.safetensors"))
    import_run(str(tmp_path / "tied.safetensors"), str(tmp_path / "run"))
    other = restored(tmp_path / "run", tmp_path)
    assert same_tensors(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight


@pytest.mark.parametrize("size", [None, "120B"])
def test_an_export_of_safetensors_is_imported_again(tmp_path: Path, model: Tied, size: str | None) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    import_run(str(tmp_path / "model.pt"), str(tmp_path / "first"))
    options = [] if size is None else ["--max-shard-size", size]
    assert run(["export", str(tmp_path / "first"), str(tmp_path / "out"), *options]) == 0
    import_run(str(tmp_path / "out"), str(tmp_path / "run"))
    other = restored(tmp_path / "run", tmp_path)
    assert same_tensors(other.state_dict(), model.state_dict())


# Damage


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.002, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["m.pt", "old.pt", "m.safetensors"])
def test_a_file_that_is_cut_off_is_told_to_be_damaged(tmp_path: Path, name: str, keep: float) -> None:
    state = {f"layer.{i}": torch.rand(50) for i in range(20)}
    if name == "m.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "m.pt")
    cut(tmp_path / name, keep)
    with pytest.raises((CorruptCheckpointError, UsageError)) as caught:
        import_run(str(tmp_path / name), str(tmp_path / "run"))
    assert caught.value.next
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\n\n<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"GGUF\x03\x00\x00\x00" + bytes(50), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"just some text, nothing else", "nothing that can be imported"),
        (pickle.dumps({"a": 1}, protocol=4), "a pickle that torch.save has not written"),
        (b"\xff" * 200, "nothing that can be imported"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b"x" * 40, "cannot be read as safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", tmp_path, CkptmgrError, said)


def test_other_sources_that_make_no_sense(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path, CkptmgrError, "nothing to import")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, UsageError, "no directory that can be imported")
    with pytest.raises(UsageError, match=r"s3://bucket/m\.pt is a URL"):
        import_run("s3://key:secret@bucket/m.pt?token=1", str(tmp_path / "run"))
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", tmp_path, UsageError, "no state dict")
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="names a checkpoint"):
        import_run(str(tmp_path / "m.pt"), f"{tmp_path / 'run'}@3")
    import_run(str(tmp_path / "m.pt"), str(tmp_path / "run"))
    with pytest.raises(UsageError, match="a run of ckptmgr already"):
        import_run(str(tmp_path / "run"), str(tmp_path / "other"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", tmp_path, UsageError, "no regular file")


def test_a_run_or_anything_else_that_is_there_is_left_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    import_run(str(tmp_path / "m.pt"), str(tmp_path / "run"))
    with pytest.raises(UsageError, match="1 checkpoints"):
        import_run(str(tmp_path / "m.pt"), str(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".hidden").touch()
    with pytest.raises(UsageError, match=r"it holds \.hidden"):
        import_run(str(tmp_path / "m.pt"), str(tmp_path / "other"))


# What is made to hurt


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({"a": b"\0" * 50_000_000}, protocol=2))
        archive.writestr("bomb/version", "3\n")
    refused(tmp_path / "bomb.pt", tmp_path, CorruptCheckpointError, "cannot be read")


def test_lists_within_lists_that_grow_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MAX_NODES", 10_000)
    grown: Any = ["x"] * 10
    for _ in range(9):
        grown = [grown] * 10
    torch.save({"model": {"a": torch.ones(1)}, "x": grown}, tmp_path / "laugh.pt")
    assert (tmp_path / "laugh.pt").stat().st_size < 3000
    refused(tmp_path / "laugh.pt", tmp_path, CorruptCheckpointError, "cannot be read")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 28)}, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", tmp_path, CorruptCheckpointError, "cannot be read")


def sharded(root: Path, **changes: str) -> Path:
    folder = root / "sharded"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", **changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../outside.safetensors"])
def test_an_index_that_leads_out_of_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"b": torch.zeros(2)}, tmp_path / "outside.safetensors")
    refused(sharded(tmp_path, b=name), tmp_path, UsageError, "leads out of the directory")


def test_a_link_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shutil.move(folder / "model-00002-of-00002.safetensors", tmp_path / "outside.safetensors")
    (folder / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "outside.safetensors")
    refused(folder, tmp_path, UsageError, "a link that leads out")


def test_a_shard_that_did_not_travel_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, tmp_path, CorruptCheckpointError, "'model-00002-of-00002.safetensors' is missing")


def test_shards_that_contradict_their_index_are_refused(tmp_path: Path) -> None:
    error = refused(sharded(tmp_path, c="model-00001-of-00002.safetensors"), tmp_path, CorruptCheckpointError, "index")
    assert "'c' is in none of the shards" in str(error)
    shutil.rmtree(tmp_path / "sharded")
    folder = sharded(tmp_path)
    save_file({"b": torch.zeros(2), "a": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    assert "'a'" in str(refused(folder, tmp_path, CorruptCheckpointError, "contradict"))


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": []}', "{}"])
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, tmp_path, CorruptCheckpointError, "index|JSON|json|parse|read")


def test_an_import_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    torch.save({"a": torch.rand(100_000)}, tmp_path / "m.pt")
    code = (
        "import resource, sys\nfrom ckptmgr.cli.main import run\nimport ckptmgr.interop.import_run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.exit(run(['import', {str(tmp_path / 'm.pt')!r}, {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "StorageError [storage]" in done.stderr
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()] if (tmp_path / "run").exists() else []
    assert left == []
    assert run(["import", str(tmp_path / "m.pt"), str(tmp_path / "run")]) == 0
