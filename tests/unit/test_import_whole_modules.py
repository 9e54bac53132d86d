"""Import of whole pickled modules, and of files that name classes: their tensors come over, and nothing runs."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
from interop_samples import Tied, same_tensors
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.cli.main import run
from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, NotAllowedError, UnsupportedStateError, UsageError
from ckptmgr.interop.import_run import ImportedRun, import_run

NETS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = 3
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[1]
        self.half = nn.Linear(3, 3, dtype=torch.float16)
        self.brain = nn.Linear(3, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.blocks[0].lin.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_parameter("absent", None)
        self.register_buffer("ids", torch.arange(4).expand(5, 4))
        self.register_buffer("columns", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("strided", torch.arange(10.0)[1::3])
        self.register_buffer("conjugate", torch.tensor([1 + 2j, 3 - 4j]).conj())
        self.register_buffer("negative", torch.tensor([1 + 2j, 3 - 4j]).conj().imag)
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("transient", torch.ones(3), persistent=False)
"""
SAVE = """
import pickle, sys, torch
torch.manual_seed(1)
net = Net()
torch.save(net.state_dict(), "state.pt")
torch.save(net, "torch-zip.pt")
torch.save(net, "torch-legacy.pt", _use_new_zipfile_serialization=False)
open("pickle.pt", "wb").write(pickle.dumps(net))
"""
CONTAINERS = ("torch-zip", "torch-legacy", "pickle")


def script(folder: Path, text: str) -> None:
    (folder / "script.py").write_text(text)
    subprocess.run([sys.executable, "script.py"], cwd=folder, check=True)


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of a module whose classes are nowhere any more."""
    folder = tmp_path_factory.mktemp("gone")
    (folder / "gone_nets.py").write_text(NETS)
    script(folder, "from gone_nets import Net\n" + SAVE)
    (folder / "gone_nets.py").unlink()
    return folder


def imported(path: Path, root: Path, **options: Any) -> tuple[ImportedRun, dict[str, torch.Tensor]]:
    """Import a file, and return what was told and the tensors of the run."""
    told = import_run(str(path), str(root / "run"), **options)
    assert run(["export", str(root / "run"), str(root / "out.pt"), "--format", "state-dict", "--quiet"]) == 0
    return told, torch.load(root / "out.pt", weights_only=True)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_tensors_of_a_module_whose_class_is_gone_are_those_of_its_state_dict(
    gone: Path, tmp_path: Path, container: str
) -> None:
    with pytest.raises(ModuleNotFoundError):
        pickle.loads((gone / "pickle.pt").read_bytes())
    told, found = imported(gone / f"{container}.pt", tmp_path)
    expected = torch.load(gone / "state.pt", weights_only=True)
    assert_same(found, expected)
    assert "transient" not in found
    assert told.entries == ("model",)
    assert told.what == "a whole pickled torch.nn.Module"
    for one, other in (("head.weight", "blocks.0.lin.weight"), ("again.lin.bias", "blocks.1.lin.bias")):
        assert found[one].data_ptr() == found[other].data_ptr(), "they were tied"


def test_the_classes_are_named_with_where_they_were_looked_for(gone: Path, tmp_path: Path) -> None:
    told, _ = imported(gone / "torch-zip.pt", tmp_path)
    notes = "\n".join(told.notes)
    assert "the module is of class gone_nets.Net (gone_nets is not importable here)" in notes
    assert "gone_nets.Block (gone_nets is not importable here)" in notes
    assert "torch.nn.modules.batchnorm.BatchNorm1d (found in torch/nn/modules/batchnorm.py)" in notes
    assert "gone_nets" not in sys.modules


def test_a_class_that_was_defined_in_a_script_is_not_needed(tmp_path: Path) -> None:
    script(tmp_path, NETS + SAVE)
    told, found = imported(tmp_path / "torch-zip.pt", tmp_path)
    assert_same(found, torch.load(tmp_path / "state.pt", weights_only=True))
    assert any("__main__.Net (it was defined in the script" in note for note in told.notes)


def test_a_live_module_is_restored_from_a_whole_one_with_its_statistics(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Tied()
    model.norm(torch.rand(8, 4))
    torch.save(model, tmp_path / "whole.pt")
    import_run(str(tmp_path / "whole.pt"), str(tmp_path / "run"))
    other = Tied()
    with Checkpointer(tmp_path / "next", state={"model": other}) as checkpointer:
        checkpointer.restore(str(tmp_path / "run"))
    assert same_tensors(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight


def test_a_module_beside_its_optimizer_gives_both(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sum(p.float().pow(2).sum() for p in model.parameters()).backward()
    optimizer.step()
    torch.save({"net": model, "optim": optimizer.state_dict(), "step": 5, "epoch": 2}, tmp_path / "train.pt")
    told = import_run(str(tmp_path / "train.pt"), str(tmp_path / "run"))
    assert (told.step, told.entries) == (5, ("model", "optimizer"))
    assert any("are likely, not certain" in note for note in told.notes)
    other = Tied()
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    with Checkpointer(tmp_path / "next", state={"model": other, "optimizer": again}) as checkpointer:
        assert checkpointer.restore(str(tmp_path / "run")) == 5
    assert again.param_groups[0]["lr"] == 1e-2
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert same_tensors(optimizer.state[one], again.state[two])


def test_a_model_with_arguments_names_the_optimizer_of_a_whole_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sized_nets.py").write_text(
        "from torch import nn\nprint('importing')\ndef build(width): return nn.Sequential(nn.Linear(2, width))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Sequential(nn.Linear(2, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, "train.pt")
    line = ["import", "train.pt", "run", "--model", "sized_nets:build", "--json"]
    assert run([*line, "--model-arg", "width=4"]) == 1
    assert run(line) == 2
    assert run(["import", "train.pt", "run", "--model-arg", "width=5"]) == 2
    capsys.readouterr()
    assert run([*line, "--model-arg", "width=5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not any("likely" in note or "by position" in note for note in told["notes"])


def test_a_wrapper_known_by_its_type_is_taken_off(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save(nn.DataParallel(model), tmp_path / "parallel.pt")
    _, found = imported(tmp_path / "parallel.pt", tmp_path)
    assert_same(found, model.state_dict())


def test_a_compiled_module_gives_the_tensors_of_the_one_that_was_compiled(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import torch\nmodel = torch.nn.Linear(2, 2)\ntorch.save(model.state_dict(), 'state.pt')\n"
        "torch.save(torch.compile(model), 'compiled.pt')\n",
    )
    _, found = imported(tmp_path / "compiled.pt", tmp_path)
    assert_same(found, torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_traced_module_gives_its_tensors_and_its_code_is_not_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    torch.save(torch.fx.symbolic_trace(model), tmp_path / "traced.pt")
    told, found = imported(tmp_path / "traced.pt", tmp_path)
    assert_same(found, model.state_dict())
    assert any("would run torch.fx.graph_module.reduce_graph_module" in note for note in told.notes)


def test_a_pickled_object_of_any_class_gives_the_module_in_it(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    (tmp_path / "fitted.pkl").write_bytes(pickle.dumps(argparse.Namespace(model=model, classes=["a", "b"])))
    with pytest.raises(NotAllowedError, match="--weights-only"):
        import_run(str(tmp_path / "fitted.pkl"), str(tmp_path / "run"))
    _, found = imported(tmp_path / "fitted.pkl", tmp_path, weights_only=True)
    assert_same(found, model.state_dict())


def test_a_key_chooses_among_several_modules(tmp_path: Path) -> None:
    models = {"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)}
    torch.save(models, tmp_path / "two.pt")
    with pytest.raises(UsageError, match="2 state dicts"):
        import_run(str(tmp_path / "two.pt"), str(tmp_path / "run"))
    _, found = imported(tmp_path / "two.pt", tmp_path, key="teacher")
    assert_same(found, models["teacher"].state_dict())


# Files that name classes beside their state dict


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_only_reads_a_state_dict_beside_objects_of_any_class(tmp_path: Path, container: str) -> None:
    model = Tied()
    value = {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1), "global_step": 9}
    path = tmp_path / "with.pt"
    if container == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=container == "torch-zip")
    with pytest.raises(NotAllowedError, match=r"argparse\.Namespace") as caught:
        import_run(str(path), str(tmp_path / "run"))
    assert "--weights-only" in str(caught.value.next)
    told, found = imported(path, tmp_path, weights_only=True)
    assert told.step == 9
    assert same_tensors(found, model.state_dict())


def test_weights_only_reads_a_lightning_checkpoint_with_hyper_parameters_of_a_class_that_is_gone(
    gone: Path, tmp_path: Path
) -> None:
    (tmp_path / "gone_configs.py").write_text("class Config:\n    width = 3\n")
    text = (
        "import torch\nfrom gone_configs import Config\n"
        f"value = {{'pytorch-lightning_version': '2.6.0', 'state_dict': torch.load({str(gone / 'state.pt')!r}),\n"
        "    'callbacks': {'Average': {'weights': {'a': torch.ones(1)}}}, 'optimizer_states': [],\n"
        "    'epoch': 1, 'global_step': 4, 'hyper_parameters': {'config': Config()}}\n"
        "torch.save(value, 'last.ckpt')\n"
    )
    script(tmp_path, text)
    (tmp_path / "gone_configs.py").unlink()
    told, found = imported(tmp_path / "last.ckpt", tmp_path, weights_only=True)
    assert_same(found, torch.load(gone / "state.pt", weights_only=True))
    assert told.step == 4
    assert any("gone_configs.Config (gone_configs is not importable here)" in note for note in told.notes)


# What is made to hurt


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def test_a_whole_module_that_would_run_a_command_stays_harmless_and_gives_its_tensors(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    model = nn.Linear(2, 2)
    model.evil = Runs(f"touch {witness}")
    torch.save(model, tmp_path / "torch-zip.pt")
    torch.save(model, tmp_path / "torch-legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(model))
    code = (
        "from ckptmgr.cli.main import run\n"
        f"for name in {CONTAINERS!r}:\n"
        "    assert run(['import', f'{name}.pt', f'run-{name}']) == 0\n"
        "    assert run(['export', f'run-{name}', f'out-{name}.pt', '--quiet']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("would run posix.system") == 3
    assert not witness.exists()
    for name in CONTAINERS:
        assert_same(torch.load(tmp_path / f"out-{name}.pt", weights_only=True), model.state_dict())
    torch.load(tmp_path / "torch-zip.pt", weights_only=False)
    assert witness.exists(), "whoever unpickles it runs the command"


def refused(path: Path, root: Path, kind: type[CkptmgrError], match: str) -> None:
    with pytest.raises(kind, match=match):
        import_run(str(path), str(root / "run"))
    assert not (root / "run").exists()


class Forged:
    """Pickles as a parameter of a module whose place in its storage is any."""

    def __init__(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], nelements: int = 6) -> None:
        self.place = (offset, shape, stride)
        self.storage = torch.arange(float(nelements))._typed_storage()

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.place, False, {})


def with_forged(path: Path, *tensors: Forged) -> Path:
    model = nn.Module()
    model.__dict__["_parameters"] = {f"p{index}": tensor for index, tensor in enumerate(tensors)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, path)
    return path


@pytest.mark.parametrize(
    "place",
    [
        (6, (1,), (1,)),
        (0, (7,), (1,)),
        (0, (2, 3), (4, 1)),
        (1, (2, 3), (3, 1)),
        (1 << 62, (2,), (1,)),
        (0, (2,), (1 << 62,)),
        (0, (1 << 40, 1 << 40), (0, 0)),
        (0, (2, 3), (1,)),
        (0, (0, 1 << 62, 1 << 62), (1, 1, 1)),
    ],
)
def test_a_tensor_outside_of_its_storage_is_damage(tmp_path: Path, place: tuple[Any, ...]) -> None:
    refused(with_forged(tmp_path / "forged.pt", Forged(*place)), tmp_path, CorruptCheckpointError, "cannot be read")


def test_many_views_of_one_storage_cannot_fill_the_disk(tmp_path: Path) -> None:
    storage = Forged(0, (1,), (1,), 100_000)
    views = []
    for index in range(2000):
        view = Forged(index, (90_000,), (1,))
        view.storage = storage.storage
        views.append(view)
    path = with_forged(tmp_path / "many.pt", *views)
    assert path.stat().st_size < 2_000_000
    refused(path, tmp_path, CorruptCheckpointError, "claim far more than its")


def rewritten(path: Path, name: str, change: Any) -> Path:
    other = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith(name) else data)
    return other


def test_a_storage_that_is_shorter_than_its_tensors_is_damage(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 4), tmp_path / "m.pt")
    refused(rewritten(tmp_path / "m.pt", "data/0", lambda data: data[:-4]), tmp_path, CorruptCheckpointError, "outside")


def test_a_byte_that_has_flipped_is_damage(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 4), tmp_path / "m.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        start = data.find(archive.read("m/data/0"))
    data[start] ^= 1
    (tmp_path / "m.pt").write_bytes(data)
    refused(tmp_path / "m.pt", tmp_path, CorruptCheckpointError, "checksum")


def test_a_file_of_a_big_endian_machine_is_read_in_its_order(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.save(model, tmp_path / "m.pt")
    swapped = rewritten(tmp_path / "m.pt", "byteorder", lambda _: b"big")
    for key in ("data/0", "data/1"):
        swapped.replace(tmp_path / "m.pt")
        swapped = rewritten(
            tmp_path / "m.pt", key, lambda data: b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
        )
    _, found = imported(swapped, tmp_path)
    assert_same(found, model.state_dict())


def test_tensors_that_only_their_class_can_make_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.register_buffer("codes", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    model.register_buffer("few", torch.eye(3).to_sparse())
    torch.save(model, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", tmp_path, UnsupportedStateError, "(?s)2 of the tensors.*'codes'.*'few'")


def test_a_module_within_itself_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.__dict__["_modules"] = {"inner": model}
    model.__dict__["_parameters"] = {"p": torch.ones(1)}
    torch.save(model, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", tmp_path, CorruptCheckpointError, "nested more than")


def test_a_module_whose_children_are_each_others_children_is_refused_in_time(tmp_path: Path) -> None:
    inner: nn.Module = nn.Linear(1, 1)
    for _ in range(12):
        inner = nn.ModuleList([inner] * 10)
    torch.save(inner, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", tmp_path, CorruptCheckpointError, "names more tensors than any model has")
