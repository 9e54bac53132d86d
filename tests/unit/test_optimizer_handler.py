"""Optimizers: state goes with the parameter's name, bit by bit, and what does not match is told."""

import copy

import pytest
import torch
from saved_state import bits, reader_of, restored, saved
from torch import nn

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.state.capture import capture_state, check_state, dry_check
from ckptmgr.state.handlers import HandlerRegistry
from ckptmgr.state.optimizer_names import to_indices, to_names

OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=2),
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        dtype = next(module.parameters()).dtype
        batch = torch.randn(5, 3, generator=generator).to(dtype)

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = module(batch).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_bit_by_bit(name):
    first = net()
    optimizer = OPTIMIZERS[name](first.parameters())
    train(first, optimizer)
    entries = saved({"model": first, "optimizer": optimizer})

    second = net(seed=9)
    resumed = OPTIMIZERS[name](second.parameters())
    restored({"model": second, "optimizer": resumed}, entries)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    train(first, optimizer, seed=4)
    train(second, resumed, seed=4)
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


def test_restoring_over_an_optimizer_that_has_trained_replaces_its_state():
    first, second = net(), net(seed=1)
    optimizer, other = (torch.optim.Adam(m.parameters()) for m in (first, second))
    train(first, optimizer, steps=1)
    train(second, other, steps=5, seed=2)
    restored({"model": second, "optimizer": other}, saved({"model": first, "optimizer": optimizer}))
    assert bits(other.state_dict()) == bits(optimizer.state_dict())


def test_moments_follow_their_parameters_when_the_order_changes():
    # Both layers have the same shape: by number, the moments would be swapped without a word.
    def build(order: tuple[str, str]) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        parameters = dict(module.named_parameters())
        listed = [parameters[f"{layer}.{kind}"] for layer in order for kind in ("weight", "bias")]
        return module, torch.optim.Adam(listed)

    module, optimizer = build(("a", "b"))
    (module["a"](torch.ones(2)) * 3 + module["b"](torch.ones(2))).sum().backward()
    optimizer.step()
    live, reordered = build(("b", "a"))
    restored({"model": live, "optimizer": reordered}, saved({"model": module, "optimizer": optimizer}))
    for name, parameter in module.named_parameters():
        assert bits(reordered.state[dict(live.named_parameters())[name]]) == bits(optimizer.state[parameter])
    assert bits(reordered.state_dict()["state"]) != bits(optimizer.state_dict()["state"])


def test_groups_that_changed_places_keep_their_options():
    def build(flipped: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = net()
        groups = [{"params": list(module[0].parameters()), "lr": 0.5}, {"params": list(module[2].parameters())}]
        return module, torch.optim.SGD(groups[::-1] if flipped else groups, lr=0.1)

    module, optimizer = build(False)
    optimizer.param_groups[0]["lr"] = 0.25
    live, other = build(True)
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.25]


def test_float32_moments_of_bfloat16_parameters_are_not_rounded():
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = net().bfloat16()
        return module, torch.optim.Adam(module.parameters())

    module, optimizer = build()
    train(module, optimizer)
    for slots in optimizer.state.values():
        slots["exp_avg"] = slots["exp_avg"].float() + 2**-20
        slots["note"] = "kept"
    live, other = build()
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert other.state_dict()["state"][0]["exp_avg"].dtype == torch.float32


def test_hyper_parameters_come_from_the_checkpoint_and_kernels_stay_live():
    module, live = net(), net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.3)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(module, optimizer)
    other = torch.optim.AdamW(live.parameters(), lr=0.1, fused=True)
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    (group,) = other.param_groups
    assert (group["lr"], group["initial_lr"], group["weight_decay"], group["fused"]) == (0.5, 0.5, 0.3, True)
    train(live, other)


def test_a_tensor_learning_rate_is_written_in_place():
    module, live = net(), net()
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.25))
    rate = torch.tensor(0.5)
    other = torch.optim.Adam(live.parameters(), lr=rate)
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert other.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_keys_in_the_file_are_the_parameters_names():
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, optimizer)
    names = {
        record.name for record in reader_of({"net": module, "opt": optimizer}).manifest.tensors if record.entry == "opt"
    }
    assert names == {f"net/{name}/momentum_buffer" for name, _ in module.named_parameters()}


def test_names_come_from_the_optimizer_where_no_module_is_captured():
    module, live = net(), net()
    optimizer = torch.optim.Adam(module.named_parameters())
    train(module, optimizer)
    entries = saved({"optimizer": optimizer})
    assert set(entries["optimizer"].tree["state"]) == {name for name, _ in module.named_parameters()}
    reordered = torch.optim.Adam(list(live.named_parameters())[::-1])
    restored({"optimizer": reordered}, entries)
    assert bits(reordered.state[live[0].weight]) == bits(optimizer.state[module[0].weight])
    assert reordered.param_groups[0]["param_names"][0] == "2.bias"


def test_positions_are_names_only_for_the_very_same_groups():
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    entries = saved({"optimizer": optimizer})
    assert entries["optimizer"].tree["positional"]
    same = torch.optim.Adam(net().parameters())
    groups = [{"params": layer.parameters()} for layer in (net()[0], net()[2])]
    with pytest.raises(StateMismatchError, match=r"only positions: groups of 4 in the checkpoint, groups of 2, 2 now"):
        check_state({"optimizer": torch.optim.Adam(groups)}, entries)
    with pytest.raises(StateMismatchError, match=r"'0/0' was float32 \(4, 3\), and is float32 \(2,\) now"):
        check_state({"optimizer": torch.optim.Adam(list(net().parameters())[::-1])}, entries)
    with pytest.raises(StateMismatchError, match="those of the live optimizer have names"):
        check_state({"optimizer": torch.optim.Adam(net().named_parameters())}, entries)
    restored({"optimizer": same}, entries)
    assert bits(same.state_dict()) == bits(optimizer.state_dict())


def test_a_parameter_in_no_captured_module_is_refused_at_the_first_capture():
    stranger = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([*net().parameters(), stranger], lr=0.1)
    with pytest.raises(UnsupportedStateError) as caught:
        capture_state({"model": net(), "optimizer": optimizer}, registry=HandlerRegistry())
    assert "is in no captured module" in str(caught.value)
    assert "next:" in str(caught.value)


def test_flat_state_is_only_for_the_same_list_of_parameters():
    module, live = net(), net()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=2)
    train(module, optimizer)
    reordered = torch.optim.LBFGS(list(live.parameters())[::-1], max_iter=2)
    with pytest.raises(StateMismatchError, match="all parameters together"):
        check_state({"model": live, "o": reordered}, saved({"model": module, "o": optimizer}))


def test_a_tied_parameter_goes_by_any_of_its_names():
    class Net(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            setattr(self, first, nn.Linear(2, 2, bias=False))
            setattr(self, second, nn.Linear(2, 2, bias=False))
            getattr(self, second).weight = getattr(self, first).weight

    module, live = Net("embed", "head"), Net("head", "embed")
    optimizer, other = (torch.optim.Adam(m.parameters()) for m in (module, live))
    module.embed(torch.ones(2)).sum().backward()
    optimizer.step()
    restored({"model": live, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert bits(other.state_dict()) == bits(optimizer.state_dict())


def test_an_optimizer_with_a_state_dict_of_its_own_is_kept_whole():
    class Odd(torch.optim.SGD):
        calls = 0

        def state_dict(self):
            return {"calls": self.calls, "momentum": [torch.ones(2)]}

        def load_state_dict(self, state_dict):
            self.calls = state_dict["calls"]

    module = net()
    optimizer, other = Odd(module.parameters()), Odd(module.parameters())
    optimizer.calls = 5
    restored({"model": module, "optimizer": other}, saved({"model": module, "optimizer": optimizer}))
    assert other.calls == 5
    plain = torch.optim.SGD(module.parameters())
    with pytest.raises(StateMismatchError, match="of another kind"):
        check_state({"model": module, "optimizer": plain}, saved({"model": module, "optimizer": optimizer}))


def test_a_failure_later_on_puts_the_optimizer_back():
    class Fails:
        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state_dict):
            raise RuntimeError("no")

    module, live = net(), net()
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=torch.tensor(0.1)) for m in (module, live))
    train(module, optimizer)
    train(live, other, steps=1, seed=7)
    entries = saved({"model": module, "optimizer": optimizer, "last": Fails()})
    before, rate = copy.deepcopy(other.state_dict()), other.param_groups[0]["lr"]
    with pytest.raises(StateMismatchError, match="'last' refused its state"):
        restored({"model": live, "optimizer": other, "last": Fails()}, entries)
    assert bits(other.state_dict()) == bits(before)
    assert other.param_groups[0]["lr"] is rate


def test_lightnings_wrapper_is_seen_through():
    optimizer_module = pytest.importorskip("lightning.pytorch.core.optimizer")
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    entries = capture_state({"model": module, "optimizer": optimizer_module.LightningOptimizer(optimizer)})
    dry_check(entries)
    assert entries[1].handler == "optimizer"
    restored({"model": module, "optimizer": optimizer}, {e.name: e for e in entries})


def test_numbered_state_dicts_convert_both_ways_without_an_optimizer():
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    names = [[name for name, _ in module.named_parameters()]]
    tree = to_names(optimizer.state_dict(), names)
    reordered = [names[0][::-1]]
    numbered = to_indices(tree, reordered)
    assert bits(numbered["state"][0]) == bits(optimizer.state_dict()["state"][3])
    assert numbered["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert bits(to_indices(tree, names)) == bits(optimizer.state_dict())
    with pytest.raises(ValueError):
        to_names(optimizer.state_dict(), [names[0][:3]])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.RAdam])
def test_the_state_of_another_kind_of_optimizer_is_refused(kind):
    first = net()
    optimizer = torch.optim.AdamW(first.parameters())
    train(first, optimizer)
    entries = saved({"model": first, "optimizer": optimizer})
    live = net()
    with pytest.raises(StateMismatchError, match=f"AdamW, the live one {kind.__name__}"):
        check_state({"model": live, "optimizer": kind(live.parameters())}, entries)
