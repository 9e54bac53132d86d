"""Files of torch, in its new and old formats, plain pickles and those of Lightning are told from each other."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import joblib
import lightning
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sniff_samples import Runs, expected, look, net, shapes, trained
from torch import nn

from ckptmgr.diagnose.sniff import sniff

old = functools.partial(torch.save, _use_new_zipfile_serialization=False)


def plain(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


WRITERS = {"torch-zip": torch.save, "torch-legacy": old, "pickle": plain}


@pytest.mark.parametrize("container", WRITERS)
def test_a_state_dict_is_listed(container: str, tmp_path: Path) -> None:
    state = net().state_dict()
    WRITERS[container](state, tmp_path / "x.pt")
    artifact = look(tmp_path / "x.pt")
    assert artifact.kind == "state-dict"
    assert artifact.certainty == "certain"
    assert artifact.details["container"] == container
    assert shapes(artifact) == expected(state)
    assert artifact.problems == ()
    assert any("load_state_dict" in line for line in artifact.advice)
    assert any("ckptmgr import" in line for line in artifact.advice)


@pytest.mark.parametrize("container", WRITERS)
def test_a_whole_module_is_told_from_its_state_dict(container: str, tmp_path: Path) -> None:
    model = net()
    WRITERS[container](model, tmp_path / "x.pt")
    artifact = look(tmp_path / "x.pt")
    assert artifact.kind == "pickled-module"
    assert "torch.nn.modules.container.Sequential" in artifact.title
    assert shapes(artifact) == expected(model.state_dict())
    found = {use.name: use.found for use in artifact.globals}
    assert found["torch.nn.modules.linear.Linear"] == "found in torch/nn/modules/linear.py"
    assert artifact.advice[0].startswith("ckptmgr import")
    assert artifact.advice[1].startswith("this is a whole pickled module")
    assert artifact.contents == dict.fromkeys(("0", "1"), "torch.nn.modules.linear.Linear") | {
        "class": "torch.nn.modules.container.Sequential"
    }


@pytest.mark.parametrize("container", WRITERS)
def test_a_trainers_checkpoint_names_the_key_of_its_weights(container: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    value = {"epoch": 3, "net": model.state_dict(), "optimizer": optimizer.state_dict(), "best": 0.5}
    WRITERS[container](value, tmp_path / "x.pt")
    artifact = look(tmp_path / "x.pt")
    assert artifact.kind == "trainer-checkpoint"
    assert artifact.details["weights_key"] == "net"
    assert artifact.details["epoch"] == 3
    assert artifact.advice[0] == "this is a trainer's checkpoint: you want its key 'net'"
    assert artifact.contents == {
        "epoch": "3",
        "net": "state dict of 4 tensors",
        "optimizer": "optimizer state of 4 parameters in 1 group",
        "best": "0.5",
    }
    assert shapes(artifact) == expected(model.state_dict())


@pytest.mark.parametrize("container", WRITERS)
def test_the_state_of_an_optimizer_is_no_model(container: str, tmp_path: Path) -> None:
    WRITERS[container](trained()[1].state_dict(), tmp_path / "x.pt")
    artifact = look(tmp_path / "x.pt")
    assert artifact.kind == "optimizer-state"
    assert artifact.tensors is None
    assert "weights are in another file" in artifact.advice[0]


@pytest.mark.parametrize("container", WRITERS)
def test_single_tensors_and_lists_of_them(container: str, tmp_path: Path) -> None:
    WRITERS[container](torch.ones(3, 4, dtype=torch.bfloat16), tmp_path / "one.pt")
    WRITERS[container]([torch.ones(2), torch.ones(3)], tmp_path / "two.pt")
    assert look(tmp_path / "one.pt").kind == "tensor"
    assert shapes(look(tmp_path / "one.pt")) == {"tensor": ("bfloat16", (3, 4))}
    assert look(tmp_path / "two.pt").kind == "tensors"


def test_a_checkpoint_that_holds_a_whole_module_is_said_to(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "model": net(), "optimizer": None}, tmp_path / "x.pt")
    artifact = look(tmp_path / "x.pt")
    assert artifact.kind == "trainer-checkpoint"
    assert "a whole pickled module of class torch.nn.modules.container.Sequential" in artifact.title
    assert any("['model'].state_dict()" in line for line in artifact.advice)
    assert len(artifact.tensors or ()) == 4


def test_nested_state_dicts_and_what_is_none(tmp_path: Path) -> None:
    torch.save({"encoder": net().state_dict(), "decoder": {"w": torch.ones(2)}}, tmp_path / "nested.pt")
    torch.save({"a": 1, "b": "x"}, tmp_path / "other.pt")
    torch.save({}, tmp_path / "empty.pt")
    nested = look(tmp_path / "nested.pt")
    assert nested.kind == "state-dict"
    assert nested.details["is_nested"] is True
    assert "decoder.w" in shapes(nested)
    assert look(tmp_path / "other.pt").kind == "torch-file"
    assert look(tmp_path / "other.pt").contents == {"a": "1", "b": "'x'"}
    assert look(tmp_path / "empty.pt").kind == "torch-file"


@pytest.mark.parametrize("save", [torch.save, old])
def test_tensors_that_share_memory_are_tied(save: Any, tmp_path: Path) -> None:
    whole = torch.ones(4, 4)
    save(
        {"a": whole, "b": whole, "c": whole[1:], "d": whole.clone(), "e": whole[:2], "f": whole[2:]}, tmp_path / "x.pt"
    )
    tied = {fact.name: fact.tied_to for fact in look(tmp_path / "x.pt").tensors or ()}
    assert tied == {"a": None, "b": "a", "c": "a", "d": None, "e": "a", "f": "a"}


def test_halves_of_one_memory_are_not_tied(tmp_path: Path) -> None:
    whole = torch.ones(4, 4)
    torch.save({"a": whole[:2], "b": whole[2:]}, tmp_path / "x.pt")
    assert [fact.tied_to for fact in look(tmp_path / "x.pt").tensors or ()] == [None, None]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_uncommon_tensors_keep_their_dtype_and_shape(tmp_path: Path) -> None:
    state = {
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "parameter": nn.Parameter(torch.ones(2, requires_grad=True)),
        "float8": torch.ones(2).to(torch.float8_e5m2),
        "uint16": torch.ones(2, dtype=torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "meta": torch.empty(2, 3, device="meta"),
        "scalar": torch.tensor(1.0),
        "none": torch.empty(0, 5),
        "transposed": torch.ones(2, 3).T,
    }
    torch.save(state, tmp_path / "x.pt")
    assert shapes(look(tmp_path / "x.pt")) == expected(state)


class Tiny(lightning.LightningModule):
    def __init__(self, lr: float = 0.1, hidden: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def lightning_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2)))
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Tiny(), loader)
    trainer.save_checkpoint(folder / "whole.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder


def test_a_checkpoint_of_lightning_tells_its_version_progress_and_hyper_parameters(lightning_files: Path) -> None:
    artifact = look(lightning_files / "whole.ckpt")
    assert artifact.kind == "lightning-checkpoint"
    assert artifact.versions["lightning"] == lightning.__version__
    assert artifact.details["global_step"] == 2
    assert artifact.details["hyper_parameters"] == {"lr": "0.1", "hidden": "4"}
    assert shapes(artifact) == {"layer.weight": ("float32", (1, 2)), "layer.bias": ("float32", (1,))}
    assert artifact.contents["optimizer_states"] == "1 optimizer: optimizer state of 2 parameters in 1 group"
    assert "you want its key 'state_dict'" in artifact.advice[0]
    assert any(line.startswith("ckptmgr import") for line in artifact.advice)
    assert "is_weights_only" not in artifact.details
    assert look(lightning_files / "weights.ckpt").details["is_weights_only"] is True


def test_hyper_parameters_of_other_classes_make_a_checkpoint_need_code(lightning_files: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(lightning_files / "whole.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"args": argparse.Namespace(lr=1), "path": Path("x")}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    artifact = look(tmp_path / "x.ckpt")
    assert {use.name for use in artifact.globals if use.verdict == "code"} == {
        "argparse.Namespace",
        "pathlib.PosixPath",
    }
    (line,) = (line for line in artifact.advice if line.startswith("ckptmgr import"))
    assert "--weights-only" in line
    assert any("weights_only=False" in line for line in artifact.advice)


@pytest.mark.parametrize("container", WRITERS)
def test_a_file_that_runs_commands_is_dangerous_in_every_container(container: str, tmp_path: Path) -> None:
    WRITERS[container]({"state_dict": net().state_dict(), "extra": Runs(os.system, "true")}, tmp_path / "x.pt")
    artifact = look(tmp_path / "x.pt")
    assert artifact.globals[0].name == "posix.system"
    assert artifact.globals[0].verdict == "dangerous"
    assert "posix.system" in artifact.problems[0]
    assert artifact.advice[0].startswith("do not load it")


def test_a_second_pickle_in_an_archive_is_looked_at(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(Runs(os.system, "true"), 2))
    artifact = look(tmp_path / "x.pt")
    assert artifact.globals[0].name == "posix.system"
    assert any("second pickle" in problem for problem in artifact.problems)


def test_a_second_pickle_behind_the_first_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}) + pickle.dumps(Runs(os.system, "true")))
    artifact = look(tmp_path / "x.pkl")
    assert artifact.details["npickles"] == 2
    assert artifact.globals[0].verdict == "dangerous"


def test_a_class_that_was_renamed_since_is_named_with_what_is_there_now(tmp_path: Path) -> None:
    package = tmp_path / "my_project"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    models = package / "models.py"
    source = (
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.fc = torch.nn.Linear(2, 3)\n"
    )
    models.write_text(source)
    program = (
        "import sys, types, torch; package = types.ModuleType('my_project'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['my_project'] = package\n"
        "from my_project.models import Net; torch.save(Net(), sys.argv[2])\n"
        "torch.save(Net(), sys.argv[3], _use_new_zipfile_serialization=False)"
    )
    files = [tmp_path / "new.pt", tmp_path / "old.pt"]
    subprocess.run([sys.executable, "-c", program, str(package), *map(str, files)], check=True)

    def found() -> list[str]:
        code = (
            "import sys; from ckptmgr.diagnose.sniff import sniff\n"
            "for place in sys.argv[1:]: print(next(u.found for u in sniff(place).globals if u.name.endswith('Net')))\n"
            "assert 'my_project' not in sys.modules"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, *map(str, files)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        )
        return run.stdout.splitlines()

    assert found() == ["found in my_project/models.py"] * 2
    models.write_text(source.replace("Net", "Network"))
    assert found() == ["my_project/models.py has no class Net any more (it has Network)"] * 2
    (package / "nets.py").write_text(source)
    assert found() == ["my_project/models.py has no class Net any more, but my_project/nets.py has one"] * 2
    models.unlink()
    moved = "my_project/__init__.py has no models, but my_project/nets.py has a Net"
    assert found() == [f"my_project.models is not importable here: {moved}"] * 2
    artifact = look(files[1])
    assert artifact.kind == "pickled-module"
    assert artifact.problems == ("my_project.models.Net: my_project is not importable here",)
    assert artifact.details["sources"]["my_project.models.Net"] == str(models)
    assert shapes(artifact) == {"fc.weight": ("float32", (3, 2)), "fc.bias": ("float32", (3,))}


def test_a_class_of_a_script_is_said_to_be_nobodys(tmp_path: Path) -> None:
    program = "import torch, sys\nclass Net(torch.nn.Module): pass\ntorch.save(Net(), sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x.pt")], check=True)
    problems = look(tmp_path / "x.pt").problems
    assert problems == (
        "__main__.Net: it was defined in the script or notebook that saved it, which nobody can import",
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_programs_of_torchscript_and_of_export_are_no_state_dicts(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), str(tmp_path / "x.pt"))
    script = look(tmp_path / "x.pt")
    assert script.kind == "torchscript"
    assert script.globals == ()
    assert shapes(script) == {"weight": ("float32", (3, 2)), "bias": ("float32", (3,))}
    assert any("torch.jit.load" in line for line in script.advice)
    torch.export.save(torch.export.export(nn.Linear(2, 3), (torch.ones(1, 2),)), tmp_path / "x.pt2")
    assert look(tmp_path / "x.pt2").kind == "torch-export"


def test_a_truncated_archive_tells_what_it_was_and_how_large_it_has_to_be(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1000), "v": torch.ones(1000)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:6000])
    artifact = look(file)
    assert artifact.kind == "torch-truncated"
    assert artifact.details["kind_of_the_whole"] == "state-dict"
    assert 8000 <= artifact.details["expected_nbytes_at_least"] <= len(whole)
    assert f"more than {artifact.details['expected_nbytes_at_least']}" in artifact.problems[0]
    assert set(shapes(artifact)) == {"w", "v"}
    assert "copy or download it again" in artifact.advice[0]


def test_a_truncated_file_of_the_old_format_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    old({"w": torch.ones(1000)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert f"needs {len(whole)}" in look(file).problems[0]
    file.write_bytes(whole[: whole.index(b"storage")])
    assert look(file).certainty == "likely"
    assert "cut off" in look(file).problems[0]


@pytest.mark.parametrize(
    ("target", "words"),
    [("data/1", "its record 'x/data/1' is damaged"), ("data.pkl", "is damaged"), ("version", "is damaged")],
)
def test_a_damaged_record_is_named(target: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a": torch.ones(50), "b": torch.ones(50)}, file)
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(f"x/{target}")
        content = archive.read(info)
    data = bytearray(file.read_bytes())
    data[data.index(content, info.header_offset + 30)] ^= 0x40
    file.write_bytes(data)
    artifact = look(file)
    assert any(words in problem for problem in artifact.problems)
    assert "it is not what was written" in artifact.advice[0]


def test_checksums_are_compared_as_far_as_it_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a": torch.ones(5000)}, file)
    data = bytearray(file.read_bytes())
    data[data.index(torch.ones(5000).numpy().tobytes()) + 3] ^= 1
    file.write_bytes(data)
    assert any("is damaged" in problem for problem in look(file).problems)
    unread = look(file, check_nbytes=1000)
    assert unread.problems == ()
    assert unread.details["records_not_checked"] == 1


def test_an_archive_without_checksums_is_not_called_damaged(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net().state_dict(), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert look(tmp_path / "x.pt").problems == ()


def test_a_missing_and_a_short_record_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(50), "b": torch.ones(60)}, buffer)
    with zipfile.ZipFile(buffer) as old_archive, zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for info in old_archive.infolist():
            if not info.filename.endswith("data/0"):
                archive.writestr(
                    info.filename, old_archive.read(info)[: 100 if info.filename.endswith("data/1") else None]
                )
    problems = look(tmp_path / "x.pt").problems
    assert any("records of tensors are missing: data/0" in problem for problem in problems)
    assert any("'data/1' has 100 bytes" in problem and "240" in problem for problem in problems)


def test_estimators_of_scikit_learn_tell_its_version(tmp_path: Path) -> None:
    import sklearn

    model = LogisticRegression().fit(np.eye(2), [0, 1])
    plain(model, tmp_path / "x.pkl")
    joblib.dump(model, tmp_path / "x.joblib")
    joblib.dump(model, tmp_path / "z.joblib", compress=3)
    for name in ("x.pkl", "x.joblib", "z.joblib"):
        artifact = look(tmp_path / name)
        assert artifact.kind == "sklearn-pickle"
        assert artifact.versions["scikit-learn"] == sklearn.__version__
    assert look(tmp_path / "z.joblib").details["compressed"] == "zlib"


def test_a_compressed_pickle_that_runs_commands_is_dangerous(tmp_path: Path) -> None:
    joblib.dump(Runs(os.system, "true"), tmp_path / "x.gz", compress="gzip")
    assert look(tmp_path / "x.gz").globals[0].verdict == "dangerous"


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[2Jlayer\n": torch.ones(2), "b\u202e": torch.ones(2)}, tmp_path / "x.pt")
    assert list(shapes(look(tmp_path / "x.pt"))) == ["\\x1b[2Jlayer\\n", "b\\u202e"]


def test_an_artifact_goes_into_json_as_it_is(lightning_files: Path) -> None:
    import json

    value = dataclasses.asdict(sniff(lightning_files / "whole.ckpt"))
    assert json.loads(json.dumps(value))["kind"] == "lightning-checkpoint"
