"""Golden samples leave no trace in the training, and say where something is not what it was."""

import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_state import bits
from sklearn.preprocessing import StandardScaler
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.errors import GoldenSampleError, UsageError
from ckptmgr.golden.compare import compare_golden
from ckptmgr.golden.quiet import quiet_evaluation
from ckptmgr.golden.record import capture_golden
from ckptmgr.golden.run import Chain
from ckptmgr.golden.samples import Golden
from ckptmgr.loading import load_checkpoint
from ckptmgr.state.rng import capture_rng


class Net(nn.Module):
    """Everything that a careless look would disturb: batch norm, dropout, a counter, a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
        self.frozen = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.noise: float = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.frozen(self.layers(x))
        return out + self.noise * torch.rand_like(out)


def samples(count: int = 2) -> list[list[list[float]]]:
    return [[[float(i), 1.0, -1.0, 0.5]] for i in range(count)]


def train(run_dir: Path, golden: Any, *, steps: int = 6, every: int = 2) -> tuple[Net, Any]:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    net = Net()
    net.frozen.eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    with Checkpointer(
        run_dir, {"model": net, "optimizer": optimizer}, every_n_steps=every, golden=golden, background=False
    ) as ckpt:
        step = ckpt.resume()
        while step < steps:
            loss = net(torch.randn(8, 4) + random.random() + np.random.rand()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            ckpt.step(step)
    return net, optimizer


def test_training_with_golden_samples_is_bit_identical_to_training_without(tmp_path: Path) -> None:
    plain, plain_optimizer = train(tmp_path / "plain", None)
    rng = capture_rng()
    watched, optimizer = train(tmp_path / "watched", samples())
    assert bits(watched.state_dict()) == bits(plain.state_dict())
    assert bits(optimizer.state_dict()) == bits(plain_optimizer.state_dict())
    assert bits(capture_rng()) == bits(rng)
    assert [part.training for part in watched.modules()] == [part.training for part in plain.modules()]
    assert not watched.frozen.training


def test_each_checkpoint_has_what_its_own_weights_predict(tmp_path: Path) -> None:
    train(tmp_path, samples())
    outputs = []
    for step in (2, 4, 6):
        loaded = load_checkpoint(f"{tmp_path}@{step}")
        net = Net()
        net.load_state_dict(loaded.entries["model"].tree["tensors"])
        tree = loaded.entries["ckptmgr_golden"].tree
        assert compare_golden(tree, Chain(net)) == []
        outputs.append(tree["samples"][0]["output"])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_run_with_golden_samples_resumes(tmp_path: Path) -> None:
    straight, _ = train(tmp_path / "straight", samples(), steps=8)
    train(tmp_path / "cut", samples(), steps=4)
    resumed, _ = train(tmp_path / "cut", samples(), steps=8)
    assert bits(resumed.state_dict()) == bits(straight.state_dict())


def test_golden_samples_may_be_left_out_or_added_later(tmp_path: Path) -> None:
    train(tmp_path, None, steps=2)
    train(tmp_path, samples(), steps=4)
    train(tmp_path, None, steps=6)
    stored = ["ckptmgr_golden" in load_checkpoint(f"{tmp_path}@{step}").entries for step in (2, 4, 6)]
    assert stored == [False, True, False]


def test_what_a_model_draws_is_the_same_each_time_and_the_training_draws_on() -> None:
    net = Net()
    net.noise = 1.0
    state = capture_rng()
    entry = capture_golden("golden", Golden(samples()), net, None)
    assert bits(capture_rng()) == bits(state)
    torch.rand(5)
    assert compare_golden(entry.tree, Chain(net)) == []


def test_buffers_that_a_forward_replaces_are_put_back() -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x.clone()
            return x

    module = Replacing()
    before = module.last
    with quiet_evaluation(module):
        module(torch.ones(2))
    assert module.last is before
    assert module.last.tolist() == [0, 0]


def test_a_raising_forward_leaves_no_trace_either() -> None:
    net = Net()
    state, rng = bits(net.state_dict()), bits(capture_rng())
    with pytest.raises(GoldenSampleError, match=r"golden sample 1 cannot be given to the model"):
        capture_golden("golden", Golden([samples()[0], [[1.0, 2.0]]]), net, None)
    assert bits(net.state_dict()) == state
    assert bits(capture_rng()) == rng
    assert net.training


def test_a_sample_that_raises_before_training_is_told_before_anything_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(GoldenSampleError, match=r"golden sample 0.*\n.*mat1 and mat2"):
        train(tmp_path / "run", [[[1.0]]])
    assert not (tmp_path / "run").exists()


def test_a_sample_that_raises_later_costs_its_save_the_samples_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def predict(model: nn.Module, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of something")
        return model(inputs)

    with caplog.at_level(logging.WARNING, "ckptmgr"):
        train(tmp_path, Golden(samples(1), predict=predict))
    assert "saving without golden samples" in caplog.text
    assert "out of something" in caplog.text
    stored = ["ckptmgr_golden" in load_checkpoint(f"{tmp_path}@{step}").entries for step in (2, 4, 6)]
    assert stored == [True, False, True]


def with_changed_weight(net: Net) -> None:
    with torch.no_grad():
        net.layers[4].bias[1] += 0.5


def with_dropout(net: Net) -> None:
    net.layers[2].forward = lambda x: nn.functional.dropout(x, 0.9)  # also in eval mode


@pytest.mark.parametrize("change", [with_changed_weight, with_dropout])
def test_a_model_that_predicts_otherwise_is_named_with_place_and_values(change: Callable[[Net], None]) -> None:
    torch.manual_seed(0)
    net = Net()
    entry = capture_golden("golden", Golden(samples()), net, None)
    change(net)
    difference = compare_golden(entry.tree, Chain(net))[0]
    assert (difference.index, difference.stage) == (0, "model")
    assert "the value[0, " in difference.what
    assert " then, " in difference.what
    assert "rtol=1.3e-06" in difference.what


def encode(_: Any, raw: str) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([[float(ord(letter)) for letter in raw]])}


def test_a_difference_in_preprocessing_is_not_taken_for_one_in_the_model() -> None:
    net = Net()
    entry = capture_golden("golden", Golden(["abcd", "Abcd"], encode=encode), net, None)
    (difference,) = compare_golden(entry.tree, Chain(net, encode=lambda _, raw: encode(_, raw.lower())))
    assert (difference.index, difference.stage, difference.raw) == (1, "preprocessing", "Abcd")
    assert difference.what.startswith("['x'][0, 0] was 65.0 then, 97.0 now")


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (torch.ones(2), torch.ones(3), r"float32 \(2,\) then, float32 \(3,\) now"),
        (torch.tensor([1]), torch.tensor([2]), r"\[0\] was 1 then, 2 now"),
        (torch.tensor([0.5]), torch.tensor([float("nan")]), r"was 0\.5 then, nan now"),
        ({"a": 1}, {"b": 1}, r"keys a then, b now"),
        ([1, 2], [1], r"2 items then, 1 now"),
        ({"label": "cat"}, {"label": "dog"}, r"\['label'\] was 'cat' then, 'dog' now"),
        (0.5, 0.75, r"was 0\.5 then, 0\.75 now"),
        (1, True, r"was 1 then, True now"),
    ],
)
def test_every_kind_of_prediction_is_compared(then: Any, now: Any, words: str) -> None:
    entry = capture_golden("golden", Golden([[1.0]], predict=lambda *_: then), nn.Identity(), None)
    (difference,) = compare_golden(entry.tree, Chain(nn.Identity(), predict=lambda *_: now))
    assert re.search(words, difference.what)
    assert compare_golden(entry.tree, Chain(nn.Identity(), predict=lambda *_: then)) == []


def test_nan_that_was_nan_is_no_difference() -> None:
    value = torch.tensor([float("nan"), float("inf")])
    entry = capture_golden("golden", Golden([[1.0]], predict=lambda *_: value), nn.Identity(), None)
    assert compare_golden(entry.tree, Chain(nn.Identity(), predict=lambda *_: value.clone())) == []


def test_tolerances_of_the_user_hold() -> None:
    golden = Golden([[1.0]], predict=lambda *_: torch.tensor([1.0]), rtol=0, atol=0.1)
    entry = capture_golden("golden", golden, nn.Identity(), None)
    near, far = (Chain(nn.Identity(), predict=lambda *_, n=n: torch.tensor([n])) for n in (1.09, 1.11))
    assert compare_golden(entry.tree, near) == []
    assert len(compare_golden(entry.tree, far)) == 1


@pytest.mark.parametrize(
    "golden", ["text", [], [0] * 65, {"a": 1}, 5, Golden], ids=["text", "none", "65", "dict", "number", "class"]
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, golden: Any) -> None:
    with pytest.raises(UsageError):
        Checkpointer(tmp_path, {"model": nn.Linear(1, 1)}, golden=golden)


def test_golden_samples_need_a_model_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model for them"):
        Checkpointer(tmp_path, {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, golden=[1.0])
    Checkpointer(tmp_path, {"model": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, golden=[1.0])


def test_a_prediction_that_cannot_be_stored_is_told(tmp_path: Path) -> None:
    with pytest.raises(GoldenSampleError, match=r"golden sample 0(?s:.)*holds a builtins\.object"):
        train(tmp_path, Golden(samples(1), predict=lambda *_: object()))


def test_a_half_precision_model_gets_half_precision_input() -> None:
    net = nn.Linear(4, 2).bfloat16()
    entry = capture_golden("golden", Golden(samples()), net, None)
    assert entry.tree["samples"][0]["output"].dtype == torch.bfloat16


class Merging(nn.Module):
    """A layer with a low-rank part that it merges into its weight for eval mode, as LoRA's do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))
        self.low = nn.Parameter(torch.randn(2, 4))
        self.is_merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += -self.low if mode else self.low
            self.is_merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight if self.is_merged else self.weight + self.low).T


def test_a_module_that_merges_its_weights_for_eval_mode_is_left_unmerged() -> None:
    net = nn.Sequential(Merging())
    before = bits(net.state_dict())
    entry = capture_golden("golden", Golden(samples()), net, None)
    assert not net[0].is_merged
    assert bits(net.state_dict()) == before
    assert compare_golden(entry.tree, Chain(net.eval())) == []


class ChangesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0)


@pytest.mark.parametrize("raw", [torch.ones(1, 2), np.ones((1, 2), dtype=np.float32)], ids=["tensor", "array"])
def test_a_model_that_changes_its_input_changes_no_sample(raw: Any) -> None:
    golden = Golden([raw])
    for _ in range(2):
        entry = capture_golden("golden", golden, ChangesInput(), None)
        (sample,) = entry.tree["samples"]
        assert [float(value[0, 0]) for value in (sample["raw"], sample["inputs"], sample["output"])] == [1.0, 1.0, 2.0]
        assert compare_golden(entry.tree, Chain(ChangesInput())) == []


def test_an_encode_that_takes_its_raw_input_apart_has_it_whole_the_next_time() -> None:
    golden = Golden([{"text": [1.0, 2.0]}], encode=lambda _, raw: torch.tensor(raw.pop("text")))
    for _ in range(2):
        entry = capture_golden("golden", golden, nn.Identity(), None)
        assert entry.tree["samples"][0]["raw"] == {"text": [1.0, 2.0]}


class TakesTwo(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, x - y


def test_a_tuple_is_several_arguments_also_when_it_comes_back(tmp_path: Path) -> None:
    raw = (torch.ones(2), torch.ones(2))
    with Checkpointer(tmp_path, {"model": TakesTwo()}, golden=[raw], background=False) as ckpt:
        ckpt.resume()
        ckpt.step(1)
        ckpt.save()
    tree = load_checkpoint(str(tmp_path)).entries["ckptmgr_golden"].tree
    assert compare_golden(tree, Chain(TakesTwo())) == []
    sample = tree["samples"][0]
    # As versions that knew no tuples have stored it.
    as_list = {**tree, "samples": [{**sample, "output": list(sample["output"])}]}
    assert compare_golden(as_list, Chain(TakesTwo())) == []


def test_a_double_precision_model_gets_double_precision_input() -> None:
    entry = capture_golden("golden", Golden(samples()), nn.Linear(4, 2).double(), None)
    assert entry.tree["samples"][0]["output"].dtype == torch.float64


def scaler(*values: float) -> StandardScaler:
    made = StandardScaler()
    return made.fit([[value, 1.0] for value in values]) if values else made


def with_scaler(run_dir: Path, preprocessor: Any, **arguments: Any) -> int:
    state = {"model": nn.Linear(2, 1), "preprocessor": preprocessor}
    with Checkpointer(run_dir, state, golden=[[1.0, 2.0]], background=False, **arguments) as ckpt:
        step = ckpt.resume()
        ckpt.step(step + 1)
    return step


def test_an_unfitted_preprocessor_is_filled_before_it_has_to_preprocess_golden_samples(tmp_path: Path) -> None:
    with_scaler(tmp_path, scaler(1.0, 3.0))
    unfitted = scaler()
    assert with_scaler(tmp_path, unfitted) == 1
    assert unfitted.mean_[0] == 2.0
    assert "ckptmgr_golden" in load_checkpoint(f"{tmp_path}@2").entries


def test_an_unfitted_preprocessor_that_nothing_fills_claims_nothing(tmp_path: Path) -> None:
    with pytest.raises(GoldenSampleError, match="not fitted"):
        with_scaler(tmp_path / "fresh", scaler())
    assert not (tmp_path / "fresh").exists()
    with Checkpointer(tmp_path / "without", {"model": nn.Linear(2, 1)}, background=False) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    before = sorted((tmp_path / "without").rglob("*"))
    for resume in ("auto", "never"):
        with pytest.raises(GoldenSampleError, match="not fitted"):
            with_scaler(tmp_path / "without", scaler(), resume=resume)
    assert sorted((tmp_path / "without").rglob("*")) == before


def test_a_sample_that_the_filled_preprocessor_refuses_is_told_and_the_attempt_let_go(tmp_path: Path) -> None:
    with_scaler(tmp_path, scaler(1.0, 3.0))
    state = {"model": nn.Linear(2, 1), "preprocessor": scaler()}
    ckpt = Checkpointer(tmp_path, state, golden=[[1.0, 2.0, 3.0]], background=False)
    with pytest.raises(GoldenSampleError, match="3 features"):
        ckpt.resume()
    assert with_scaler(tmp_path, scaler()) == 1
