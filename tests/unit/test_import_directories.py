"""Import of what other tools write as directories: DCP, Accelerate, transformers. Each wrote them itself."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from interop_samples import Tied, same_tensors
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import metadata

from ckptmgr import Checkpointer, load_inference
from ckptmgr.cli.main import run
from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, NotAllowedError, StateMismatchError, UsageError
from ckptmgr.interop.export import export_checkpoint
from ckptmgr.interop.import_run import import_run


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(1)
    return Tied()


def restored(root: Path, **state: Any) -> int:
    with Checkpointer(root / "next", state=state) as checkpointer:
        return checkpointer.restore(str(root / "run"))


def save_dcp(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


# torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("is_nested", [True, False])
def test_a_dcp_checkpoint_gives_the_model_and_says_what_it_leaves(tmp_path: Path, model: Tied, is_nested: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.float().sum() for p in model.parameters()).backward()
    optimizer.step()
    state = model.state_dict()
    if is_nested:
        named = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        state = {"model": state, "optimizer": {"state": named, "lr": 0.1}, "step": 3}
    told = import_run(str(save_dcp(state, tmp_path / "dcp")), str(tmp_path / "run"))
    assert any("optimizer.state" in note for note in told.notes) is is_nested
    other = Tied()
    restored(tmp_path, model=other)
    assert same_tensors(other.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_metadata_that_would_import_something_is_refused(tmp_path: Path) -> None:
    folder = save_dcp({"model": {"a": torch.ones(2)}}, tmp_path / "dcp")
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> Any:
            import os

            return os.system, (f"touch {witness}",)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(NotAllowedError, match=r"would import posix\.system"):
        import_run(str(folder), str(tmp_path / "run"))
    assert not witness.exists()


METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
"""Pushes the class onto the stack of an unpickler."""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    "forged",
    [
        # A memo of four billion places.
        b"\x80\x02}r\xff\xff\xff\xff.",
        # A text, and a bytearray, of more bytes than there are.
        b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
        # Attributes of a class, and not of an instance.
        b"\x80\x02" + METADATA + b"N}X\x07\x00\x00\x00versionK\x07s\x86b.",
        # An instance without its fields.
        b"\x80\x02" + METADATA + b")\x81.",
        b"\x80\x02}.",
        b"not a pickle at all",
    ],
)
def test_metadata_that_was_forged_is_damage_and_costs_nothing(tmp_path: Path, forged: bytes) -> None:
    folder = save_dcp({"model": {"a": torch.ones(2)}}, tmp_path / "dcp")
    (folder / ".metadata").write_bytes(forged)
    tracemalloc.start()
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        import_run(str(folder), str(tmp_path / "run"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    assert metadata.Metadata.version is None


def change_metadata(folder: Path, change: Any) -> None:
    described = pickle.loads((folder / ".metadata").read_bytes())
    change(described)
    (folder / ".metadata").write_bytes(pickle.dumps(described))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("case", ["outside", "hole", "bomb", "missing", "cut", "no-metadata"])
def test_damaged_and_hostile_dcp_checkpoints_are_refused(tmp_path: Path, case: str) -> None:
    folder = save_dcp({"model": {"a": torch.ones(8), "b": torch.zeros(3)}}, tmp_path / "dcp")
    kind: type[CkptmgrError] = CorruptCheckpointError

    def first(described: Any) -> Any:
        return described.state_dict_metadata["model.a"]

    def grow(described: Any) -> None:
        first(described).size = torch.Size([1 << 40])
        first(described).chunks[0].sizes = torch.Size([1 << 40])

    if case == "outside":
        kind = UsageError
        change_metadata(
            folder, lambda m: [setattr(info, "relative_path", "../../etc/x") for info in m.storage_data.values()]
        )
    elif case == "hole":
        change_metadata(folder, lambda m: setattr(first(m), "size", torch.Size([9])))
    elif case == "bomb":
        change_metadata(folder, grow)
    elif case == "missing":
        next(folder.glob("*.distcp")).unlink()
    elif case == "cut":
        path = next(folder.glob("*.distcp"))
        path.write_bytes(path.read_bytes()[:-200])
    else:
        (folder / ".metadata").write_bytes(b"\x80\x04\x95")
    with pytest.raises(kind):
        import_run(str(folder), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Accelerate


def accelerated(root: Path, model: nn.Module, *, safe: bool = True) -> tuple[Path, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    model, wrapped, schedule = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(3):
        accelerator.backward(sum(p.float().pow(2).sum() for p in model.parameters()))
        wrapped.step()
        schedule.step()
        wrapped.zero_grad()
    accelerator.save_state(str(root / "state"), safe_serialization=safe)
    return root / "state", (optimizer, scheduler)


@pytest.mark.parametrize("safe", [True, False])
def test_a_state_of_accelerate_gives_model_optimizer_and_scheduler(tmp_path: Path, safe: bool) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    folder, (optimizer, scheduler) = accelerated(tmp_path, model, safe=safe)
    told = import_run(str(folder), str(tmp_path / "run"), step=3)
    assert told.entries == ("model", "optimizer", "scheduler")
    # Safetensors sorts its names, so that their order tells nothing.
    assert any(("by position" if safe else "likely, not certain") in note for note in told.notes)
    assert any("random" in note for note in told.notes)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(again, 2, gamma=0.5)
    assert restored(tmp_path, model=other, optimizer=again, scheduler=schedule) in (0, 3)
    assert same_tensors(other.state_dict(), model.state_dict())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same_tensors(optimizer.state[one], again.state[two])
    assert schedule.last_epoch == scheduler.last_epoch
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1e-2


# transformers


@pytest.fixture(params=["gpt2", "bert"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    """A tiny model with tied weights, made from a configuration; its inputs; and where it was saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"vocab_size": 60}
    if request.param == "gpt2":
        config = transformers.GPT2Config(**sizes, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            **sizes, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.BertForMaskedLM(config)
    model = model.eval()
    folder = tmp_path / "pretrained"
    model.save_pretrained(folder)
    return model, torch.arange(8)[None], folder


def same_logits(model: Any, inputs: Any, folder: Path) -> bool:
    again = type(model).from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return torch.equal(model(inputs).logits, again(inputs).logits)


@pytest.mark.parametrize("size", [None, "10KB"])
def test_a_model_of_transformers_goes_there_and_back_with_the_same_logits(
    tmp_path: Path, pretrained: tuple[Any, Any, Path], size: str | None
) -> None:
    model, inputs, folder = pretrained
    if size is not None:
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists()
    told = import_run(str(folder), str(tmp_path / "run"))
    assert told.entries == ("model", "huggingface")
    exported = export_checkpoint(
        str(tmp_path / "run"), str(tmp_path / "back"), format="huggingface", max_shard_size=size
    )
    assert same_logits(model, inputs, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert any(name.endswith("index.json") for name in exported.files) is (size is not None)


def test_a_training_run_of_a_model_is_exported_for_from_pretrained(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    model, inputs, folder = pretrained
    outer = nn.ModuleDict({"model": model, "loss": nn.Linear(1, 1)})
    with Checkpointer(tmp_path / "trained", state={"model": outer}, every_n_steps=1) as checkpointer:
        checkpointer.resume()
        checkpointer.step(1)
    target = tmp_path / "out"
    export_checkpoint(str(tmp_path / "trained"), str(target), format="safetensors", strip_prefix="model.")
    shutil.copy(folder / "config.json", target)
    assert same_logits(model, inputs, target)
    # The same names as transformers writes: a tied head is not written.
    assert load_file(target / "model.safetensors").keys() >= load_file(folder / "model.safetensors").keys()


def test_the_weights_fit_a_live_model_whose_head_is_tied(tmp_path: Path, pretrained: tuple[Any, Any, Path]) -> None:
    model, inputs, folder = pretrained
    import_run(str(folder), str(tmp_path / "run"))
    torch.manual_seed(9)
    other = type(model)(model.config).eval()
    restored(tmp_path, model=other)
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, other(inputs).logits)


def with_tokenizer(folder: Path) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "the", "cat", "sat"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
def test_tokenizer_files_come_along_byte_for_byte(tmp_path: Path, pretrained: tuple[Any, Any, Path]) -> None:
    _, _, folder = pretrained
    tokenizer = with_tokenizer(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit('this must not run')")
    told = import_run(str(folder), str(tmp_path / "run"))
    assert told.entries == ("model", "huggingface", "preprocessor")
    assert any("code is not taken: modeling_evil.py" in note for note in told.notes)
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "back"), format="huggingface")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "back", local_files_only=True)
    assert again("the cat slept")["input_ids"] == tokenizer("the cat slept")["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "back" / "modeling_evil.py").exists()


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
def test_the_tokenizer_is_the_preprocessor_of_the_run_and_another_one_is_refused(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    model, inputs, folder = pretrained
    tokenizer = with_tokenizer(folder)
    import_run(str(folder), str(tmp_path / "run"))
    other = type(model)(model.config).eval()
    restored(tmp_path, model=other, preprocessor=tokenizer)
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, other(inputs).logits)
    tokenizer.add_tokens(["dog"])
    with pytest.raises(StateMismatchError, match="preprocessor"):
        restored(tmp_path, model=other, preprocessor=tokenizer)


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*no golden samples:UserWarning")
def test_an_imported_model_is_loaded_for_inference_with_its_tokenizer(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    model, inputs, folder = pretrained
    tokenizer = with_tokenizer(folder)
    import_run(str(folder), str(tmp_path / "run"))
    loaded = load_inference(str(tmp_path / "run"), model=type(model)(model.config))
    assert loaded.preprocessor("the cat slept")["input_ids"] == tokenizer("the cat slept")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
def test_a_run_that_trained_with_a_tokenizer_is_exported_with_its_files(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    model, _, folder = pretrained
    tokenizer = with_tokenizer(folder)
    with Checkpointer(tmp_path / "run", state={"model": model, "preprocessor": tokenizer}, every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    exported = export_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"), format="huggingface")
    assert any("config.json" in note for note in exported.notes)
    assert {"tokenizer.json", "model.safetensors"} <= set(exported.files)


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
@pytest.mark.parametrize("content", [b"{", b'{"version": "9"}', b"\xff\xfe", b"[]"])
def test_a_tokenizer_that_does_not_load_is_kept_and_said(
    tmp_path: Path, pretrained: tuple[Any, Any, Path], content: bytes
) -> None:
    _, _, folder = pretrained
    (folder / "tokenizer.json").write_bytes(content)
    told = import_run(str(folder), str(tmp_path / "run"))
    assert told.entries == ("model", "huggingface")
    assert any("do not load here" in note for note in told.notes)
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "back"), format="huggingface")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
def test_a_config_that_is_a_link_out_of_the_directory_is_refused(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    _, _, folder = pretrained
    shutil.move(folder / "config.json", tmp_path / "secret.json")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UsageError, match="a link that leads out"):
        import_run(str(folder), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_snapshot_in_the_cache_of_hugging_face_may_point_to_its_blobs(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    model, inputs, folder = pretrained
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    import_run(str(snapshot), str(tmp_path / "run"))
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "back"), format="huggingface")
    assert same_logits(model, inputs, tmp_path / "back")


@pytest.mark.parametrize("pretrained", ["gpt2"], indirect=True)
def test_a_checkpoint_of_the_trainer_goes_on_with_its_optimizer(
    tmp_path: Path, pretrained: tuple[Any, Any, Path]
) -> None:
    model, _, folder = pretrained
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]

    def optimizer_of(first: list[Any], second: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": first}, {"params": second, "weight_decay": 0.0}], lr=1e-3)

    optimizer = optimizer_of(decayed, others)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        sum(p.pow(2).sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler.step()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    (folder / "training_args.bin").write_bytes(b"an object that nobody unpickles")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "epoch": 0.5}))
    told = import_run(str(folder), str(tmp_path / "run"))
    assert told.step == 2
    assert told.entries == ("model", "optimizer", "scheduler", "huggingface")
    assert any("by position" in note for note in told.notes)
    other = type(model)(model.config)
    again = optimizer_of(
        [p for p in other.parameters() if p.dim() > 1], [p for p in other.parameters() if p.dim() <= 1]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 0.5**step)
    restored(tmp_path, model=other, optimizer=again, scheduler=schedule)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert same_tensors(optimizer.state[one], again.state[two])
    assert schedule.get_last_lr() == scheduler.get_last_lr()


def test_a_key_or_a_model_of_one_kind_is_refused_for_another(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    assert run(["import", str(folder), str(tmp_path / "run"), "--key", "model"]) == 2
    save_file({"a": torch.ones(1)}, folder / "two.safetensors")
    assert run(["import", str(folder), str(tmp_path / "run")]) == 2
    assert "2 safetensors files and no index" in capsys.readouterr().err
