"""Rows 12, 13, 14, 17, 18 and 20: what belongs together with the weights."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from row_samples import MODELS, Net, doctor, forget, restored, same, saved, write_package
from safetensors.torch import load_file
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from ckptmgr import Checkpointer, CkptmgrError, GoldenMismatchError, StateMismatchError, load_inference
from ckptmgr.cli.main import run
from ckptmgr.errors import EnvironmentDriftError

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


class OwnDropout(Sentiment):
    """Drops at prediction too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(nn.functional.dropout(self.embed(ids), 0.9, training=True))
        return out


@pytest.mark.parametrize("kind", [Forgetful, OwnDropout])
def test_row_13_golden_samples_catch_a_model_that_does_not_predict_in_eval_mode(
    kind: type[Sentiment], tmp_path: Path
) -> None:
    sentiment(tmp_path / "run", golden=["a Good film", "a Bad film", "good film", "bad"])
    with pytest.raises(GoldenMismatchError, match="golden sample"):
        load_inference(str(tmp_path / "run"), model=kind)


# Row 14


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``shop`` under git, and a run of its model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_package(tmp_path, {"__init__.py": "", "models.py": MODELS, "layers.py": LAYERS})
    (tmp_path / "pyproject.toml").write_text('[tool.ckptmgr]\nallow = ["shop.*"]\n')
    (tmp_path / ".gitignore").write_text("run*\n*.pt\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    from shop.layers import WithOwn  # type: ignore[import-not-found]

    torch.manual_seed(0)
    saved(tmp_path / "run", {"model": WithOwn()}, golden=[torch.ones(1, 4)])
    yield tmp_path
    forget("shop")


LAYERS = """
from torch import nn
from shop.models import Net


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class WithOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Scaled(4, 4)
        self.net = Net()

    def forward(self, x):
        return self.net(self.first(x))
"""


def read_record(path: Path) -> Any:
    return json.loads(path.read_text())["record"]


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_row_14_import_path_source_digest_and_commit_are_recorded(project: Path, capsys: Output) -> None:
    (manifest,) = (project / "run").glob("checkpoints/*/manifest.json")
    (entry,) = (it for it in read_record(manifest)["entries"] if it["name"] == "model")
    assert set(entry["classes"]) == {"shop.layers.Scaled", "shop.layers.WithOwn", "shop.models.Net"}
    assert all(len(digest) == 32 for digest in entry["classes"].values())
    (start,) = (project / "run").glob("attempts/*/start.json")
    assert read_record(start)["git"]["commit"] == git("rev-parse", "HEAD")


def test_row_14_nothing_is_said_while_the_code_is_as_it_was(project: Path, caplog: Log, capsys: Output) -> None:
    assert doctor(capsys, "run", "--model", "shop.layers:WithOwn")[0] == 0
    assert doctor(capsys, "run")[1]["drift"] == []
    from shop.layers import WithOwn

    load_inference("run", model=WithOwn)
    assert not [message for message in caplog.messages if "not as it was" in message]


@pytest.mark.parametrize("arguments", [(), ("--model", "shop.layers:WithOwn")])
def test_row_14_a_changed_class_is_named_by_the_doctor(
    arguments: tuple[str, ...], project: Path, capsys: Output
) -> None:
    write_package(project, {"layers.py": LAYERS.replace("2 * super", "3 * super")})
    found = doctor(capsys, "run", *arguments)[1]
    (drift,) = (it for it in found["drift"] if it["name"].startswith("code."))
    assert (drift["name"], drift["grade"]) == ("code.shop.layers.Scaled", "warning")
    assert drift["why"] == "the source of this class is not what it was"
    # The tree differs from the commit too.
    assert "git.changes" in {it["name"] for it in found["drift"]}


@pytest.mark.parametrize("arguments", [(), ("--model", "shop.layers:WithOwn")])
def test_row_14_a_class_that_is_missing_is_named_by_the_doctor_with_where_it_is_now(
    arguments: tuple[str, ...], project: Path, capsys: Output
) -> None:
    write_package(
        project, {"models.py": None, "nets.py": MODELS, "layers.py": LAYERS.replace("shop.models", "shop.nets")}
    )
    status, found = doctor(capsys, "run", *arguments)
    assert status == 0
    assert "warning: code.shop.models.Net" in found["text"]
    assert (
        "shop.models is not importable here: shop/__init__.py has no models, but shop/nets.py has a Net"
        in (found["text"])
    )


def test_row_14_what_changed_or_is_missing_is_named_before_anything_is_loaded(project: Path, caplog: Log) -> None:
    write_package(
        project,
        {
            "models.py": None,
            "nets.py": MODELS,
            "layers.py": LAYERS.replace("shop.models", "shop.nets").replace("2 * super", "3 * super"),
        },
    )
    from shop.layers import WithOwn

    live = WithOwn()
    with pytest.raises(GoldenMismatchError, match=r"not as it was then(?s:.)*code\.shop\.layers\.Scaled"):
        load_inference("run", model=live)
    (told,) = (message for message in caplog.messages if message.startswith("not as it was"))
    assert "code.shop.layers.Scaled" in told
    assert "code.shop.models.Net" in told
    assert "shop/nets.py has a Net" in told
    caplog.clear()
    ckpt = Checkpointer("run", {"model": WithOwn()}, golden=[torch.ones(1, 4)], strict_environment=True)
    with pytest.raises(EnvironmentDriftError, match=r"code\.shop\.layers\.Scaled(?s:.)*code\.shop\.models\.Net"), ckpt:
        ckpt.resume()
    assert len(list((project / "run" / "attempts").iterdir())) == 1


def test_row_14_without_a_model_the_classes_that_are_needed_are_named(project: Path) -> None:
    with pytest.raises(CkptmgrError) as refusal:
        load_inference("run")
    assert "shop.layers.Scaled, shop.layers.WithOwn, shop.models.Net" in str(refusal.value)


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


# Row 20

LOOP = """
def loop(checkpointer, model, lr):
    step = checkpointer.resume()
    checkpointer.step(step + 1)
"""
CONFIG = """
loop: {_target_: shop.loop.loop, lr: 0.1}
model: {_target_: shop.models.Net, nclasses: 5}
checkpoint: {every_n_steps: 1}
"""


def test_row_20_config_commit_and_uncommitted_changes_are_kept_and_diff_shows_what_changed(
    project: Path, capsys: Output
) -> None:
    write_package(project, {"loop.py": LOOP})
    (project / "conf.yaml").write_text(CONFIG)
    git("add", "-A")
    git("commit", "-qm", "second")
    commits = [git("rev-parse", "HEAD")]
    assert run(["run", "conf.yaml", "run_dir=runs/a", "seed=1", "--allow", "shop.*", "--allow", "shop.loop.loop"]) == 0
    write_package(project, {"models.py": MODELS + "\n# another thought\n"})
    git("commit", "-qam", "third")
    commits.append(git("rev-parse", "HEAD"))
    # And something that is not committed: a digest of the diff is kept, not the diff.
    write_package(project, {"models.py": MODELS + "\n# a thought that is not committed\n"})
    assert run(["run", "conf.yaml", "run_dir=runs/b", "seed=1", "loop.lr=0.5", "--allow", "shop.*",
                "--allow", "shop.loop.loop"]) == 0  # fmt: skip
    capsys.readouterr()
    recorded = []
    for name, commit in zip("ab", commits, strict=True):
        (start,) = (project / "runs" / name).glob("attempts/*/start.json")
        recorded.append(read_record(start)["git"])
        assert recorded[-1]["commit"] == commit
        assert run(["show", f"runs/{name}", "--config"]) == 0
        assert ("lr: 0.5" if name == "b" else "lr: 0.1") in capsys.readouterr().out
    assert "diff_digest" not in recorded[0]
    assert len(recorded[1]["diff_digest"]) == 64
    assert run(["diff", "runs/a@1", "runs/b@1"]) == 0
    printed = capsys.readouterr().out
    assert "loop.lr: 0.1 -> 0.5" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["commit", *(commit[:10] for commit in commits)] in lines
    assert ["uncommitted", "changes", "-", recorded[1]["diff_digest"][:10]] in lines


def test_row_20_code_that_does_not_belong_to_the_checkpoint_is_told(project: Path, caplog: Log) -> None:
    caplog.set_level(logging.INFO, "ckptmgr")
    write_package(project, {"layers.py": LAYERS.replace("2 * super", "3 * super")})
    git("commit", "-qam", "second")
    from shop.layers import WithOwn

    with Checkpointer("run", {"model": WithOwn()}) as ckpt:
        assert ckpt.resume() == 1
    (told,) = (message for message in caplog.messages if message.startswith("not as it was"))
    assert "git.commit" in told
    assert "code.shop.layers.Scaled" in told
    assert "code.shop.models.Net" not in told
