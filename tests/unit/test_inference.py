"""A checkpoint as something that predicts: as it was, or refused."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

import ckptmgr
from ckptmgr import Checkpointer, Golden, load_inference
from ckptmgr.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GoldenMismatchError,
    NotAllowedError,
    StateMismatchError,
    UsageError,
)

WORDS = ["[UNK]", "good", "bad", "film", "Good", "Bad", "a", "very"]
SAMPLES = ["a good film", "a Bad film", "very bad"]


def tokenizer(*, lowercase: bool = False) -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


class Classifier(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(len(WORDS), width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.drop(self.embed(ids)))
        return out


def train(run_dir: Path, preprocessor: Any, golden: Any = SAMPLES, *, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = model or Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    state = {"model": net, "optimizer": optimizer, "preprocessor": preprocessor}
    with Checkpointer(
        run_dir, {name: value for name, value in state.items() if value is not None}, golden=golden, background=False
    ) as ckpt:
        first = ckpt.resume() + 1
        for step in range(first, first + 3):
            optimizer.zero_grad()
            net.train()
            sum(p.square().sum() for p in net.parameters()).backward()
            optimizer.step()
            ckpt.step(step)
        ckpt.save()
    return net


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    train(tmp_path / "run", tokenizer())
    return str(tmp_path / "run")


def test_a_text_classifier_comes_back_with_its_tokenizer(tmp_path: Path) -> None:
    net = train(tmp_path, tokenizer())
    loaded = load_inference(str(tmp_path), model=Classifier)
    assert not loaded.model.training
    assert (loaded.step, loaded.ngolden) == (3, 3)
    assert loaded.preprocessor.encode("a Bad film").ids == tokenizer().encode("a Bad film").ids
    net.eval()
    wanted = net(torch.tensor([tokenizer().encode("very Good").ids]))
    assert torch.equal(loaded.predict("very Good"), wanted)


def test_a_tokenizer_that_lower_cases_now_is_refused_with_the_first_differing_token(classifier: str) -> None:
    with pytest.raises(StateMismatchError) as refusal:
        load_inference(classifier, model=Classifier, preprocessor=tokenizer(lowercase=True))
    text = str(refusal.value)
    assert text.startswith("the preprocessor given is not the one that")
    assert "sample 1, 'a Bad film': token 1 is 'Bad' (id 5) in the checkpoint, 'bad' (id 2) now" in text
    assert "normalizer" in text


def test_a_vocabulary_with_other_ids_is_refused(classifier: str) -> None:
    other = Tokenizer(models.WordLevel({word: i for i, word in enumerate(sorted(WORDS))}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(StateMismatchError, match="sample 0, 'a good film': token"):
        load_inference(classifier, model=Classifier, preprocessor=other)


def test_the_same_tokenizer_may_be_given(classifier: str) -> None:
    assert load_inference(classifier, model=Classifier, preprocessor=tokenizer()).ngolden == 3


def test_training_goes_on_with_the_same_tokenizer_only(classifier: str) -> None:
    with pytest.raises(StateMismatchError, match=r"normalizer"):
        train(Path(classifier), tokenizer(lowercase=True))
    train(Path(classifier), tokenizer())


class ForgetsDropout(Classifier):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(nn.functional.dropout(self.embed(ids), 0.9))
        return out


class OtherFormula(Classifier):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embed(ids)).softmax(-1)
        return out


@pytest.mark.parametrize("changed", [ForgetsDropout, OtherFormula])
def test_code_that_predicts_otherwise_with_the_same_weights_is_caught(classifier: str, changed: Any) -> None:
    with pytest.raises(GoldenMismatchError, match=r"golden sample 0(?s:.)*what the model makes of it(?s:.)*then"):
        load_inference(classifier, model=changed)
    assert load_inference(classifier, model=changed, golden=False).ngolden is None


def test_another_encode_is_caught_in_preprocessing(tmp_path: Path) -> None:
    def cut(preprocessor: Any, raw: str) -> torch.Tensor:
        return torch.tensor([preprocessor.encode(raw).ids[:2]])

    train(tmp_path, tokenizer())
    with pytest.raises(GoldenMismatchError, match="what preprocessing makes of it"):
        load_inference(str(tmp_path), model=Classifier, encode=cut)


def encode_two(preprocessor: Any, raw: str) -> torch.Tensor:
    return torch.tensor([preprocessor.encode(raw).ids[:2]])


def test_a_function_of_the_golden_samples_is_given_or_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, tokenizer(), Golden(SAMPLES, encode=encode_two))
    with pytest.raises(UsageError, match=r"encode=test_inference:encode_two"):
        load_inference(str(tmp_path), model=Classifier)
    assert load_inference(str(tmp_path), model=Classifier, encode=encode_two).ngolden == 3
    allowed = load_inference(str(tmp_path), model=Classifier, allow=["test_inference.encode_two"])
    assert allowed.predict("a good film").shape == (1, 2)

    def other(preprocessor: Any, raw: str) -> torch.Tensor:
        return encode_two(preprocessor, raw)

    with caplog.at_level(logging.WARNING, "ckptmgr"):
        load_inference(str(tmp_path), model=Classifier, encode=other)
    assert "is not what it was at the save" in caplog.text


def test_without_golden_samples_it_loads_and_says_that_nothing_is_proved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, tokenizer(), None)
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        loaded = load_inference(str(tmp_path), model=Classifier)
    assert loaded.ngolden is None
    assert "no golden samples" in caplog.text


def test_nothing_of_the_run_is_changed(classifier: str) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in Path(classifier).rglob("*") if p.is_file()}

    before = files()
    load_inference(classifier, model=Classifier).predict("a film")
    assert files() == before


def test_a_fitted_scaler_comes_back_fitted(tmp_path: Path) -> None:
    scaler = StandardScaler().fit(np.array([[0.0, 10.0], [2.0, 30.0]]))
    train(tmp_path, scaler, [[1.0, 20.0], [5.0, 5.0]], model=nn.Linear(2, 1))
    loaded = load_inference(str(tmp_path), model=nn.Linear(2, 1))
    assert loaded.preprocessor.mean_.tolist() == [1.0, 20.0]
    assert loaded.ngolden == 2


class Normalise(nn.Module):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Any) -> torch.Tensor:
        return (torch.as_tensor(x) - self.mean) / self.std


def test_code_that_only_the_checkpoint_names_is_not_imported(tmp_path: Path) -> None:
    train(tmp_path, Normalise(0.5, 2.0), [[1.0, 2.0]], model=nn.Linear(2, 1))
    with pytest.raises(NotAllowedError, match=r"test_inference\.Normalise"):
        load_inference(str(tmp_path), model=nn.Linear(2, 1))
    allowed = load_inference(str(tmp_path), model=nn.Linear(2, 1), allow=["test_inference.Normalise"])
    assert (allowed.preprocessor.mean, allowed.preprocessor.std) == (0.5, 2.0)
    given = load_inference(str(tmp_path), model=nn.Linear(2, 1), preprocessor=Normalise(0.5, 2.0))
    assert given.ngolden == 1


def test_a_module_with_another_setting_is_caught(tmp_path: Path) -> None:
    train(tmp_path, Normalise(0.5, 2.0), [[1.0, 2.0]], model=nn.Linear(2, 1))
    with pytest.raises((StateMismatchError, GoldenMismatchError), match=r"mean|preprocessing"):
        load_inference(str(tmp_path), model=nn.Linear(2, 1), preprocessor=Normalise(0.4, 2.0))


def test_a_model_that_does_not_fit_is_told_completely(classifier: str) -> None:
    with pytest.raises(StateMismatchError, match=r"head\.weight"):
        load_inference(classifier, model=Classifier(width=7))


def test_what_is_not_there_or_not_whole_is_told(classifier: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        load_inference(f"{classifier}@77", model=Classifier)
    (path,) = Path(classifier).glob("checkpoints/*/preprocessor.tokenizer.json")
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))
    with pytest.raises(CorruptCheckpointError, match=r"preprocessor\.tokenizer\.json"):
        load_inference(f"{classifier}@3", model=Classifier)


def test_without_a_model_somebody_must_say_how_to_build_one(classifier: str) -> None:
    with pytest.raises(UsageError, match="nothing says how to build the model"):
        load_inference(classifier)


def test_wrappers_and_prefixes_are_no_obstacle(classifier: str) -> None:
    wrapped = nn.DataParallel(Classifier())
    assert load_inference(classifier, model=wrapped).ngolden == 3


PACKAGE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(2, width)

    def forward(self, x):
        return self.layer(x)


class Scale:
    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, raw):
        return torch.tensor(raw) * self.factor

    def to_dict(self):
        return {"factor": self.factor}

    @classmethod
    def from_dict(cls, state):
        return cls(**state)


def loop(checkpointer, model, optimizer, preprocessor):
    step = checkpointer.resume()
    while step < 3:
        model(preprocessor([1.0, 2.0])).sum().backward()
        optimizer.step()
        step += 1
        checkpointer.step(step)
"""

CONFIG = """
seed: 1
loop: {_target_: infpkg.loop}
model: {_target_: infpkg.Net, width: 5}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
state: {preprocessor: {_target_: infpkg.Scale, factor: 0.5}}
checkpoint: {every_n_steps: 1, golden: [[1.0, 2.0], [3.0, 4.0]]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "infpkg.py").write_text(PACKAGE)
    (tmp_path / "conf.yaml").write_text(CONFIG)
    (tmp_path / "pyproject.toml").write_text('[tool.ckptmgr]\nallow = ["infpkg.*", "infpkg.loop"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("infpkg", None)


def test_a_run_from_a_configuration_needs_no_model(project: Path) -> None:
    from ckptmgr.cli.main import run

    assert run(["run", "conf.yaml", "run_dir=runs/a"]) == 0
    before = torch.get_rng_state()
    loaded = load_inference("runs/a@latest")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.model.layer.out_features == 5
    assert loaded.preprocessor.factor == 0.5
    assert loaded.predict([1.0, 2.0]).shape == (5,)
    (project / "pyproject.toml").unlink()
    with pytest.raises(NotAllowedError):
        load_inference("runs/a@latest")
    assert load_inference("runs/a@latest", allow=["infpkg.*"]).ngolden == 2


def test_verify_runs_the_golden_samples_again(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptmgr.cli.main import run

    assert run(["run", "conf.yaml", "run_dir=runs/a"]) == 0
    assert run(["verify", "runs/a@latest", "--golden"]) == 0
    assert "2 golden samples give what they gave" in capsys.readouterr().err
    assert run(["verify", "runs/a", "--golden", "--model", "infpkg:Net", "--model-arg", "width=5"]) == 0
    assert run(["verify", "runs/a", "--golden", "--model", "infpkg:Net"]) == 1
    assert "StateMismatchError" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["infpkg"].Net, "forward", lambda self, x: self.layer(x) + 1)
    assert run(["verify", "runs/a", "--golden"]) == 1
    assert "GoldenMismatchError [golden-mismatch]" in capsys.readouterr().err
    assert run(["verify", "runs/a", "--model", "infpkg:Net"]) == 2
    assert run(["run", "conf.yaml", "run_dir=runs/b", "checkpoint.golden=null"]) == 0
    assert run(["verify", "runs/b", "--golden"]) == 10


def test_it_is_public() -> None:
    assert ckptmgr.load_inference is load_inference
