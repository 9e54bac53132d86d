"""Directories are recognised as a whole, and what is missing in them is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from sniff_samples import Runs, look, shapes, trained
from torch import nn

from ckptmgr.diagnose.artifact import Artifact


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy", symlinks=True))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="2kB")
    for name in ("whole", "sharded"):
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


def test_a_model_of_hugging_face(hugging_face: Path) -> None:
    artifact = look(hugging_face / "whole")
    assert artifact.kind == "hf-model"
    assert artifact.problems == ()
    assert artifact.details["architecture"] == "GPT2LMHeadModel"
    assert artifact.versions["transformers"] == transformers.__version__
    assert "is the input embedding" in artifact.details["tied"]
    assert artifact.details["tied"].endswith("is not stored")
    assert shapes(artifact)["transformer.wte.weight"] == ("float32", (16, 8))
    assert artifact.advice[0] == f"ckptmgr import {hugging_face / 'whole'} RUN_DIR"


def test_a_sharded_model_is_listed_like_a_whole_one(hugging_face: Path) -> None:
    artifact = look(hugging_face / "sharded")
    assert artifact.kind == "hf-model"
    assert shapes(artifact) == shapes(look(hugging_face / "whole"))
    assert len(artifact.details["files"]) > 1
    assert artifact.problems == ()
    by_index = look(hugging_face / "sharded" / "model.safetensors.index.json")
    assert shapes(by_index) == shapes(artifact)


def test_what_a_model_of_hugging_face_lacks_is_named(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "sharded", tmp_path)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    artifact = look(folder)
    assert f"a shard is missing: {shards[1].name}" in artifact.problems
    assert artifact.advice[0].startswith("get the missing files again")
    shards[0].write_bytes(shards[0].read_bytes()[:-4])
    assert any(problem.startswith(f"{shards[0].name}: truncated") for problem in look(folder).problems)
    (folder / "tokenizer.json").unlink()
    assert any("no tokenizer" in problem for problem in look(folder).problems)


def test_a_model_without_its_configuration(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    (folder / "config.json").unlink()
    artifact = look(folder)
    assert artifact.kind == "hf-model"
    assert artifact.certainty == "likely"
    assert "config.json is missing: the architecture is unknown" in artifact.problems
    (folder / "model.safetensors").unlink()
    assert look(folder).kind == "directory"


def test_a_configuration_without_its_weights(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    (folder / "model.safetensors").unlink()
    artifact = look(folder)
    assert artifact.kind == "hf-model"
    assert artifact.problems == ("its weights are missing",)
    (folder / "tf_model.h5").write_bytes(b"x")
    assert "those of another framework: tf_model.h5" in look(folder).problems[0]


def test_shards_alone_with_and_without_their_index(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "sharded", tmp_path)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    artifact = look(folder)
    assert artifact.kind == "safetensors-sharded"
    assert shapes(artifact) == shapes(look(hugging_face / "whole"))
    (folder / "model.safetensors.index.json").unlink()
    assert "the index, model.safetensors.index.json, is missing" in look(folder).problems


def test_an_index_that_leaves_the_directory_is_not_followed(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors", "b": "/etc/passwd", "c": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    artifact = look(folder)
    assert any("outside of the directory: not looked at" in problem for problem in artifact.problems)
    assert artifact.tensors == ()


def test_links_that_leave_the_directory_are_not_followed(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    artifact = look(folder)
    assert "model.safetensors is a link that leaves the directory: it was not followed" in artifact.problems
    assert artifact.tensors is None


def test_the_cache_of_hugging_face_is_links_to_its_own_blobs(hugging_face: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((hugging_face / "whole").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    artifact = look(snapshot)
    assert artifact.kind == "hf-model"
    assert artifact.problems == ()


def test_weights_in_a_pickle_of_hugging_face_are_looked_at(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "x": Runs()}, folder / "pytorch_model.bin")
    problems = look(folder).problems
    assert any("pytorch_model.bin: unpickling it would run posix.system" in problem for problem in problems)


def test_a_model_that_is_code_of_its_own_and_an_adapter(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Net"}}))
    assert any("trust_remote_code" in problem for problem in look(folder).problems)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "peft_version": "0.15.0"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    artifact = look(folder)
    assert (artifact.kind, artifact.versions) == ("peft-adapter", {"peft": "0.15.0"})
    assert "org/base" in artifact.advice[0]


@pytest.fixture(scope="module")
def training_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("accelerate") / "state"
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    accelerator.prepare(model, optimizer, scheduler)
    accelerator.save_state(str(folder))
    yield folder
    accelerator.free_memory()


def test_a_training_state_of_accelerate(training_state: Path, tmp_path: Path) -> None:
    artifact = look(training_state)
    assert artifact.kind == "accelerate"
    assert shapes(artifact) == {"weight": ("float32", (3, 2)), "bias": ("float32", (3,))}
    assert artifact.problems == ()
    assert artifact.advice[0].startswith("ckptmgr import")
    folder = copy(training_state, tmp_path)
    (folder / "optimizer.bin").unlink()
    assert "the optimizer's state is missing" in look(folder).problems[0]
    (folder / "model.safetensors").unlink()
    assert "its model is missing" in look(folder).problems[0]
    assert look(training_state / "optimizer.bin").kind == "optimizer-state"


def test_a_checkpoint_of_the_transformers_trainer(hugging_face: Path, tmp_path: Path) -> None:
    folder = copy(hugging_face / "whole", tmp_path)
    state = transformers.TrainerState(global_step=500, epoch=1.5)
    state.save_to_json(str(folder / "trainer_state.json"))
    torch.save(trained()[1].state_dict(), folder / "optimizer.pt")
    torch.save({}, folder / "rng_state.pth")
    artifact = look(folder)
    assert artifact.kind == "transformers-trainer"
    assert artifact.title.endswith("at step 500")
    assert artifact.problems == ()
    assert shapes(artifact) == shapes(look(hugging_face / "whole"))
    (folder / "optimizer.pt").unlink()
    assert "the optimizer's state is missing (optimizer.pt)" in look(folder).problems[0]


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "x"
    state = {"model": {"w": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.bfloat16)}, "epoch": 3}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_distributed_checkpoint(distributed: Path, tmp_path: Path) -> None:
    artifact = look(distributed)
    assert artifact.kind == "dcp"
    assert shapes(artifact) == {"model.w": ("float32", (3, 2)), "model.b": ("bfloat16", (5,))}
    assert artifact.contents["epoch"] == "a value, pickled"
    assert artifact.problems == ()
    assert {use.verdict for use in artifact.globals} == {"plain", "code"}
    folder = copy(distributed, tmp_path)
    data = folder / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert f"should have {len(whole)}" in look(folder).problems[0]
    data.unlink()
    assert look(folder).problems == ("files of it are missing: __0_0.distcp",)
    data.write_bytes(whole)
    (folder / ".metadata").unlink()
    assert "the save was not finished" in look(folder).problems[0]


def test_a_distributed_checkpoint_whose_metadata_run_commands(distributed: Path, tmp_path: Path) -> None:
    import pickle

    folder = copy(distributed, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
    artifact = look(folder)
    assert "posix.system" in artifact.problems[0]
    assert artifact.globals[0].verdict == "dangerous"
    assert not any("ckptmgr import" in line for line in artifact.advice)


def test_a_sharded_checkpoint_of_lightning(distributed: Path, tmp_path: Path) -> None:
    folder = copy(distributed, tmp_path)
    torch.save({"epoch": 1}, folder / "meta.pt")
    assert look(folder).title.startswith("a sharded checkpoint of Lightning")


def test_a_checkpoint_of_deepspeed_names_missing_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "global_step10"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step10")
    torch.save({"module": {"w": torch.ones(2)}, "ds_version": "0.14"}, folder / "mp_rank_00_model_states.pt")
    for rank in (0, 2):
        torch.save({}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    artifact = look(tmp_path)
    assert artifact.kind == "deepspeed"
    assert artifact.details["tag"] == "global_step10"
    assert "the states of ranks are missing: 1" in artifact.problems
    assert shapes(artifact) == {"w": ("float32", (2,))}


def test_one_file_per_rank(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        torch.save({"w": torch.ones(2)}, tmp_path / f"model_world_size_4_rank_{rank}.pt")
    artifact = look(tmp_path)
    assert artifact.kind == "fsdp-shards"
    assert artifact.problems == ("files of ranks are missing: 2",)
    assert artifact.details["world_size"] == 4


def test_directories_that_are_nothing_themselves_say_what_lies_in_them(tmp_path: Path) -> None:
    assert look(tmp_path).problems == ("it holds no file",)
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({}, folder / "last.ckpt")
    artifact = look(tmp_path)
    assert artifact.kind == "directory"
    assert artifact.advice == (f"name one of them: ckptmgr doctor {folder / 'last.ckpt'}",)
    (tmp_path / "readme").write_text("x")
    (folder / "last.ckpt").unlink()
    assert "none of which looks like a model" in look(tmp_path).title


def test_a_directory_of_very_many_files_is_listed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptmgr.diagnose import folder

    monkeypatch.setattr(folder, "MAX_FILES", 5)
    for number in range(10):
        (tmp_path / str(number)).touch()
    artifact: Artifact = look(tmp_path)
    assert artifact.certainty == "likely"
    assert len(artifact.contents) == 5


def test_a_classifier_is_not_said_to_lack_an_output_layer(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    artifact = look(tmp_path)
    assert "tied" not in artifact.details
    assert "embedding" not in artifact.title
