"""Rows 1, 2, 15, 16 and 19: a file that is something else than was meant, or that nobody should unpickle."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from row_samples import FOREIGN, MODELS, WHOLE, Net, doctor, in_python, restored, same, save_all, saved, write_package
from safetensors.torch import save_file

from ckptmgr import Checkpointer, CkptmgrError, CorruptCheckpointError, load_inference
from ckptmgr.cli.main import run
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_all(folder)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files and of the package that saved them; the package can be imported, and be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_package(tmp_path, {})
    return tmp_path


def weights_of(project: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(project / "weights.pt", weights_only=True)
    return state


# Row 1

NOTHING_RUNS = "raise RuntimeError('this was imported')\n"


@pytest.mark.parametrize("file", WHOLE)
def test_row_01_a_class_that_has_moved_is_named_with_its_new_place(file: str, project: Path, capsys: Output) -> None:
    write_package(project, {"models.py": NOTHING_RUNS, "nets.py": NOTHING_RUNS + MODELS})
    status, found = doctor(capsys, file)
    assert status == 1
    assert found["kind"] == "pickled-module"
    (use,) = (use for use in found["globals"] if use["name"] == "shop.models.Net")
    assert use["found"] == "shop/models.py has no class Net any more, but shop/nets.py has one"
    assert "shop.models" not in sys.modules


@pytest.mark.parametrize("file", WHOLE)
def test_row_01_a_module_that_has_moved_is_named_with_its_new_place(file: str, project: Path, capsys: Output) -> None:
    write_package(project, {"models.py": None, "nets.py": MODELS})
    status, found = doctor(capsys, file)
    assert status == 1
    assert (
        "code: shop.models.Net (shop.models is not importable here: shop/__init__.py has no models, but "
        "shop/nets.py has a Net)" in found["text"]
    )


def test_row_01_a_class_that_was_renamed_is_named_with_what_is_there(project: Path, capsys: Output) -> None:
    write_package(project, {"models.py": MODELS.replace("class Net", "class Network")})
    status, found = doctor(capsys, "whole.pt")
    assert status == 1
    assert "shop/models.py has no class Net any more (it has Network)" in found["text"]


def test_row_01_a_package_that_is_gone_is_named(project: Path, capsys: Output) -> None:
    shutil.rmtree(project / "shop")
    write_package(project, {}, "other")
    assert "shop is not importable here" in doctor(capsys, "whole.pkl")[1]["text"]


def test_row_01_a_class_that_has_changed_is_compared_with_what_is_in_the_file(project: Path, capsys: Output) -> None:
    write_package(project, {"models.py": MODELS.replace("self.body", "self.trunk")})
    status, found = doctor(capsys, "whole.pt", "--model", "shop.models:Net")
    assert status == 1
    assert "body.0.weight" in [it["name"] for it in found["difference"]["unexpected"]]
    assert "trunk.0.weight" in [it["name"] for it in found["difference"]["missing"]]
    assert found["difference"]["fits_after"]


@pytest.mark.parametrize("change", ["moved", "renamed", "gone"])
@pytest.mark.parametrize("file", WHOLE)
def test_row_01_the_tensors_are_imported_without_the_class(
    file: str, change: str, project: Path, capsys: Output
) -> None:
    wanted = weights_of(project)
    files = {
        "moved": {"models.py": None, "nets.py": NOTHING_RUNS},
        "renamed": {"models.py": NOTHING_RUNS + MODELS.replace("Net", "Network")},
        "gone": {"models.py": None},
    }[change]
    write_package(project, files)
    assert run(["import", file, "runs/imported"]) == 0, capsys.readouterr().err
    live = Net()
    restored(Path("runs/imported"), live)
    assert same(live.state_dict(), wanted)
    assert not any(name.partition(".")[0] == "shop" for name in sys.modules)


def test_row_01_what_we_save_holds_no_pickle_and_needs_no_class_to_be_read(tmp_path: Path) -> None:
    run_dir = saved(tmp_path / "run", {"model": Net()})
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".yaml", ""}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
    assert same(restored(run_dir, Net()).state_dict(), restored(run_dir, Net()).state_dict())


# Row 2


def test_row_02_a_whole_module_handed_as_a_state_dict_is_told_and_imported(project: Path, capsys: Output) -> None:
    status, found = doctor(capsys, "whole.pt", "--model", "shop.models:Net")
    assert status == 0
    assert "a whole pickled module of class shop.models.Net" in found["title"]
    assert "this is a whole pickled module" in found["text"]
    assert run(["import", "whole.pt", "runs/imported"]) == 0, capsys.readouterr().err
    assert same(restored(Path("runs/imported"), Net()).state_dict(), weights_of(project))


def test_row_02_a_state_dict_handed_as_a_module_is_told_with_the_line_that_loads_it(
    project: Path, capsys: Output
) -> None:
    status, found = doctor(capsys, "weights.pt", "--model", "shop.models:Net")
    assert status == 0
    assert found["kind"] == "state-dict"
    (line,) = (line for line in found["advice"] if "load_state_dict" in line)
    live = Net()
    exec(line, {"model": live, "torch": torch})
    assert same(live.state_dict(), weights_of(project))


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_row_02_a_trainers_checkpoint_handed_as_weights_is_told_its_key_and_imported(
    tmp_path: Path, capsys: Output
) -> None:
    trainer = Trainer(logger=False, barebones=True, accelerator="cpu")
    lit = Lit()
    lit.trainer = trainer
    trainer.strategy.connect(lit)
    trainer.strategy.setup_optimizers(trainer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert len(torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"]) == 1
    status, found = doctor(capsys, tmp_path / "last.ckpt")
    assert status == 0
    assert "this is a Lightning checkpoint: you want its key 'state_dict'" in found["text"]
    assert run(["import", str(tmp_path / "last.ckpt"), str(tmp_path / "run"), "--weights-only"]) == 0
    assert same(restored(tmp_path / "run", Net()).state_dict(), lit.net.state_dict())


def test_row_02_a_training_scripts_dict_is_told_its_key_and_imported(tmp_path: Path, capsys: Output) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    value = {"epoch": 2, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(value, tmp_path / "checkpoint.pth.tar")
    status, found = doctor(capsys, tmp_path / "checkpoint.pth.tar")
    assert status == 0
    assert "this is a trainer's checkpoint: you want its key 'net'" in found["text"]
    assert run(["import", str(tmp_path / "checkpoint.pth.tar"), str(tmp_path / "run")]) == 0
    assert same(restored(tmp_path / "run", Net()).state_dict(), net.state_dict())


@pytest.mark.parametrize("name", ["weights.pt", "whole.pt"])
def test_row_02_a_file_that_is_handed_to_us_as_a_run_is_told_what_to_do_with_it(name: str, project: Path) -> None:
    for load in (
        lambda: load_inference(name, model=Net),
        lambda: Checkpointer("runs/new", {"model": Net()}).restore(f"./{name}"),
    ):
        with pytest.raises(CkptmgrError) as refusal:
            load()
        assert f"ckptmgr import {project / name} RUN_DIR" in str(refusal.value)


# Row 15

HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Log in to download</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 440473133\n"


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_row_15_a_truncated_file_is_called_that(name: str, keep: float, tmp_path: Path, capsys: Output) -> None:
    whole = write_weights(tmp_path / name)
    (tmp_path / name).write_bytes(whole[: int(len(whole) * keep)])
    status, found = doctor(capsys, tmp_path / name)
    assert status == 12
    assert found["is_damaged"]
    assert any(word in found["text"] for word in ("truncated", "cut off"))
    assert run(["import", str(tmp_path / name), str(tmp_path / "run")]) == 12


def write_weights(path: Path) -> bytes:
    state = Net().state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_row_15_a_half_written_file_is_damaged(name: str, tmp_path: Path, capsys: Output) -> None:
    # As large as it was to be, and zeros from where the process died.
    whole = write_weights(tmp_path / name)
    (tmp_path / name).write_bytes(whole[: len(whole) // 3] + bytes(len(whole) - len(whole) // 3))
    status, found = doctor(capsys, tmp_path / name)
    assert status == 12
    assert found["is_damaged"]
    assert run(["import", str(tmp_path / name), str(tmp_path / "run")]) == 12


def test_row_15_a_corrupted_record_is_named(tmp_path: Path, capsys: Output) -> None:
    net = Net()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    place = data.index(net.head.weight.detach().numpy().tobytes())
    data[place + 3] ^= 0xFF
    (tmp_path / "w.pt").write_bytes(data)
    status, found = doctor(capsys, tmp_path / "w.pt")
    assert status == 12
    assert any("is damaged" in problem for problem in found["problems"])


@pytest.mark.parametrize(
    ("content", "words", "status"),
    [
        (b"", "an empty file", 12),
        (HTML, "HTML", 1),
        (POINTER, "Git LFS pointer", 1),
        (bytes(4096), "4096 zero bytes", 12),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG", 1),
        (b"loss,acc\n0.5,0.1\n", "", 1),
    ],
    ids=["empty", "html", "lfs", "zeros", "picture", "text"],
)
def test_row_15_what_is_no_checkpoint_is_called_what_it_is(
    content: bytes, words: str, status: int, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    found_status, found = doctor(capsys, tmp_path / "model.pt")
    assert found_status == status
    assert words in found["title"]
    assert found["tensors"] is None
    assert run(["import", str(tmp_path / "model.pt"), str(tmp_path / "run")]) in (2, 12)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "empty"])
def test_row_15_a_damaged_checkpoint_of_ours_is_named_and_the_one_before_it_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Output
) -> None:
    net = Net()
    run_dir = tmp_path / "run"
    with Checkpointer(run_dir, {"model": net}, every_n_steps=1, background=False) as ckpt:
        ckpt.resume()
        for step in (1, 2):
            net.head.bias.data.fill_(step)
            ckpt.step(step)
    (file,) = run_dir.glob("checkpoints/0000000002-*/model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-10])
    elif damage == "flipped":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    assert run(["verify", str(run_dir)]) == 12
    assert "model.safetensors" in capsys.readouterr().out
    live = Net()
    before = copy.deepcopy(live.state_dict())
    # A checkpoint that was asked for by its step is no other.
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        Checkpointer(tmp_path / "new", {"model": live}).restore(f"{run_dir}@2")
    assert same(live.state_dict(), before)
    with Checkpointer(run_dir, {"model": live}, every_n_steps=1, background=False) as ckpt:
        assert ckpt.resume() == 1
    assert torch.equal(live.head.bias, torch.ones(5))
    assert any("model.safetensors" in message for message in caplog.messages)


def test_row_15_a_save_that_was_killed_is_no_checkpoint(tmp_path: Path) -> None:
    run_dir = saved(tmp_path / "run", {"model": Net()}, nsteps=2)
    (torn,) = run_dir.glob("checkpoints/0000000002-*")
    (torn / "manifest.json").unlink()
    assert Catalog(open_storage(run_dir)).latest().step == 1


# Row 16


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ("tf_saved_model", "tf-savedmodel", "tf.saved_model.load("),
        ("tf_checkpoint", "tf-checkpoint", "tf.train."),
        ("model.h5", "keras-hdf5", "keras"),
        ("model.weights.h5", "keras-hdf5", "keras"),
        ("model.keras", "keras-zip", "keras"),
        ("model.onnx", "onnx", "onnx"),
        ("model.gguf", "gguf", "llama.cpp"),
        ("flax.msgpack", "flax-msgpack", "flax"),
        ("orbax", "orbax", "orbax"),
    ],
)
def test_row_16_a_file_of_another_framework_is_named_with_what_reads_it(
    place: str, kind: str, words: str, tmp_path: Path, capsys: Output
) -> None:
    status, found = doctor(capsys, FOREIGN / place)
    assert status == 0
    assert found["kind"] == kind
    assert found["tensors"]
    assert any(words in line for line in found["advice"]), found["advice"]
    assert run(["import", str(FOREIGN / place), str(tmp_path / "run")]) == 2
    assert "doctor" in (told := capsys.readouterr().err) or kind.partition("-")[0] in told.lower()


def test_row_16_an_older_tensorflow_than_the_one_that_wrote_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    from ckptmgr.diagnose import tensorflow_files

    monkeypatch.setattr(tensorflow_files, "installed_version", lambda *names: "2.8.0")
    text = doctor(capsys, FOREIGN / "tf_saved_model")[1]["text"]
    assert "tensorflow 2.8.0 is installed here, older than the" in text


# Row 19

HOSTILE = """
import io, os, pickle, sys, zipfile
import torch

class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)
    def __reduce__(self):
        return self.call

mark = Calls(os.system, "touch MARK")
torch.save({"weights": torch.ones(2), "extra": mark}, "system.pt")
torch.save({"w": torch.ones(2), "x": Calls(eval, "open('MARK', 'w')")}, "eval.pt", _use_new_zipfile_serialization=False)
pickle.dump(Calls(exec, "open('MARK', 'w')"), open("exec.pkl", "wb"))
# A global that is put together from innocent ones.
pickle.dump(Calls(getattr, Calls(__import__, "os"), "system"), open("getattr.pkl", "wb"))
open("global.pkl", "wb").write(b"cposix\\nsystem\\n(S'touch MARK'\\ntR.")
open("inst.pkl", "wb").write(b"(S'touch MARK'\\niposix\\nsystem\\n.")
# One file, two pickles.
good = pickle.dumps({"w": 1})
open("second.pkl", "wb").write(good + b"cposix\\nsystem\\n(S'touch MARK'\\ntR.")
import numpy as np
np.save("objects.npy", np.array([mark], dtype=object), allow_pickle=True)
torch.save(torch.nn.Linear(2, 2), "whole.pt")
import joblib
joblib.dump([mark], "x.joblib")
os.mkdir("hf")
torch.save({"w": torch.ones(2), "x": mark}, "hf/pytorch_model.bin")
open("hf/config.json", "w").write('{"model_type": "gpt2"}')
torch.save({"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.5.0", "epoch": 0, "global_step": 0,
            "hyper_parameters": {"x": mark}}, "last.ckpt")
# What is only imported runs too.
os.mkdir("evil_pkg")
for name in ("evil_module.py", "evil_pkg/__init__.py", "evil_pkg/sub.py"):
    open(name, "w").write("open('MARK', 'w')")
open("imports.pkl", "wb").write(b"cevil_module\\nThing\\n)\\x81.")
open("imports_sub.pkl", "wb").write(b"\\x80\\x02cevil_pkg.sub\\nThing\\n)\\x81.")
class Module(torch.nn.Linear):
    def __reduce__(self):
        return os.system, ("touch MARK",)
torch.save(Module(2, 2), "module.pt")
"""

EXAMINE = """
import io, os, sys
from contextlib import redirect_stdout, redirect_stderr
from ckptmgr.cli.main import run
import ckptmgr.interop.import_run, ckptmgr.diagnose.sniff, ckptmgr.cli.doctor

armed = False
def watch(event, arguments):
    if armed and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        print("RAN", event, arguments, file=sys.__stdout__)
    if armed and event == "exec" and "MARK" in str(arguments):
        print("RAN", event, arguments, file=sys.__stdout__)
    if armed and event == "pickle.find_class" and arguments[0] in ("os", "posix", "builtins"):
        print("RAN", event, arguments, file=sys.__stdout__)
sys.addaudithook(watch)
armed = True
for name in sorted(os.listdir()):
    for arguments in (["doctor", name], ["doctor", name, "--json"], ["import", name, "run-" + name]):
        if name.startswith(("run-", "evil_")) or name == "whole.pt":
            continue
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            status = run(arguments)
        dangerous = any(word in out.getvalue() for word in ('DANGEROUS', '"dangerous"', 'unpickling it would run'))
        print(name, arguments[0], status, dangerous, os.path.exists("run-" + name + "/checkpoints"))
armed = False
print("MARK" in os.listdir())
"""


def test_row_19_nothing_of_a_malicious_pickle_runs_and_what_it_would_run_is_listed(tmp_path: Path) -> None:
    in_python(tmp_path, HOSTILE)
    hostile = (tmp_path / "global.pkl").read_bytes()
    lines = in_python(tmp_path, EXAMINE).splitlines()
    assert not [line for line in lines if line.startswith("RAN")]
    assert lines[-1] == "False"
    found = [line.split() for line in lines[:-1]]
    assert {name for name, *_ in found} == {
        "system.pt", "eval.pt", "exec.pkl", "getattr.pkl", "global.pkl", "inst.pkl", "second.pkl", "objects.npy",
        "module.pt", "x.joblib", "hf", "last.ckpt", "imports.pkl", "imports_sub.pkl",
    }  # fmt: skip
    for name, command, status, is_listed, has_run in found:
        if command == "doctor" and not name.startswith("imports"):
            assert (status, is_listed) == ("1", "True"), name
        elif command == "import":
            assert status in ("2", "12"), name
            assert has_run == "False", name
    # Where they are unpickled they do run; else all this would prove nothing.
    in_python(tmp_path, f"import pickle; pickle.loads({hostile!r})")
    assert (tmp_path / "MARK").exists()
