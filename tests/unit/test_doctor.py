"""What the doctor prints, and the exit code that it leaves with. What it looks at is described by hand here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptmgr.cli.doctor
from ckptmgr import Checkpointer
from ckptmgr.cli.main import run
from ckptmgr.diagnose.artifact import Artifact, GlobalUse, TensorFacts
from ckptmgr.errors import CheckpointNotFoundError
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]
Show = Callable[..., Artifact]

FC = (TensorFacts("fc.weight", "float32", (3, 2)), TensorFacts("fc.bias", "float32", (3,)))


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Put something in the place of whatever the doctor looks at."""

    def put(**fields: Any) -> Artifact:
        artifact = Artifact(
            **{"kind": "state-dict", "title": "a state dict", "certainty": "certain", **fields}, place="x"
        )
        monkeypatch.setattr(ckptmgr.cli.doctor, "_look", lambda place: artifact)
        return artifact

    return put


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "doctors_net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, n=3):\n        super().__init__()\n"
        "        print('noise')\n        self.fc = nn.Linear(2, n)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "doctors_net", raising=False)
    return "doctors_net:Net"


def test_what_is_recognised_and_well_is_told_and_leaves_with_0(show: Show, capsys: Output) -> None:
    show(
        nbytes=2048,
        versions={"torch": torch.__version__},
        tensors=FC,
        contents={"epoch": "7"},
        advice=("load it",),
        globals=(GlobalUse("collections.OrderedDict", "plain"),),
    )
    assert run(["doctor", "x"]) == 0
    output = capsys.readouterr().out
    assert "a state dict (certain)" in output
    assert "2.0 KiB" in output
    assert "2: 2 float32" in output
    assert "    epoch: 7" in output
    assert "1 plain ones" in output
    assert output.rstrip().endswith("load it")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"problems": ("config.json is missing: the architecture is unknown",)}, 1),
        ({"kind": "unknown", "title": "nothing that is known", "certainty": "unknown"}, 1),
        ({"globals": (GlobalUse("os.system", "dangerous"),)}, 1),
        ({"globals": (GlobalUse("my.Net", "code", "not importable here"),)}, 0),
        ({"problems": ("truncated: it ends after 10 bytes",)}, 12),
        ({"problems": ("its record 'data/0' is damaged: the checksum is another one",)}, 12),
        ({"problems": ("shards are missing: b.safetensors",)}, 12),
        ({"kind": "empty", "title": "an empty file"}, 12),
    ],
)
def test_the_exit_code_says_how_it_is(show: Show, fields: dict[str, Any], status: int) -> None:
    show(**fields)
    assert run(["doctor", "x"]) == status
    assert run(["doctor", "x", "--json"]) == status


def test_nothing_there_leaves_with_10(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def look(place: str) -> Artifact:
        raise CheckpointNotFoundError(f"nothing is at {place}")

    monkeypatch.setattr(ckptmgr.cli.doctor, "_look", look)
    assert run(["doctor", "nowhere"]) == 10
    assert capsys.readouterr().out == ""


def test_what_unpickling_would_import_is_listed_with_the_dangerous_ones_first(show: Show, capsys: Output) -> None:
    show(
        globals=(
            GlobalUse("my_pkg.Net", "code", "my_pkg is not importable here"),
            GlobalUse("torch.FloatStorage", "plain"),
            GlobalUse("posix.system", "dangerous"),
        )
    )
    run(["doctor", "x"])
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("unpickling it would import:")
    assert lines[begin + 1] == "    DANGEROUS: posix.system"
    assert lines[begin + 2] == "    code: my_pkg.Net (my_pkg is not importable here)"


def test_a_file_cannot_write_over_the_terminal(show: Show, capsys: Output) -> None:
    evil = "a\x1b[2J\r\nb"
    show(
        title=evil,
        versions={evil: evil},
        contents={evil: evil},
        problems=(evil,),
        advice=(evil,),
        globals=(GlobalUse(evil, "dangerous", evil),),
        tensors=(TensorFacts(evil, evil, (2,)),),
    )
    run(["doctor", "x"])
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    assert output.count("\nb") == 0


def test_long_lists_are_shortened_and_complete_as_json(show: Show, capsys: Output) -> None:
    show(contents={f"key{n}": "an int" for n in range(223)})
    run(["doctor", "x"])
    assert "    … and 213 more (--json lists all)" in capsys.readouterr().out
    run(["doctor", "x", "--json"])
    assert len(json.loads(capsys.readouterr().out)["contents"]) == 223


def test_a_model_that_fits_is_said_to_and_what_it_prints_is_no_part_of_the_answer(
    show: Show, net: str, capsys: Output
) -> None:
    show(tensors=FC)
    assert run(["doctor", "x", "--model", net, "--json"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert document["difference"]["fits"]
    assert document["difference"]["matched"] == ["fc.weight", "fc.bias"]
    assert "noise" in output.err


def test_the_difference_the_proposals_and_the_code_are_printed(
    show: Show, net: str, tmp_path: Path, capsys: Output
) -> None:
    tensors = tuple(TensorFacts(f"module.{it.name}", it.dtype, it.shape) for it in FC)
    show(tensors=tensors, advice=("ckptmgr import x RUN_DIR", "model.load_state_dict(torch.load('x'))"))
    assert run(["doctor", "x", "--model", net, "--model-arg", "n=3"]) == 1
    output = capsys.readouterr().out
    assert "it does not fit: 2 missing, 2 unexpected" in output
    assert "    fc.weight: float32 (3, 2)" in output
    assert "    certain: leave out 'module.' in front" in output
    assert "nothing is left: it fits" in output
    # Not what would fail.
    assert output.rstrip().endswith("next:\n    ckptmgr import x RUN_DIR")
    # What is printed is a program.
    torch.save({it.name: torch.full(it.shape, 5.0) for it in tensors}, tmp_path / "x")
    begin = output.index("applied together")
    code = [line[4:] for line in output[begin:].splitlines()[1:] if line.startswith("    ")]
    program = code[: code.index("model.load_state_dict(state)") + 1]
    scope: dict[str, Any] = {}
    exec("\n".join(program), scope)
    assert torch.equal(scope["model"].fc.weight, torch.full((3, 2), 5.0))


def test_what_cannot_be_listed_cannot_be_compared(show: Show, net: str, capsys: Output) -> None:
    show(title="an ONNX model", kind="onnx", tensors=None)
    assert run(["doctor", "x", "--model", net]) == 1
    assert "not possible: the tensors of an ONNX model cannot be listed" in capsys.readouterr().out


def test_two_files_are_compared_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    found = {
        "a": Artifact("a", "safetensors", "one", "certain", tensors=FC),
        "b": Artifact("b", "safetensors", "other", "certain", tensors=FC[:1]),
    }
    monkeypatch.setattr(ckptmgr.cli.doctor, "_look", found.__getitem__)
    assert run(["doctor", "a", "--against", "b"]) == 1
    assert "unexpected: in the file, not in b:\n    fc.bias" in capsys.readouterr().out
    assert run(["doctor", "a", "--against", "a"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "m:N", "--against", "y"],
        ["--model-arg", "n=3"],
        ["--model", "nonsense"],
        ["--model", "doctors_net:Nat"],
        ["--model", "doctors_net:Net", "--model-arg", "m=3"],
    ],
)
def test_wrong_usage_leaves_with_2_and_a_reason(show: Show, net: str, arguments: list[str], capsys: Output) -> None:
    show(tensors=FC)
    assert run(["doctor", "x", *arguments]) == 2
    assert capsys.readouterr().err.startswith("UsageError [usage]")


def test_versions_that_the_file_tells_are_graded(show: Show, capsys: Output) -> None:
    show(versions={"pytorch-lightning": "1.9.0", "scikit-learn": "0.20.1", "onnx": "1.2"})
    assert run(["doctor", "x"]) == 0
    output = capsys.readouterr().out
    assert "not as it was when it was written, the likeliest cause of a failure first:" in output
    first, second = (line for line in output.splitlines() if line.startswith("    warning"))
    assert first.startswith("    warning: pytorch-lightning 1.9.0")
    assert second.startswith("    warning: scikit-learn 0.20.1")


# A run of our own


class Net(nn.Module):
    def __init__(self, body: str = "body", nwords: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(nwords, 4)
        self.add_module(body, nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))


def test_the_selection_that_is_printed_restores_a_run_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Show, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    old = Net()
    with Checkpointer("run", {"model": old, "optimizer": torch.optim.Adam(old.parameters())}, every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    manifest = Catalog(open_storage(tmp_path / "run")).latest()
    tensors = tuple(TensorFacts(it.name, "float32", it.shape) for it in manifest.tensors if it.entry == "model")
    show(kind="run-checkpoint", tensors=tensors, details={"checkpoint": manifest.checkpoint})
    (tmp_path / "doctors_net.py").write_text("from test_doctor import Net\n\ndef new():\n    return Net('trunk', 9)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "doctors_net", raising=False)
    assert run(["doctor", "run", "--model", "doctors_net:new", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    from ckptmgr import Selection

    new = Net("trunk", 9)
    state = {"model": new, "optimizer": torch.optim.Adam(new.parameters())}
    with Checkpointer("new", state, every_n_steps=1) as ckpt:
        ckpt.restore(found["reference"], selection=eval(found["selection"], {"Selection": Selection}))
    assert torch.equal(new.embed.weight[:6], old.embed.weight)
    assert torch.equal(new.get_parameter("trunk.0.weight"), old.get_parameter("body.0.weight"))


def test_drift_of_a_run_of_ours_comes_from_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Show, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run", {"model": Net()}, every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    manifest = Catalog(open_storage(tmp_path / "run")).latest()
    show(kind="run", details={"checkpoint": manifest.checkpoint})
    real = ckptmgr.diagnose.diagnosis.environment_now
    now = {**real(), "torch": "2.6.0"}
    monkeypatch.setattr(ckptmgr.diagnose.diagnosis, "environment_now", lambda: now)
    assert run(["doctor", "run"]) == 0
    assert f"warning: torch {manifest.environment['torch']} -> 2.6.0: an older torch" in capsys.readouterr().out
