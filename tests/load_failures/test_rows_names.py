"""Rows 3, 4 and 5: names and shapes that are not those of the model."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from row_samples import Net, doctor, forget, restored, same, saved
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckptmgr import Checkpointer, Selection, StateMismatchError
from ckptmgr.cli.main import run

Output = pytest.CaptureFixture[str]

# The architecture of now; `Old` below is what the file is of.
LIVE = """
import torch
from torch import nn

class Live(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8)
        self.trunk = nn.Linear(8, 12)
        self.project = nn.Linear(12, 8, bias=False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.extra = nn.LayerNorm(5)
"""


class Old(nn.Module):
    """Fused attention, a layer of another name, one that is transposed, no tie, and a head that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.trank = nn.Linear(8, 12)
        self.project = nn.Linear(8, 12, bias=False)
        self.old_head = nn.Linear(8, 3)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget("live_net")
    yield tmp_path
    forget("live_net")


def run_code(found: dict[str, Any]) -> nn.Module:
    """Run the program that the doctor proposes; return its model."""
    scope: dict[str, Any] = {}
    exec("\n".join(found["code"]), scope)
    model: nn.Module = scope["model"]
    return model


# Row 3


def test_row_03_everything_that_does_not_fit_is_in_one_report_with_proposals(here: Path, capsys: Output) -> None:
    old = Old()
    torch.save(old.state_dict(), "old.pt")
    (here / "live_net.py").write_text(LIVE)
    status, found = doctor(capsys, "old.pt", "--model", "live_net:Live")
    assert status == 1
    difference = found["difference"]
    assert {it["name"] for it in difference["missing"]} == {
        *(f"{layer}.{kind}" for layer in ("query", "key", "value", "trunk", "extra") for kind in ("weight", "bias")),
        "out.weight",
    }
    assert {it["name"] for it in difference["unexpected"]} == {
        *(f"{layer}.{kind}" for layer in ("qkv", "trank", "old_head") for kind in ("weight", "bias")),
    }
    assert [it["name"] for it in difference["shape"]] == ["project.weight"]
    kinds = {proposal["kind"] for proposal in difference["proposals"]}
    assert {"split", "transpose", "tied", "rename"} <= kinds, kinds
    # What stays open is said by name: nothing is skipped silently.
    assert sorted(difference["after"]["missing"]) == ["extra.bias", "extra.weight"]
    assert sorted(difference["after"]["unexpected"]) == ["old_head.bias", "old_head.weight"]
    assert not difference["fits_after"]
    assert "still missing: extra.weight, extra.bias" in found["text"]


@pytest.mark.parametrize("way", ["renamed", "prefixed", "split", "fused", "transposed", "reordered"])
def test_row_03_the_program_that_is_proposed_loads_what_was_saved(way: str, here: Path, capsys: Output) -> None:
    body = {
        "renamed": ("self.encoder = nn.Linear(4, 6)", "self.encodr = nn.Linear(4, 6)"),
        "prefixed": ("self.fc = nn.Linear(4, 6)", "self.net = nn.ModuleDict({'fc': nn.Linear(4, 6)})"),
        "split": ("self.qkv = nn.Linear(4, 12)", "self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))"),
        "fused": ("self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))", "self.qkv = nn.Linear(4, 12)"),
        "transposed": ("self.fc = nn.Linear(4, 6, bias=False)", "self.fc = nn.Linear(6, 4, bias=False)"),
        "reordered": ("self.net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))",
                      "self.net = nn.Sequential(nn.Identity(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))"),
    }  # fmt: skip
    head = "from torch import nn\n\n"
    text = head
    for name, line in zip(("Before", "Now"), body[way], strict=True):
        text += f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n        {line}\n\n"
    (here / "live_net.py").write_text(text)
    import live_net  # type: ignore[import-not-found]

    before = live_net.Before()
    torch.save(before.state_dict(), "before.pt")
    status, found = doctor(capsys, "before.pt", "--model", "live_net:Now")
    assert status == 1
    assert found["difference"]["fits_after"], found["text"]
    loaded = run_code(found)
    flat = [torch.cat([it.reshape(-1) for it in (net.state_dict().values())]) for net in (before, loaded)]
    if way == "transposed":
        assert torch.equal(loaded.get_parameter("fc.weight"), before.fc.weight.T)
    elif way in ("split", "fused"):
        q, k, v, qkv = parts_of(before, loaded)
        assert torch.equal(torch.cat([q, k, v]), qkv)
    else:
        assert torch.equal(*flat)


def parts_of(*models: nn.Module) -> list[torch.Tensor]:
    every = {name: it for model in models for name, it in model.state_dict().items()}
    return [every[f"{name}.weight"] for name in ("q", "k", "v", "qkv")]


def test_row_03_nothing_is_applied_unasked_and_what_was_not_restored_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = saved(tmp_path / "run", {"model": Old()})
    new = Old()
    del new.old_head
    new.trunk = new.trank
    del new.trank
    built = {name: it.clone() for name, it in new.state_dict().items()}
    with pytest.raises(StateMismatchError) as refusal:
        restored(run_dir, new)
    for name in ("trank.weight", "trunk.weight", "old_head.bias"):
        assert name in str(refusal.value)
    assert same(new.state_dict(), built)
    restored(run_dir, new, selection=Selection(exclude="model/old_head.*", rename={"model/trank.*": "model/trunk.*"}))
    (said,) = (message for message in caplog.messages if message.startswith("not restored"))
    assert "model/old_head.* (2: model/old_head.weight, model/old_head.bias)" in said


# Row 4


def test_row_04_both_shapes_are_named_and_nothing_changes(tmp_path: Path, capsys: Output) -> None:
    run_dir = saved(tmp_path / "run", {"model": nn.Sequential(nn.Linear(10, 5))})
    live = nn.Sequential(nn.Linear(10, 10))
    built = {name: it.clone() for name, it in live.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"'0\.weight' is float32 \(5, 10\) in .*, float32 \(10, 10\) now"):
        restored(run_dir, live)
    assert same(live.state_dict(), built)


@pytest.mark.parametrize(("before", "now", "policy"), [(5, 10, "grow"), (10, 5, "slice"), (5, 10, "skip")])
def test_row_04_rows_are_grown_sliced_or_skipped_on_request(
    before: int, now: int, policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, live = Net(before), Net(now)
    run_dir = saved(tmp_path / "run", {"model": old})
    built = live.head.weight.detach().clone()
    if policy == "skip":
        restored(run_dir, live, selection=Selection.without("model/head.*"))
        assert torch.equal(live.head.weight, built)
        assert any("model/head.* (2" in message for message in caplog.messages)
    else:
        restored(run_dir, live, selection=Selection(resize={"model/head.*": policy}))
        rows = min(before, now)
        assert torch.equal(live.head.weight[:rows], old.head.weight[:rows])
        assert torch.equal(live.head.weight[rows:], built[rows:])
        assert any(f"model/head.weight resized from ({before}, 6) to ({now}, 6)" in it for it in caplog.messages)
    assert same(live.body.state_dict(), old.body.state_dict())


VOCABULARY = """
from torch import nn

class Words(nn.Module):
    def __init__(self, nwords=11, nclasses=3):
        super().__init__()
        self.embed = nn.Embedding(nwords, 4)
        self.classifier = nn.Linear(4, nclasses)
"""


@pytest.mark.parametrize(("nwords", "policy"), [(15, "grow"), (7, "slice")])
def test_row_04_the_doctor_proposes_how_a_vocabulary_is_resized_and_leaves_another_head_alone(
    nwords: int, policy: str, here: Path, capsys: Output
) -> None:
    (here / "live_net.py").write_text(VOCABULARY)
    import live_net  # type: ignore[import-not-found]

    old, live = live_net.Words(), live_net.Words(nwords, 5)
    built = live.classifier.weight.detach().clone()
    saved(here / "run", {"model": old})
    arguments = ("--model-arg", f"nwords={nwords}", "--model-arg", "nclasses=5")
    status, found = doctor(capsys, "run", "--model", "live_net:Words", *arguments)
    assert status == 1
    assert f"embed.weight: (11, 4) in the file, ({nwords}, 4) in live_net:Words" in found["text"]
    assert f"'model/embed.weight': '{policy}'" in found["selection"]
    selection = eval(found["selection"], {"Selection": Selection})
    Checkpointer("next", {"model": live}).restore(found["reference"], selection=selection)
    rows = min(nwords, 11)
    assert torch.equal(live.embed.weight[:rows], old.embed.weight[:rows])
    assert torch.equal(live.classifier.weight, built)


# Row 5


class Lit(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def checkpointed(net: nn.Module) -> nn.Module:
    return checkpoint_wrapper(net)


def deep(net: nn.Module) -> nn.Module:
    net.body[0] = checkpoint_wrapper(compiled(net.get_submodule("body.0")))  # type: ignore[operator]
    return nn.DataParallel(compiled(net))


WRAPPINGS: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "bare": (lambda net: net, "head."),
    "data parallel": (nn.DataParallel, "module.head."),
    "ddp": (nn.parallel.DistributedDataParallel, "module.head."),
    "compiled": (compiled, "_orig_mod.head."),
    "checkpointed": (checkpointed, "head."),
    "lightning": (Lit, "model.head."),
    "ddp of compiled": (lambda net: nn.parallel.DistributedDataParallel(compiled(net)), "module._orig_mod.head."),
    "lightning of compiled": (lambda net: Lit(compiled(net)), "model._orig_mod.head."),
    "data parallel of lightning": (lambda net: nn.DataParallel(Lit(net)), "module.model.head."),
    "deep": (deep, "module._orig_mod.head."),
}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("before", "now"), list(itertools.product(WRAPPINGS, ["bare", "deep", "lightning"])))
def test_row_05_what_one_wrapping_saved_another_one_restores(before: str, now: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one, other = Net(), Net()
    wanted = {name: it.clone() for name, it in one.state_dict().items()}
    run_dir = saved(tmp_path / "run", {"model": WRAPPINGS[before][0](one)})
    live = WRAPPINGS[now][0](other)
    restored(run_dir, live)
    assert torch.equal(other.head.weight, wanted["head.weight"])
    flat = {name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): it
            for name, it in other.state_dict().items()}  # fmt: skip
    assert same(flat, wanted)


RAW = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "model.", "module._orig_mod.", "_orig_mod.module.",
       "model._orig_mod.", "module.model.", "module._orig_mod._checkpoint_wrapped_module.model.")  # fmt: skip


@pytest.mark.parametrize("prefix", RAW)
def test_row_05_a_file_with_prefixes_is_imported_and_restored_or_told_with_the_code_that_loads_it(
    prefix: str, here: Path, capsys: Output
) -> None:
    net = Net()
    torch.save({prefix + name: it for name, it in net.state_dict().items()}, "wrapped.pt")
    (here / "live_net.py").write_text("from row_samples import Net\n")
    status, found = doctor(capsys, "wrapped.pt", "--model", "live_net:Net")
    assert status == 1
    assert found["difference"]["fits_after"]
    assert same(run_code(found).state_dict(), net.state_dict())
    assert run(["import", "wrapped.pt", "run"]) == 0
    assert same(restored(here / "run", Net()).state_dict(), net.state_dict())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapping", [name for name, (_, prefix) in WRAPPINGS.items() if prefix != "head."])
def test_row_05_these_are_the_prefixes_that_wrappers_write(wrapping: str) -> None:
    wrap, prefix = WRAPPINGS[wrapping]
    assert any(name.startswith(prefix) for name in wrap(Net()).state_dict())


def test_row_05_a_checkpoint_of_lightning_restores_into_the_bare_module(tmp_path: Path) -> None:
    lit = Lit(Net())
    trainer = Trainer(logger=False, barebones=True, accelerator="cpu")
    trainer.strategy.connect(lit)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert run(["import", str(tmp_path / "last.ckpt"), str(tmp_path / "run"), "--weights-only"]) == 0
    assert same(restored(tmp_path / "run", Net()).state_dict(), lit.model.state_dict())
