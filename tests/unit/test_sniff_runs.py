"""Our own runs are recognised by their directory, a checkpoint's folder, and a reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_samples import create_run, save, start
from sniff_samples import look, net, shapes
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.cli.main import run as command
from ckptmgr.diagnose.sniff import sniff
from ckptmgr.errors import CheckpointNotFoundError, RunNotFoundError
from ckptmgr.interop.import_run import import_run
from ckptmgr.storage.open import open_storage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    storage = open_storage(tmp_path / "run")
    create_run(storage)
    attempt = start(storage)
    save(storage, attempt, 10, tags=["good"])
    save(storage, attempt, 20, number=1)
    return tmp_path / "run"


def test_a_run_directory_and_each_name_of_its_checkpoints(run: Path) -> None:
    artifact = look(run)
    assert artifact.kind == "run"
    assert artifact.details["step"] == 20
    assert artifact.details["checkpoints"] == 2
    assert shapes(artifact) == {"bias": ("float32", (8,)), "weight": ("float32", (8,))}
    assert artifact.problems == ()
    for place, step in ((f"{run}@10", 10), (f"{run}@good", 10), (f"ckptmgr://{run}@latest", 20)):
        checkpoint = look(place)
        assert (checkpoint.kind, checkpoint.details["step"]) == ("run-checkpoint", step)
    folder = run / "checkpoints" / artifact.details["checkpoint"]
    assert look(folder).details["step"] == 20
    assert look(folder / "model.safetensors").kind == "safetensors"


def test_a_run_behind_a_url() -> None:
    storage = open_storage("memory://sniffed/run")
    create_run(storage)
    save(storage, start(storage), 10)
    assert look("memory://sniffed/run").kind == "run"
    assert look("memory://sniffed/run@10").kind == "run-checkpoint"


def test_what_is_wrong_with_a_run_is_told(run: Path) -> None:
    newest = run / "checkpoints" / look(run).details["checkpoint"]
    (newest / "model.safetensors").write_bytes(b"x")
    artifact = look(run)
    assert artifact.details["step"] == 10
    assert "is not intact" in artifact.problems[0]
    assert "is not intact" in look(newest).problems[0]
    (newest / "manifest.json").write_bytes(b"{")
    assert look(run).details["step"] == 10
    assert look(newest).kind == "run"
    (run / "ckptmgr.json").unlink()
    assert "ckptmgr.json is missing" in look(run).problems


def test_a_reference_that_nothing_answers_to_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        sniff(f"{run}@999")
    with pytest.raises(RunNotFoundError):
        sniff(f"{tmp_path}/no@10")
    torch.save({"w": torch.ones(1)}, tmp_path / "a@1.pt")
    assert look(tmp_path / "a@1.pt").kind == "state-dict"


def test_a_run_of_a_checkpointer_lists_its_modules_with_what_is_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 3, bias=False)
            self.out = nn.Linear(3, 3, bias=False)
            self.out.weight = self.inside.weight

    with Checkpointer(tmp_path / "run", state={"model": Tied(), "other": net()}, every_n_steps=1) as manager:
        manager.resume()
        manager.step(1)
    artifact = look(tmp_path / "run")
    tied = {fact.name: fact.tied_to for fact in artifact.tensors or ()}
    assert tied["model.out.weight"] == "model.inside.weight" or tied["model.inside.weight"] == "model.out.weight"
    assert shapes(artifact)["other.0.weight"] == ("float32", (3, 2))
    assert artifact.versions["torch"] == torch.__version__


def test_directories_of_runs_point_to_the_list(run: Path) -> None:
    artifact = look(run.parent)
    assert artifact.kind == "directory"
    assert "1 run of ckptmgr" in artifact.title
    assert artifact.advice == (f"ckptmgr ls {run.parent}",)


def test_recognising_never_imports_torch(run: Path) -> None:
    torch.save(net(), run.parent / "x.pt")
    code = (
        "import sys; from ckptmgr.diagnose.sniff import sniff\n"
        "for place in sys.argv[1:]: sniff(place)\n"
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run), str(run.parent / "x.pt")], check=True)


def test_an_imported_run_is_told_how_to_go_on_and_not_to_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, "train.pt")
    import_run("train.pt", "run")
    artifact = look("run")
    assert not any("ckptmgr resume" in line for line in artifact.advice)
    (line,) = (line for line in artifact.advice if line.startswith("to train on: "))
    assert command(["resume", "run"]) == 1
    assert line in capsys.readouterr().err
    other = net()
    again = torch.optim.SGD(other.parameters(), lr=0.5)
    names = {"Checkpointer": Checkpointer, "model": other, "optimizer": again, "NEW_RUN_DIR": "next"}
    assert eval(line.removeprefix("to train on: "), names) == 0
    assert torch.equal(other[0].weight, model[0].weight)
    assert again.param_groups[0]["lr"] == 0.1
