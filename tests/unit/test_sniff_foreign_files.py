"""Files of other frameworks, written by their own tools, are named together with what reads them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LogisticRegression
from sniff_samples import FOREIGN, Runs, look, shapes

from ckptmgr.diagnose import installed, tensorflow_files

VERSIONS = json.loads((FOREIGN / "versions.json").read_text())


def test_a_saved_model_of_tensorflow() -> None:
    artifact = look(FOREIGN / "tf_saved_model")
    assert artifact.kind == "tf-savedmodel"
    assert artifact.versions == {"tensorflow": VERSIONS["tensorflow_cpu"]}
    assert artifact.details["tags"] == ["serve"]
    assert shapes(artifact) == {"weight": ("float32", (2, 3))}
    assert artifact.problems == ()
    assert artifact.advice[0].startswith("tf.saved_model.load(")
    assert "name the directory" in look(FOREIGN / "tf_saved_model" / "saved_model.pb").problems[0]


def test_what_a_saved_model_lacks_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOREIGN / "tf_saved_model", tmp_path / "m"))
    (folder / "variables" / "variables.data-00000-of-00001").unlink()
    assert "variables/variables.data-00000-of-00001" in look(folder).problems[0]
    shutil.rmtree(folder / "variables")
    assert "its variables are missing" in look(folder).problems[0]


@pytest.mark.parametrize("place", ["tf_checkpoint", "tf_checkpoint/ckpt-1", "tf_checkpoint/ckpt-1.index"])
def test_a_checkpoint_of_tensorflow_by_each_of_its_names(place: str) -> None:
    artifact = look(FOREIGN / place)
    assert artifact.kind == "tf-checkpoint"
    assert shapes(artifact) == {
        "model/weight": ("float32", (2, 3)),
        "save_counter": ("int64", ()),
        "step": ("int64", ()),
    }
    assert artifact.problems == ()


def test_the_version_of_tensorflow_that_is_here_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorflow_files, "installed_version", lambda *names: "2.8.0")
    notes = tensorflow_files.tensorflow_notes("2.10.1")
    assert "tensorflow 2.8.0 is installed here, older than the 2.10.1 that wrote it" in notes[0]
    assert "use 2.10.1 or newer" in notes[1]
    assert installed.compared("x", "2.8", "2.10") == "x 2.10 is installed here; 2.8 wrote it"
    assert installed.compared("x", "1.0", None) == "x is not installed here; install x 1.0 or newer"


def test_models_and_weights_of_keras() -> None:
    model = look(FOREIGN / "model.keras")
    assert (model.kind, model.versions) == ("keras-zip", {"keras": VERSIONS["keras"]})
    assert shapes(model)["layers/dense/vars/0"] == ("float32", (2, 3))
    assert model.problems == ()
    hdf5 = look(FOREIGN / "model.h5")
    assert (hdf5.kind, hdf5.versions) == ("keras-hdf5", {"keras": VERSIONS["keras"]})
    assert shapes(hdf5)["model_weights/hidden/sequential/hidden/kernel"] == ("float32", (2, 3))
    weights = look(FOREIGN / "model.weights.h5")
    assert weights.kind == "keras-hdf5"
    assert len(weights.tensors or ()) == 4


def test_a_layer_of_keras_that_is_code_is_told() -> None:
    assert "Lambda layer" in look(FOREIGN / "lambda.keras").problems[0]


def test_truncated_files_of_keras(tmp_path: Path) -> None:
    whole = (FOREIGN / "model.h5").read_bytes()
    (tmp_path / "x.h5").write_bytes(whole[:-100])
    assert look(tmp_path / "x.h5").problems[0] == (
        f"truncated: it ends after {len(whole) - 100} bytes, and should have {len(whole)}"
    )
    (tmp_path / "x.keras").write_bytes((FOREIGN / "model.keras").read_bytes()[:-100])
    assert look(tmp_path / "x.keras").kind == "zip-truncated"


def test_an_onnx_model_and_the_files_beside_it(tmp_path: Path) -> None:
    artifact = look(FOREIGN / "model.onnx")
    assert artifact.kind == "onnx"
    assert artifact.versions["producer"] == "tests 1.0"
    assert artifact.versions["opset ai.onnx"].isdecimal()
    assert shapes(artifact) == {"weight": ("float32", (2, 3)), "bias": ("float16", (3,))}
    assert artifact.contents == {"inputs": "x", "outputs": "y"}
    folder = Path(shutil.copytree(FOREIGN / "onnx_external", tmp_path / "m"))
    assert look(folder / "model.onnx").problems == ()
    (folder / "weights.bin").unlink()
    assert "'weights.bin', which holds weights of it, is missing" in look(folder / "model.onnx").problems[0]
    (folder / "model.onnx").write_bytes((FOREIGN / "model.onnx").read_bytes()[:-30])
    assert look(folder / "model.onnx").problems[0].startswith("truncated")


def test_a_gguf_file(tmp_path: Path) -> None:
    artifact = look(FOREIGN / "model.gguf")
    assert artifact.kind == "gguf"
    assert artifact.versions == {"gguf": "3"}
    assert artifact.details["architecture"] == "llama"
    assert shapes(artifact) == {
        "token_embd.weight": ("float32", (4, 32)),
        "output.weight": ("float16", (4, 32)),
        "blk.0.ffn.weight": ("Q8_0", (4, 32)),
    }
    assert artifact.contents["tokenizer.ggml.tokens"] == "list of 4"
    assert artifact.problems == ()
    whole = (FOREIGN / "model.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:-40])
    assert "truncated" in look(tmp_path / "x.gguf").problems[0]
    (tmp_path / "x.gguf").write_bytes(whole[:100])
    assert "header is not whole" in look(tmp_path / "x.gguf").problems[0]
    (tmp_path / "x.gguf").write_bytes(whole[:8] + b"\xff" * 16 + whole[24:])
    assert "declares 18446744073709551615 tensors" in look(tmp_path / "x.gguf").problems[0]


def test_a_file_that_is_a_pickle_too_is_said_to_run_what_that_runs(tmp_path: Path) -> None:
    # `G` and eight bytes are a number to a pickle, and the first bytes of a GGUF file.
    whole = (FOREIGN / "model.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:9] + b"0cos\nsystem\n(S'true'\ntR." + whole[40:])
    artifact = look(tmp_path / "x.gguf")
    assert artifact.kind == "gguf"
    assert artifact.problems[0] == "read as a pickle, it would run os.system: do not load it"
    assert look(FOREIGN / "model.gguf").globals == ()


def test_a_file_of_flax(tmp_path: Path) -> None:
    artifact = look(FOREIGN / "flax.msgpack")
    assert artifact.kind == "flax-msgpack"
    assert shapes(artifact) == {"params.dense.kernel": ("float32", (2, 3)), "params.dense.bias": ("bfloat16", (3,))}
    (tmp_path / "x").write_bytes((FOREIGN / "flax.msgpack").read_bytes()[:-8])
    assert "truncated" in look(tmp_path / "x").problems[0]


def test_a_checkpoint_of_orbax() -> None:
    artifact = look(FOREIGN / "orbax")
    assert artifact.kind == "orbax"
    assert {fact.name: fact.shape for fact in artifact.tensors or ()} == {
        "params.kernel": (2, 3),
        "params.bias": (3,),
        "step": (),
    }


def test_files_of_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float16))
    np.savez(tmp_path / "b.npz", x=np.ones(3), y=np.ones((), np.int8))
    np.savez_compressed(tmp_path / "c.npz", x=np.ones(3))
    assert shapes(look(tmp_path / "a.npy")) == {"array": ("float16", (2, 3))}
    assert shapes(look(tmp_path / "b.npz")) == {"x": ("float64", (3,)), "y": ("int8", ())}
    assert look(tmp_path / "c.npz").kind == "numpy-npz"
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    assert "truncated" in look(tmp_path / "a.npy").problems[0]


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_objects_in_files_of_numpy_are_looked_at(name: str, tmp_path: Path) -> None:
    hostile = np.array([Runs(os.system, "true")], dtype=object)
    if name == "x.npy":
        np.save(tmp_path / name, hostile, allow_pickle=True)
    else:
        np.savez(tmp_path / name, x=hostile)
    artifact = look(tmp_path / name)
    assert artifact.globals[0].verdict == "dangerous"
    assert "would run code" in artifact.problems[0]


def test_a_file_of_skops_names_its_types(tmp_path: Path) -> None:
    skops.io.dump(LogisticRegression().fit(np.eye(2), [0, 1]), tmp_path / "x.skops")
    artifact = look(tmp_path / "x.skops")
    assert artifact.kind == "skops"
    assert "sklearn.linear_model._logistic.LogisticRegression" in artifact.title
    assert artifact.versions["skops"] == skops.__version__
    assert "numpy.ndarray" in artifact.details["types"]


def test_other_archives_are_called_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x" * 100)
    shutil.make_archive(str(tmp_path / "a"), "tar", tmp_path, "data")
    shutil.make_archive(str(tmp_path / "b"), "gztar", tmp_path, "data")
    shutil.make_archive(str(tmp_path / "c"), "bztar", tmp_path, "data")
    shutil.make_archive(str(tmp_path / "d"), "xztar", tmp_path, "data")
    with zipfile.ZipFile(tmp_path / "e.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", b"x" * 100)
    (tmp_path / "f.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    names = ["a.tar", "b.tar.gz", "c.tar.bz2", "d.tar.xz", "e.zip", "f.zst"]
    assert [look(tmp_path / name).kind for name in names] == ["tar", "gzip", "bzip2", "xz", "zip", "zstd"]
    assert look(tmp_path / "e.zip").contents == {"data": "100 B"}


def test_the_oldest_format_of_torch_is_known_and_looked_at(tmp_path: Path) -> None:
    import tarfile

    for name, value in (("pickle", Runs(os.system, "true")), ("storages", 0), ("tensors", 0), ("sys_info", {})):
        (tmp_path / name).write_bytes(pickle.dumps(value, 2))
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.add(tmp_path / name, name)
    artifact = look(tmp_path / "x.pt")
    assert artifact.details["container"] == "torch-tar"
    assert artifact.globals[0].verdict == "dangerous"
