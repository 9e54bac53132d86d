"""The doctor on real files: what people have when something does not load, and what they are told."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.cli.main import run

pytest.importorskip("ckptmgr.diagnose.sniff", reason="what recognises files is not there")

Output = pytest.CaptureFixture[str]

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, body="body", nclasses=3):
        super().__init__()
        self.add_module(body, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)))
        self.head = nn.Linear(8, nclasses)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "filed_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "filed_net", raising=False)
    import filed_net  # type: ignore[import-not-found]

    return filed_net.Net()


def doctor(capsys: Output, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = run(["doctor", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_state_dict_of_ddp_is_told_with_the_code_that_loads_it(net: nn.Module, capsys: Output) -> None:
    torch.save(nn.DataParallel(net).state_dict(), "ddp.pt")
    status, found = doctor(capsys, "ddp.pt", "--model", "filed_net:Net")
    assert status == 1
    scope: dict[str, Any] = {}
    exec("\n".join(found["code"]), scope)
    for name, tensor in net.state_dict().items():
        assert torch.equal(scope["model"].state_dict()[name], tensor)


def test_a_trainers_dict_is_read_at_its_key(net: nn.Module, capsys: Output) -> None:
    torch.save({"epoch": 3, "model": net.state_dict(), "args": {"lr": 0.1}}, "train.pt")
    status, found = doctor(capsys, "train.pt", "--model", "filed_net:Net", "--model-arg", "body=trunk")
    assert status == 1
    scope: dict[str, Any] = {}
    exec("\n".join(found["code"]), scope)
    assert torch.equal(scope["model"].trunk[0].weight, net.get_parameter("body.0.weight"))


def test_a_whole_module_whose_class_is_gone_is_told_without_importing_it(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net, "whole.pt")
    (tmp_path / "filed_net.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr", "doctor", "whole.pt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "a whole pickled module of class filed_net.Net" in done.stdout
    assert "code: filed_net.Net" in done.stdout


def test_a_malicious_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (Path("was-here"),)

    class Worse:
        def __reduce__(self) -> tuple[object, ...]:
            import os

            return os.system, ("touch was-here",)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([Evil(), Worse()]))
    assert run(["doctor", "evil.pkl"]) == 1
    assert "DANGEROUS" in capsys.readouterr().out
    assert not (tmp_path / "was-here").exists()


def test_a_file_that_was_cut_off_leaves_with_12(net: nn.Module, tmp_path: Path) -> None:
    save_file(net.state_dict(), "model.safetensors")
    torch.save(net.state_dict(), "model.pt")
    for name in ("model.safetensors", "model.pt"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        assert run(["doctor", name]) == 12
    (tmp_path / "empty.pt").touch()
    assert run(["doctor", "empty.pt"]) == 12
    assert run(["doctor", "nowhere.pt"]) == 10


def test_two_files_that_hold_the_same_fit(net: nn.Module, capsys: Output) -> None:
    save_file(net.state_dict(), "one.safetensors")
    torch.save(net.state_dict(), "other.pt")
    assert doctor(capsys, "one.safetensors", "--against", "other.pt")[0] == 0


def test_a_run_of_ours_is_compared_and_its_selection_restores_it(net: nn.Module, capsys: Output) -> None:
    import filed_net

    from ckptmgr import Selection

    with Checkpointer("run", {"model": net}, every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    assert doctor(capsys, "run", "--model", "filed_net:Net")[0] == 0
    status, found = doctor(
        capsys, "run@latest", "--model", "filed_net:Net", "--model-arg", "body=trunk", "--model-arg", "nclasses=4"
    )
    assert status == 1
    new = filed_net.Net("trunk", 4)
    with Checkpointer("new", {"model": new}, every_n_steps=1) as ckpt:
        ckpt.restore(found["reference"], selection=eval(found["selection"], {"Selection": Selection}))
    assert torch.equal(new.trunk[2].weight, net.get_parameter("body.2.weight"))


def test_a_damaged_run_of_ours_leaves_with_12(net: nn.Module, tmp_path: Path) -> None:
    with Checkpointer("run", {"model": net}, every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    next((tmp_path / "run").glob("checkpoints/*/*.safetensors")).unlink()
    assert run(["doctor", "run@1"]) == 12


def test_what_does_not_fit_is_not_advised_to_be_loaded_as_it_is(net: nn.Module, capsys: Output) -> None:
    torch.save(net.state_dict(), "state.pt")
    torch.save(net, "whole.pt")
    for name in ("state.pt", "whole.pt"):
        line = (name, "--model", "filed_net:Net", "--model-arg", "nclasses=9")
        assert run(["doctor", *line]) == 1
        assert "model.load_state_dict(torch.load(" not in capsys.readouterr().out.partition("next:")[2]
        status, found = doctor(capsys, *line)
        assert status == 1
        assert not any("load_state_dict(" in advice for advice in found["advice"])
    assert any("load_state_dict(" in advice for advice in doctor(capsys, "state.pt")[1]["advice"])


def test_the_contents_of_a_whole_module_are_its_own(net: nn.Module, capsys: Output) -> None:
    net.width = 8
    net.register_buffer("scratch", torch.ones(1), persistent=False)
    torch.save(net, "whole.pt")
    found = doctor(capsys, "whole.pt")[1]
    assert found["contents"]["class"] == "filed_net.Net"
    assert found["contents"]["body"] == "torch.nn.modules.container.Sequential"
    assert found["contents"]["width"] == "8"
    assert not any(name.startswith("_") for name in found["contents"])
    assert "scratch" not in {tensor["name"] for tensor in found["tensors"]}
    assert doctor(capsys, "whole.pt", "--model", "filed_net:Net")[1]["difference"]["fits"]
