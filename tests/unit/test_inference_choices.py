"""What `load_inference` takes of a checkpoint, what it makes of what it is given, and what it refuses to guess."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

from ckptmgr import Checkpointer, Golden, load_inference
from ckptmgr.errors import CorruptCheckpointError, FormatVersionError, StateMismatchError, UsageError
from ckptmgr.golden.stored import stored_golden
from ckptmgr.state.entry import CapturedEntry


class Plain(nn.Module):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.float())
        return out


def fitted(scale: float) -> StandardScaler:
    return StandardScaler().fit([[0.0, 0.0], [scale, scale]])


def saved_with(run_dir: Path, state: dict[str, Any], golden: Any = None, *, steps: int = 1) -> str:
    with Checkpointer(run_dir, {"model": Plain(), **state}, every_n_steps=1, golden=golden, background=False) as ckpt:
        ckpt.resume()
        for step in range(1, steps + 1):
            ckpt.step(step)
    return str(run_dir)


@pytest.mark.parametrize("golden", [None, [[1.0, 2.0]]])
def test_of_several_preprocessors_the_one_of_that_name_is_meant(tmp_path: Path, golden: Any) -> None:
    reference = saved_with(tmp_path, {"preprocessor": fitted(2.0), "of_labels": fitted(6.0)}, golden)
    assert load_inference(reference, model=Plain).preprocessor.mean_[0] == 1.0


def test_what_took_no_part_in_the_golden_samples_takes_none_in_the_proof(tmp_path: Path) -> None:
    reference = saved_with(tmp_path, {"of_labels": fitted(6.0)}, [[[1.0, 2.0]]])
    loaded = load_inference(reference, model=Plain)
    assert (loaded.preprocessor, loaded.ngolden) == (None, 1)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out


def test_a_preprocessor_that_is_a_module_predicts_in_eval_mode(tmp_path: Path) -> None:
    reference = saved_with(tmp_path, {"preprocessor": Normalised()}, [torch.ones(1, 2)])
    loaded = load_inference(reference, model=Plain, preprocessor=Normalised())
    assert not loaded.preprocessor.training
    assert loaded.predict(torch.ones(1, 2)).shape == (1, 2)


def test_of_an_older_checkpoint_that_is_taken_instead_nothing_is_left_out(tmp_path: Path) -> None:
    can_predict = [True]

    def predict(model: nn.Module, inputs: torch.Tensor) -> Any:
        if not can_predict[0]:
            raise RuntimeError("out of something")
        return model(inputs)

    with Checkpointer(
        tmp_path, {"model": Plain()}, every_n_steps=1, golden=Golden([[[1.0, 2.0]]], predict=predict), background=False
    ) as ckpt:
        ckpt.resume()
        ckpt.step(1)
        can_predict[0] = False
        ckpt.step(2)
    can_predict[0] = True
    (newest,) = tmp_path.glob("checkpoints/0000000002-*/model.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    loaded = load_inference(str(tmp_path), model=Plain, predict=predict)
    assert (loaded.step, loaded.ngolden) == (1, 1)


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def encode(self, preprocessor: Any, raw: Any) -> torch.Tensor:
        return torch.tensor(raw) * self.factor

    __call__ = encode


def scaled(preprocessor: Any, raw: Any, factor: float) -> torch.Tensor:
    return torch.tensor(raw) * factor


@pytest.mark.parametrize(
    "encode",
    [lambda _, raw: torch.tensor(raw), functools.partial(scaled, factor=2.0), Scaled(2.0), Scaled(2.0).encode],
    ids=["lambda", "partial", "object", "method"],
)
def test_a_function_that_no_name_leads_to_is_asked_for(tmp_path: Path, encode: Any) -> None:
    reference = saved_with(tmp_path, {}, Golden([[[1.0, 2.0]]], encode=encode))
    assert load_inference(reference, model=Plain, encode=encode).ngolden == 1
    assert load_inference(reference, model=Plain, golden=False).ngolden is None
    for allow in ([], [f"{__name__}.Scaled", f"{__name__}.Scaled.encode", "functools.partial"]):
        with pytest.raises(UsageError, match=r"made with encode=(?s:.)*next: +load_inference\(\.\.\., encode="):
            load_inference(reference, model=Plain, allow=allow)


def doubled(preprocessor: Any, raw: Any) -> torch.Tensor:
    return torch.tensor(raw) * 2


def test_a_partial_without_arguments_is_its_function(tmp_path: Path) -> None:
    reference = saved_with(tmp_path, {}, Golden([[[1.0, 2.0]]], encode=functools.partial(doubled)))
    assert load_inference(reference, model=Plain, allow=[f"{__name__}.doubled"]).ngolden == 1


def test_a_model_without_memory_is_not_taken_for_a_damaged_checkpoint(tmp_path: Path) -> None:
    reference = saved_with(tmp_path, {})
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(StateMismatchError, match=r"on the meta device(?s:.)*next: +materialise it"):
        load_inference(reference, model=model)


class WantsMore(Plain):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width)


@pytest.mark.parametrize(("model", "words"), [(WantsMore, "argument: 'width'"), ("a.b:C", "nothing that makes one")])
def test_what_cannot_make_the_model_is_told(tmp_path: Path, model: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_inference(saved_with(tmp_path, {}), model=model)


def test_a_model_that_is_built_has_the_precision_of_the_run(tmp_path: Path) -> None:
    reference = saved_with(tmp_path / "half", {"model": Plain().bfloat16()})
    assert load_inference(reference, model=Plain).model.layer.weight.dtype == torch.bfloat16
    mixed = Plain()
    mixed.layer.bias.data = mixed.layer.bias.data.double()
    reference = saved_with(tmp_path / "mixed", {"model": mixed})
    loaded = load_inference(reference, model=Plain)
    assert [parameter.dtype for parameter in loaded.model.parameters()] == [torch.float32, torch.float64]
    with pytest.raises(StateMismatchError, match="float64"):
        load_inference(reference, model=Plain())


def with_golden(tree: Any, *, version: int = 1) -> dict[str, CapturedEntry]:
    return {"g": CapturedEntry("g", "golden", version, tree)}


def golden_tree(**changed: Any) -> dict[str, Any]:
    sample = {"raw": "a", "inputs": 1, "output": 2}
    tree = {"samples": [sample], "rtol": None, "atol": 0.5, "device": "cpu", "encode": None, "predict": None}
    return tree | changed


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        "text",
        {},
        golden_tree(samples=5),
        golden_tree(samples=[5]),
        golden_tree(samples=[{"raw": "a"}]),
        golden_tree(samples=[golden_tree()["samples"][0]] * 65),
        golden_tree(rtol="x"),
        golden_tree(rtol=-1.0),
        golden_tree(atol=float("inf")),
        golden_tree(device=3),
        golden_tree(encode="os.system"),
        golden_tree(predict={"name": 3, "source": None}),
        golden_tree(predict={"name": "a:b", "source": 3}),
    ],
)
def test_what_are_no_golden_samples_is_told(tree: Any) -> None:
    assert stored_golden(with_golden(golden_tree()), reference="r") == golden_tree()
    with pytest.raises(CorruptCheckpointError, match="no golden samples"):
        stored_golden(with_golden(tree), reference="r")


def test_golden_samples_of_a_newer_version_are_told() -> None:
    with pytest.raises(FormatVersionError, match="version 2"):
        stored_golden(with_golden({}, version=2), reference="r")
    assert stored_golden(with_golden(golden_tree(samples=[])), reference="r") is None
    assert stored_golden({}, reference="r") is None


SCRIPT = """
from dataclasses import dataclass

import torch
from torch import nn
from ckptmgr import Checkpointer, Golden


@dataclass
class Scale:
    factor: float = 2.0

    def __call__(self, raw):
        return torch.tensor(raw) * self.factor


def encode(preprocessor, raw):
    return preprocessor(raw)


if __name__ == "__main__":
    state = {"model": nn.Linear(2, 1), "preprocessor": Scale()}
    with Checkpointer("run", state, golden=Golden([[1.0, 2.0]], encode=encode)) as ckpt:
        ckpt.resume()
        ckpt.step(1)
"""


def test_what_a_script_defines_is_found_by_those_that_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scriptofmine.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    subprocess.run([sys.executable, "scriptofmine.py"], check=True)
    module = importlib.import_module("scriptofmine")
    given = load_inference(
        "run", model=lambda: nn.Linear(2, 1), preprocessor=module.Scale(0.5 * 4), encode=module.encode
    )
    assert given.ngolden == 1
    built = load_inference("run", model=lambda: nn.Linear(2, 1), allow=["scriptofmine.*", "scriptofmine.encode"])
    assert built.preprocessor == module.Scale()
    sys.modules.pop("scriptofmine")
