"""Rows 12, 13, 17 and 18: what belongs together with the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from row_samples import Net, doctor, read_record, restored, same, saved
from safetensors.torch import load_file
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from ckptmgr import GoldenMismatchError, StateMismatchError, load_inference
from ckptmgr.cli.main import run

Log = pytest.LogCaptureFixture
Output = pytest.CaptureFixture[str]

# Row 12

WORDS = ["[UNK]", "a", "film", "good", "bad", "Good", "Bad"]


def tokenizer(*, words: list[str] = WORDS, lowercase: bool = False) -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    return made


class Sentiment(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(len(WORDS), 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.drop(self.embed(ids)))
        return out


def sentiment(run_dir: Path, *, golden: Any = ("a Good film", "a Bad film")) -> Sentiment:
    torch.manual_seed(0)
    net = Sentiment()
    saved(run_dir, {"model": net, "preprocessor": tokenizer()}, golden=list(golden))
    return net


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (tokenizer(lowercase=True), "token 1 is 'Good' (id 5) in the checkpoint, 'good' (id 3) now"),
        (tokenizer(words=[*WORDS[:5], "x", "y"]), "token 1 is 'Good' (id 5) in the checkpoint, '[UNK]' (id 0) now"),
        (tokenizer(words=["[UNK]", *sorted(WORDS[1:])]), "in the checkpoint"),
    ],
    ids=["normalisation", "unknown words", "vocabulary"],
)
def test_row_12_another_preprocessor_is_refused_with_the_first_word_that_differs(
    other: Tokenizer, difference: str, tmp_path: Path
) -> None:
    sentiment(tmp_path / "run")
    with pytest.raises(StateMismatchError) as refusal:
        load_inference(str(tmp_path / "run"), model=Sentiment, preprocessor=other)
    assert "golden sample 0, 'a Good film'" in str(refusal.value)
    assert difference in str(refusal.value)
    with pytest.raises(StateMismatchError, match="preprocessor"):
        saved(tmp_path / "run", {"model": Sentiment(), "preprocessor": other}, nsteps=2)


def test_row_12_a_tokenizer_that_only_lacks_words_is_given_them(tmp_path: Path) -> None:
    net = sentiment(tmp_path / "run").eval()
    smaller = tokenizer(words=WORDS[:5])
    assert smaller.encode("a Good film").tokens == ["a", "[UNK]", "film"]
    loaded = load_inference(str(tmp_path / "run"), model=Sentiment, preprocessor=smaller)
    assert smaller.encode("a Good film").tokens == ["a", "Good", "film"]
    assert torch.equal(loaded.predict("Good"), net(torch.tensor([[5]])))


def test_row_12_other_statistics_are_refused(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(3, 2, (20, 4))
    saved(tmp_path / "run", {"model": Net(), "preprocessor": StandardScaler().fit(data)})
    with pytest.raises(StateMismatchError, match="mean_"):
        load_inference(str(tmp_path / "run"), model=Net, preprocessor=StandardScaler().fit(data + 1))
    loaded = load_inference(str(tmp_path / "run"), model=Net)
    assert np.array_equal(loaded.preprocessor.mean_, data.mean(0))


def test_row_12_from_raw_input_to_prediction_it_is_as_it_was(tmp_path: Path, caplog: Log) -> None:
    net = sentiment(tmp_path / "run").eval()
    loaded = load_inference(str(tmp_path / "run"), model=Sentiment)
    assert loaded.ngolden == 2
    ids = torch.tensor([tokenizer().encode("a Bad film").ids])
    assert torch.equal(loaded.predict("a Bad film"), net(ids))


# Row 13


def test_row_13_the_model_comes_in_eval_mode_and_predicts_the_same_each_time(tmp_path: Path) -> None:
    run_dir = saved(tmp_path / "run", {"model": Net().train()})
    loaded = load_inference(str(run_dir), model=Net)
    assert not any(part.training for part in loaded.model.modules())
    x = torch.randn(1, 4)
    # In training mode a batch of one is an error for batch norm, and dropout gives noise.
    assert torch.equal(loaded.model(x), loaded.model(x))


class Forgetful(Sentiment):
    """Stays in training mode, whatever it is told."""

    def train(self, mode: bool = True) -> Forgetful:
        super().train(True)
        return self


def test_row_13_a_model_that_stays_in_training_mode_is_put_into_eval_mode_and_that_is_said(
    tmp_path: Path, caplog: Log
) -> None:
    net = sentiment(tmp_path / "run").eval()
    loaded = load_inference(str(tmp_path / "run"), model=Forgetful)
    assert not any(part.training for part in loaded.model.modules())
    assert any("stayed in training mode after eval()" in message for message in caplog.messages)
    ids = torch.tensor([tokenizer().encode("a Bad film").ids])
    assert torch.equal(loaded.model(ids), net(ids))


class OwnDropout(Sentiment):
    """Drops at prediction too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(nn.functional.dropout(self.embed(ids), 0.9, training=True))
        return out


def test_row_13_golden_samples_catch_a_model_that_drops_at_prediction(tmp_path: Path) -> None:
    sentiment(tmp_path / "run", golden=["a Good film", "a Bad film", "good film", "bad"])
    with pytest.raises(GoldenMismatchError, match="golden sample"):
        load_inference(str(tmp_path / "run"), model=OwnDropout)


# Row 17


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": len(WORDS)}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), unk_token="[UNK]")
    for name, options in (("whole", {}), ("sharded", {"max_shard_size": "2kB"})):
        model.save_pretrained(folder / name, **options)
        made.save_pretrained(folder / name)
    return folder


@pytest.fixture
def copied(hugging_face: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hugging_face, tmp_path / "hf"))


def gpt2(folder: Path) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))


def test_row_17_a_shard_that_is_missing_is_named(copied: Path, tmp_path: Path, capsys: Output) -> None:
    assert doctor(capsys, copied / "sharded")[0] == 0
    gone = sorted((copied / "sharded").glob("model-*.safetensors"))[1]
    gone.unlink()
    status, found = doctor(capsys, copied / "sharded")
    assert status == 12
    assert any(gone.name in problem for problem in found["problems"])
    assert run(["import", str(copied / "sharded"), str(tmp_path / "run")]) == 12
    assert gone.name in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_row_17_a_missing_part_is_named(missing: str, copied: Path, capsys: Output) -> None:
    (copied / "whole" / missing).unlink()
    status, found = doctor(capsys, copied / "whole")
    assert status == 1
    assert any(missing in problem and "missing" in problem for problem in found["problems"]), found["problems"]


def test_row_17_an_import_without_a_tokenizer_says_so(copied: Path, tmp_path: Path, capsys: Output) -> None:
    (copied / "whole" / "tokenizer.json").unlink()
    assert run(["import", str(copied / "whole"), str(tmp_path / "one")]) == 0
    assert "the tokenizer's files are kept, but they do not load here" in capsys.readouterr().err
    (copied / "whole" / "tokenizer_config.json").unlink()
    assert "no tokenizer and no preprocessor is here" in doctor(capsys, copied / "whole")[1]["text"]
    assert run(["import", str(copied / "whole"), str(tmp_path / "two")]) == 0
    assert "no tokenizer is here" in capsys.readouterr().err


def test_row_17_tied_weights_are_told_and_tied_again(copied: Path, tmp_path: Path, capsys: Output) -> None:
    whole = copied / "whole"
    assert "lm_head.weight" not in load_file(whole / "model.safetensors")
    status, found = doctor(capsys, whole)
    assert status == 0
    assert "the output layer is the input embedding (tie_word_embeddings), and is not stored" in found["title"]
    assert run(["import", str(whole), str(tmp_path / "run")]) == 0
    live = gpt2(whole)
    restored(tmp_path / "run", live)
    assert live.lm_head.weight is live.transformer.wte.weight
    reference = transformers.GPT2LMHeadModel.from_pretrained(whole)
    assert same(live.state_dict(), reference.state_dict())


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_row_17_it_is_imported_with_its_tokenizer_as_preprocessor(kind: str, copied: Path, tmp_path: Path) -> None:
    assert run(["import", str(copied / kind), str(tmp_path / "run")]) == 0
    # Elsewhere there is no such directory.
    config = transformers.GPT2Config.from_pretrained(copied / kind)
    wanted = transformers.GPT2LMHeadModel.from_pretrained(copied / kind).eval()
    shutil.rmtree(copied)
    loaded = load_inference(str(tmp_path / "run"), model=lambda: transformers.GPT2LMHeadModel(config), golden=False)
    ids = loaded.preprocessor("a Good film")["input_ids"]
    assert ids == tokenizer().encode("a Good film").ids
    assert torch.equal(loaded.model(torch.tensor([ids])).logits, wanted(torch.tensor([ids])).logits)


def test_row_17_a_head_that_the_checkpoint_has_not_is_named_and_not_made_up(copied: Path, tmp_path: Path) -> None:
    assert run(["import", str(copied / "whole"), str(tmp_path / "run")]) == 0
    config = transformers.GPT2Config.from_pretrained(copied / "whole", num_labels=3, pad_token_id=0)
    live = transformers.GPT2ForSequenceClassification(config)
    with pytest.raises(StateMismatchError, match=r"score\.weight"):
        restored(tmp_path / "run", live)


# Row 18


@pytest.mark.parametrize("kind", ["model.safetensors", "preprocessor.tokenizer.json", "state.json"])
def test_row_18_each_file_has_its_size_and_digest_and_the_missing_one_is_named(
    kind: str, tmp_path: Path, capsys: Output, caplog: Log
) -> None:
    run_dir = tmp_path / "run"
    net = sentiment(run_dir)
    saved(run_dir, {"model": net, "preprocessor": tokenizer()}, nsteps=2, golden=["a Good film", "a Bad film"])
    folders = sorted(run_dir.glob("checkpoints/*"))
    manifest = read_record(folders[-1] / "manifest.json")
    files = {Path(it["path"]).name: it for it in manifest["files"]}
    on_disk = {path.name for path in folders[-1].rglob("*") if path.is_file()} - {"manifest.json"}
    assert on_disk <= set(files)
    for it in files.values():
        assert it["nbytes"] > 0
        assert it["digest"]
    travelled = Path(shutil.copytree(run_dir, tmp_path / "travelled"))
    (gone,) = (path for path in travelled.rglob(kind) if folders[-1].name in path.parts)
    gone.unlink()
    assert run(["verify", str(travelled)]) == 12
    printed = capsys.readouterr()
    assert gone.name in printed.out + printed.err
    assert run(["doctor", f"{travelled}@2"]) == 12
    assert gone.name in capsys.readouterr().out
    # The newest whole one is used.
    assert load_inference(str(travelled), model=Sentiment).step == 1
    assert any("step 2" in message for message in caplog.messages)


def test_row_18_the_whole_directory_travels_and_nothing_else_is_needed(tmp_path: Path) -> None:
    net = sentiment(tmp_path / "run").eval()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "another-name")
    loaded = load_inference(str(tmp_path / "elsewhere" / "another-name"), model=Sentiment)
    assert same(loaded.model.state_dict(), net.state_dict())
