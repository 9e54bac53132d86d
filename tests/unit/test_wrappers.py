"""Wrapped here, bare there: what a checkpoint of one restores in the other, and prefixes that no wrapper explains."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from saved_state import bits, reader_of, restored, saved
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer, StateMismatchError
from ckptmgr.state.capture import check_state
from ckptmgr.state.prefixes import find_rule, nearest_rule


class Net(nn.Module):
    """Has an attribute called ``module``, a buffer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.module(self.norm(self.embed(x)).tanh())).square().mean()
        return out


def compiled(module: nn.Module) -> Any:
    # The backend does not matter for names, and the default one takes seconds to import.
    return torch.compile(module, backend="eager")


def with_checkpointed_parts(net: Net) -> Net:
    net.module[0] = checkpoint_wrapper(net.module[0])
    net.norm = checkpoint_wrapper(net.norm)
    return net


def nested(net: Net) -> nn.Module:
    net.embed = compiled(net.embed)
    net.module = checkpoint_wrapper(compiled(net.module))
    net.module._checkpoint_wrapped_module._orig_mod[1] = nn.DataParallel(net.module[1])
    return nn.DataParallel(compiled(net))


WRAPPINGS: dict[str, Callable[[Net], nn.Module]] = {
    "bare": lambda net: net,
    "compiled": compiled,
    "compiled inside": lambda net: (setattr(net, "module", compiled(net.module)), net)[1],
    "data parallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "checkpointed": with_checkpointed_parts,
    "nested": nested,
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors_and_state(
    wrapping: str, seed: int, *, in_reverse: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors by the names from before wrapping, and the state with an AdamW that has gone two steps."""
    torch.manual_seed(seed)
    net = Net()
    named = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers())}
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters[::-1] if in_reverse else parameters, lr=0.01)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    net.norm.running_mean.normal_()
    return named, {"model": WRAPPINGS[wrapping](net), "optimizer": optimizer}


def contents(named: dict[str, torch.Tensor], optimizer: Any) -> dict[str, Any]:
    """Return parameters and moments by the names that they had before anything was wrapped."""
    return {name: bits([tensor, dict(optimizer.state.get(tensor, {}))]) for name, tensor in named.items()}


@pytest.mark.parametrize(("before", "now"), list(itertools.product(WRAPPINGS, WRAPPINGS)))
def test_wrapped_or_not_every_parameter_gets_its_own_value_and_moments(before, now, caplog):
    caplog.set_level(logging.INFO, logger="ckptmgr")
    source, live = tensors_and_state(before, 1), tensors_and_state(now, 2)
    entries = saved(source[1])
    caplog.clear()
    check_state(live[1], entries)
    restored(live[1], entries)
    assert contents(live[0], live[1]["optimizer"]) == contents(source[0], source[1]["optimizer"])
    assert caplog.messages == []
    assert live[0]["head.weight"] is live[0]["embed.weight"]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_file_has_the_names_of_the_bare_module_and_a_tied_weight_once(wrapping):
    reader = reader_of(tensors_and_state(wrapping, 1)[1])
    records = [record for record in reader.manifest.tensors if record.entry == "model"]
    bare = dict(Net().state_dict())
    assert {name for record in records for name in (record.name, *record.aliases)} == set(bare)
    assert [record.aliases for record in records if record.name == "embed.weight"] == [("head.weight",)]
    assert "module.0.weight" in {record.name for record in records}


def test_moments_follow_their_names_into_another_order_and_wrapping(caplog):
    caplog.set_level(logging.INFO, logger="ckptmgr")
    source, live = tensors_and_state("nested", 1), tensors_and_state("compiled", 2, in_reverse=True)
    restored(live[1], saved(source[1]))
    assert contents(live[0], live[1]["optimizer"]) == contents(source[0], source[1]["optimizer"])
    assert caplog.messages == ["optimizer AdamW: state carried by name for 7 of 7 parameters"]


class Attribute(nn.Module):
    """A module of the user that has the net as an attribute: no wrapper, whatever the attribute is called."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, net)


def as_attribute(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {**state, "model": Attribute(state["model"], name)}


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_checkpoint_wrapped_module", "model", "net"])
def test_an_attribute_of_a_user_is_a_name_and_stays(name):
    model = tensors_and_state("bare", 1)[1]["model"]
    tensors = reader_of({"model": Attribute(model, name)}).manifest.tensors
    assert all(record.name.startswith(f"{name}.") for record in tensors)


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("name", ["module", "_orig_mod", "_checkpoint_wrapped_module", "model", "net"])
def test_one_prefix_that_explains_every_name_is_applied_to_the_moments_too_and_told(name, is_added, caplog):
    caplog.set_level(logging.INFO, logger="ckptmgr")
    (source, before), (live, now) = tensors_and_state("compiled", 1), tensors_and_state("nested", 2)
    before, now = (before, as_attribute(now, name)) if is_added else (as_attribute(before, name), now)
    entries = saved(before)
    check_state(now, entries)
    assert caplog.messages == []
    restored(now, entries)
    assert contents(live, now["optimizer"]) == contents(source, before["optimizer"])
    how = "with" if is_added else "without"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, f"model: all 11 names of the checkpoint fit {how} '{name}.' in front")
    ]


def test_prefixes_of_wrappers_that_nobody_recognised_are_left_out_anywhere(caplog):
    caplog.set_level(logging.INFO, logger="ckptmgr")
    (source, before), (live, now) = tensors_and_state("bare", 1), tensors_and_state("bare", 2)
    net = before["model"]
    net.module[0] = Attribute(net.module[0], "_orig_mod")
    net.norm = Attribute(net.norm, "_checkpoint_wrapped_module")
    restored(now, saved(as_attribute(before, "model")))
    assert contents(live, now["optimizer"]) == contents(source, before["optimizer"])
    (message,) = caplog.messages
    assert "without 'model.' in front, leaving '_orig_mod.' and '_checkpoint_wrapped_module.' out of" in message


def refused(state: dict[str, Any], entries: Any) -> str:
    before = bits([dict(state["model"].state_dict()), state["optimizer"].state_dict()["state"]])
    with pytest.raises(StateMismatchError) as caught:
        restored(state, entries)
    assert bits([dict(state["model"].state_dict()), state["optimizer"].state_dict()["state"]]) == before
    return str(caught.value)


def test_a_prefix_that_nearly_fits_is_proposed_and_nothing_is_changed(caplog):
    source, now = tensors_and_state("bare", 1)[1], tensors_and_state("bare", 2)[1]
    now["model"].extra = nn.Linear(2, 2, bias=False)
    message = refused(now, saved(as_attribute(source, "model")))
    assert (
        "the checkpoint's names begin with 'model.': without it, 11 of 12 would fit; missing: 'extra.weight'" in message
    )

    source["model"].module[1] = nn.Linear(3, 5)
    del now["model"].extra
    message = refused(now, {**saved(now), **saved({"model": Attribute(source["model"], "model")})})
    assert "9 of 11 would fit; missing: 'module.1.weight', 'module.1.bias'; left over: 'model.module.1" in message
    assert caplog.messages == []


@pytest.mark.parametrize("copies", [1, 2])
def test_a_checkpoint_of_which_something_would_be_left_over_is_refused(copies):
    source, now = tensors_and_state("bare", 1)[1], tensors_and_state("bare", 2)[1]
    both = as_attribute(source, "model")
    both["model"].averaged = Net() if copies == 2 else nn.Linear(1, 1)
    message = refused(now, saved(both))
    if copies == 1:
        assert "without it, 11 of 11 would fit; left over: 'averaged.weight', 'averaged.bias'" in message
    else:
        assert "would fit without 'model.' in front; or without 'averaged.' in front: nothing tells" in message


def test_names_that_two_rules_match_differently_are_refused():
    # Either word could be a wrapper's: each way all names are matched, with the values exchanged.
    checkpoint = {"module.w": (2,), "_orig_mod.w": (2,)}
    live = {"module._orig_mod.w": (2,), "w": (2,)}
    assert find_rule(checkpoint, live) is None
    assert str(nearest_rule(checkpoint, live)).startswith(
        "the checkpoint's names would fit in 2 ways, and nothing tells"
    )
    # With shapes that tell them apart there is one way only.
    _rule, pairs = find_rule({**checkpoint, "module.w": (3,)}, {**live, "w": (3,)}) or (None, {})
    assert pairs == {"module.w": "w", "_orig_mod.w": "module._orig_mod.w"}


def test_a_name_of_another_shape_is_no_match():
    assert find_rule({"model.w": (2,), "model.b": (2,)}, {"w": (2,), "b": (3,)}) is None
    assert find_rule({"model.w": (2,)}, {"w": (2,)}) is not None


def test_moments_that_could_not_follow_are_refused(caplog):
    source, now = tensors_and_state("bare", 1)[1], tensors_and_state("bare", 2)[1]
    entries = saved(as_attribute(source, "model"))
    state = entries["optimizer"].tree["state"]
    entries["optimizer"].tree["groups"][0]["params"][0] = "model/gone"
    state["model/gone"] = state.pop("model/model.embed.weight")
    message = refused(now, entries)
    assert "'optimizer': its state for 'model/gone' cannot be matched with a parameter" in message


def test_what_is_no_state_of_a_module_is_said_with_its_entry():
    now = tensors_and_state("bare", 2)[1]
    for tree in ({}, {"tensors": 1}, {"tensors": {}, "values": 3}, {"tensors": {"model.w": 1}, "versions": []}):
        entries = saved(now)
        entries["model"] = dataclasses.replace(entries["model"], tree=tree)
        assert "'model': " in refused(now, entries)


def test_versions_of_layers_go_with_the_names():
    class Versioned(nn.Module):
        _version = 3

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            if local_metadata.get("version", 1) < 3:
                state_dict[f"{prefix}scale"] = state_dict[f"{prefix}scale"] * 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    bare, inside = nn.Sequential(Versioned()), Attribute(nn.Sequential(compiled(Versioned())), "model")
    restored({"model": bare}, saved({"model": inside}))
    restored({"model": inside}, saved({"model": nn.Sequential(Versioned())}))
    assert [p.item() for p in (*bare.parameters(), *inside.parameters())] == [1.0, 1.0]


def losses(run_dir: Path, wrap: Callable[[Net], Any], until: int, **optimizer: Any) -> dict[int, str]:
    torch.manual_seed(0)
    net = Net()
    adamw = torch.optim.AdamW(
        [{"params": net.module.parameters(), "lr": optimizer.get("lr", 0.05)}, {"params": net.embed.parameters()}],
        lr=0.01,
    )
    model = wrap(net)
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    found: dict[int, str] = {}
    with Checkpointer(run_dir, {"model": model, "optimizer": adamw}, every_n_steps=2) as ckpt:
        step = ckpt.resume()
        for (x,) in ckpt.batches(DataLoader(TensorDataset(data), batch_size=4, shuffle=True), epochs=1):
            adamw.zero_grad()
            loss = model(x)
            loss.backward()
            adamw.step()
            step += 1
            found[step] = loss.item().hex()
            ckpt.step(step)
            if step == until:
                break
    return found


def embedded(net: Net) -> nn.Module:
    class Task(Attribute):
        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x)

    return Task(net, "net")


@pytest.mark.parametrize(
    ("before", "now"), [(compiled, lambda net: net), (nn.DataParallel, with_checkpointed_parts), (embedded, compiled)]
)
def test_a_run_goes_on_in_another_wrapping_with_the_same_losses(before, now, tmp_path, caplog):
    straight = losses(tmp_path / "straight", lambda net: net, 99)
    first = losses(tmp_path / "run", before, 3)
    caplog.clear()
    after = losses(tmp_path / "run", now, 99)
    assert min(after) == 4
    assert first | after == straight
    prefixed = ["model: all 11 names of the checkpoint fit without 'net.' in front"] if before is embedded else []
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == prefixed


def test_options_that_changed_are_compared_under_the_new_names(tmp_path, caplog):
    losses(tmp_path / "run", embedded, 3)
    caplog.clear()
    losses(tmp_path / "run", lambda net: net, 5, lr=0.5)
    (line,) = (message for message in caplog.messages if "options stay in force" in message)
    assert "built with 0.5, the checkpoint was built with 0.05; kept" in line


def test_a_lightning_run_gives_its_model_and_its_moments_to_a_bare_module(tmp_path, caplog):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning_samples import make_trainer

    from ckptmgr.lightning import CheckpointManager

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    task = Task()
    trainer = make_trainer(tmp_path, CheckpointManager(tmp_path / "run", every_n_train_steps=2), max_epochs=1)
    trainer.fit(task, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    (optimizer,) = trainer.optimizers
    bare, state = tensors_and_state("bare", 2)
    caplog.clear()
    step = Checkpointer(tmp_path / "plain", state).restore(f"{tmp_path}/run@latest")
    assert step == 2
    source = {**dict(task.model.named_parameters(remove_duplicate=False)), **dict(task.model.named_buffers())}
    assert contents(bare, state["optimizer"]) == contents(source, optimizer)
    assert caplog.messages == ["model: all 11 names of the checkpoint fit without 'model.' in front"]
