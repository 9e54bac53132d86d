"""Modules: what is captured, under which names, and what a restore refuses."""

import copy

import pytest
import torch
from saved_state import bits, reader_of, restored, saved
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.state.capture import capture_state, check_state
from ckptmgr.state.handlers import HandlerRegistry
from ckptmgr.state.names import ParameterNames


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.module = nn.Linear(width, 2)

    def forward(self, x):
        return self.module(self.norm(self.conv(x)).mean((2, 3)))


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.fill_(7)
    return module


def test_a_module_comes_back_bit_by_bit_into_the_same_tensors():
    live = trained(Net(), seed=1)
    pointers = {name: parameter.data_ptr() for name, parameter in live.named_parameters()}
    source = trained(Net())
    with torch.no_grad():
        source.conv.weight[0] = torch.tensor(float("nan"))
        source.conv.weight[1] = -0.0
    restored({"model": live}, saved({"model": source}))
    assert bits(live.state_dict()) == bits(source.state_dict())
    assert {name: parameter.data_ptr() for name, parameter in live.named_parameters()} == pointers
    assert all(parameter.requires_grad for parameter in live.parameters())


def test_names_in_the_file_are_the_modules_own_and_temporary_buffers_are_left_out():
    reader = reader_of({"model": Net()})
    assert {tensor.name for tensor in reader.manifest.tensors} == set(Net().state_dict())
    assert "scratch" not in {tensor.name for tensor in reader.manifest.tensors}


def compiled(module: nn.Module) -> nn.Module:
    # The backend does not matter for names, and the default one takes seconds to import.
    return torch.compile(module, backend="eager")


def wrapped_every_way() -> dict[str, nn.Module]:
    compiled_inside = trained(Net())
    compiled_inside.module = compiled(compiled_inside.module)
    checkpointed = trained(Net())
    checkpointed.conv = checkpoint_wrapper(checkpointed.conv)
    checkpointed.norm = checkpoint_wrapper(compiled(checkpointed.norm))
    return {
        "data parallel": nn.DataParallel(trained(Net())),
        "compiled": compiled(trained(Net())),
        "compiled data parallel": compiled(nn.DataParallel(trained(Net()))),
        "compiled inside": compiled_inside,
        "activation checkpointing": checkpointed,
        "all together": nn.DataParallel(compiled(checkpointed)),
    }


@pytest.mark.parametrize(
    "wrapping",
    [
        "data parallel",
        "compiled",
        "compiled data parallel",
        "compiled inside",
        "activation checkpointing",
        "all together",
    ],
)
def test_prefixes_of_wrappers_are_removed_and_names_of_the_user_stay(wrapping):
    plain = trained(Net())
    wrapped = wrapped_every_way()[wrapping]
    entry = capture_state({"model": wrapped}, registry=HandlerRegistry())[0]
    assert bits(entry.tree["tensors"]) == bits(dict(plain.state_dict()))
    assert entry.tree["versions"] == {"norm": 2}
    names = ParameterNames({"model": wrapped})
    assert {names.of(parameter) for parameter in wrapped.parameters()} == {
        f"model/{name}" for name, _ in plain.named_parameters()
    }

    into_plain, into_wrapped = trained(Net(), seed=5), wrapped_every_way()[wrapping]
    trained(into_wrapped, seed=6)
    restored({"model": into_plain}, saved({"model": wrapped}))
    restored({"model": into_wrapped}, saved({"model": plain}))
    assert bits(into_plain.state_dict()) == bits(plain.state_dict())
    assert bits(capture_state({"m": into_wrapped})[0].tree["tensors"]) == bits(dict(plain.state_dict()))


def test_the_complete_difference_is_told_at_once_and_nothing_is_changed():
    class Other(Net):
        def __init__(self) -> None:
            super().__init__(width=4)
            self.conv = nn.Conv2d(1, 4, 5)
            self.norm = nn.Identity()
            self.extra = nn.Linear(2, 2, bias=False)
            self.module = nn.Linear(4, 2).half()

    live = Other()
    before = bits(live.state_dict())
    with pytest.raises(StateMismatchError) as caught:
        restored({"model": live}, saved({"model": Net()}))
    message = str(caught.value)
    for part in (
        "'model'",
        "missing in the checkpoint: 'extra.weight'",
        "not in the live module: 'norm.weight'",
        "shape of 'conv.weight' is float32 (4, 1, 3, 3) in the checkpoint, float32 (4, 1, 5, 5) now",
        "dtype of 'module.weight' is float32 (2, 4) in the checkpoint, float16 (2, 4) now",
        "next:",
    ):
        assert part in message
    assert bits(live.state_dict()) == before


class Tied(nn.Module):
    def __init__(self, is_tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


def test_tied_parameters_are_stored_once_and_stay_tied():
    reader = reader_of({"model": trained(Tied())})
    (record,) = reader.manifest.tensors
    assert (record.name, record.aliases) == ("embed.weight", ("head.weight",))
    live = trained(Tied(), seed=3)
    restored({"model": live}, saved({"model": trained(Tied())}))
    assert live.embed.weight is live.head.weight
    assert bits(live.embed.weight) == bits(trained(Tied()).embed.weight)


@pytest.mark.parametrize("live_is_tied", [True, False])
def test_a_tie_that_one_side_lacks_is_refused(live_is_tied):
    live, source = trained(Tied(live_is_tied)), trained(Tied(not live_is_tied))
    with pytest.raises(StateMismatchError, match=r"'head.weight' is tied to 'embed.weight'"):
        check_state({"model": live}, saved({"model": source}))


class WithExtraState(nn.Module):
    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.history: dict[int, object] = {}
        self.fails = fails

    def get_extra_state(self):
        return self.history

    def set_extra_state(self, state):
        if self.fails and state == {1: (float("inf"), "a")}:
            raise RuntimeError("cannot take this history")
        self.history = state


def test_extra_state_travels_with_its_types():
    source = trained(WithExtraState())
    source.history = {1: (float("inf"), "a"), 2: torch.arange(3)}
    live = WithExtraState()
    restored({"model": live}, saved({"model": source}))
    assert bits(live.history) == bits(source.history)
    assert bits(live.weight) == bits(source.weight)


def test_extra_state_that_is_a_tensor_may_have_grown():
    class Growing(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.seen = torch.arange(size)

        def get_extra_state(self):
            return self.seen

        def set_extra_state(self, state):
            self.seen = state

    live = Growing(1)
    restored({"model": live}, saved({"model": Growing(5)}))
    assert live.seen.tolist() == [0, 1, 2, 3, 4]


def test_a_module_that_fails_while_loading_is_put_back():
    source = trained(WithExtraState())
    source.history = {1: (float("inf"), "a")}
    live, first = trained(WithExtraState(fails=True), seed=2), trained(Net(), seed=2)
    live.history = {0: "before"}
    before = bits([live.weight, live.history, dict(first.state_dict())])
    with pytest.raises(StateMismatchError, match="cannot take this history") as caught:
        restored({"net": first, "model": live}, saved({"net": trained(Net()), "model": source}))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert bits([live.weight, live.history, dict(first.state_dict())]) == before


def test_a_module_with_hooks_of_its_own_is_loaded_through_them():
    class Cached(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.cache = None
            self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())

        def refresh(self) -> None:
            self.cache = self.weight.detach().sum()

    live, source = Cached(), trained(Cached())
    restored({"model": live}, saved({"model": source}))
    assert bits(live.cache) == bits(source.weight.detach().sum())


def test_modules_with_a_versioned_state_dict_are_not_converted_again():
    class Versioned(nn.Module):
        _version = 3

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            if local_metadata.get("version", 1) < 3:
                state_dict[f"{prefix}scale"] = state_dict[f"{prefix}scale"] * 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    live = nn.Sequential(compiled(Versioned()))
    restored({"model": live}, saved({"model": nn.Sequential(Versioned())}))
    assert [p.item() for p in live.parameters()] == [1.0]


def test_an_expanded_buffer_and_channels_last_weights_come_back():
    def build(fill: float) -> nn.Module:
        module = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        module.register_buffer("mask", torch.full((1, 3), fill).expand(4, 3))
        return module

    live, source = build(0.0), build(2.0)
    restored({"model": live}, saved({"model": source}))
    assert bits(live.state_dict()) == bits(source.state_dict())
    assert live.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("build", "why"),
    [(lambda: nn.LazyLinear(3), "not initialised"), (lambda: nn.Linear(2, 2, device="meta"), "meta device")],
)
def test_parameters_without_values_are_refused_by_name(build, why):
    with pytest.raises(UnsupportedStateError, match=r"state\['model'\]: .*'0.weight'.*" + why):
        capture_state({"model": nn.Sequential(build())}, registry=HandlerRegistry())


def test_capture_refers_to_live_tensors_and_copies_nothing():
    module = trained(Net())
    entry = capture_state({"model": module}, registry=HandlerRegistry())[0]
    assert entry.tree["tensors"]["conv.weight"].data_ptr() == module.conv.weight.data_ptr()
    assert copy.deepcopy(entry.tree["tensors"]["conv.weight"]).data_ptr() != module.conv.weight.data_ptr()
