"""Random number generators come back bit by bit, and never half."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.state.generators import capture_generators, find_generators, restore_generators
from ckptmgr.state.rng import (
    AnyGenerator,
    capture_generator,
    capture_rng,
    preserved_rng,
    restore_generator,
    restore_rng,
    same_rng,
)

MODULE_RNG = np.random.default_rng(11)


def draw() -> list[Any]:
    # Normals too: three of the generators keep a second one for later.
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        torch.randn(3).tolist(),
    ]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def json_with_bytes(tree: Any) -> Any:
    """Only dicts with string keys, uint8 tensors and JSON values may occur."""
    if isinstance(tree, dict):
        assert all(isinstance(key, str) for key in tree)
        return {key: json_with_bytes(value) for key, value in tree.items()}
    if isinstance(tree, torch.Tensor):
        assert tree.dtype == torch.uint8
        assert tree.device.type == "cpu"
        return {"bytes": bytes(tree.numpy()).hex()}
    assert tree is None or isinstance(tree, bool | int | float | str)
    return tree


def through_json(tree: Any) -> Any:
    def back(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"bytes"} and isinstance(value["bytes"], str):
                return torch.frombuffer(bytearray.fromhex(value["bytes"]), dtype=torch.uint8)
            return {key: back(item) for key, item in value.items()}
        return value

    return back(json.loads(json.dumps(json_with_bytes(tree))))


def test_restored_generators_go_on_as_the_captured_ones() -> None:
    seed_all(3)
    draw()
    tree = through_json(capture_rng())
    expected = [draw(), draw()]
    seed_all(4)
    assert restore_rng(tree) == []
    assert [draw(), draw()] == expected


def test_a_captured_tree_does_not_change_with_the_generators() -> None:
    tree = capture_rng()
    before = copy.deepcopy(tree)
    draw()
    assert same_rng(tree, before)
    assert not same_rng(tree, capture_rng())


def test_preserved_rng_puts_back_also_after_an_exception() -> None:
    def fail() -> None:
        draw()
        raise ZeroDivisionError

    tree = capture_rng()
    with pytest.raises(ZeroDivisionError), preserved_rng():
        fail()
    assert same_rng(tree, capture_rng())


@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
@pytest.mark.parametrize("damage", ["missing", "cut", "type"])
def test_a_damaged_tree_is_refused_and_nothing_changes(key: str, damage: str) -> None:
    tree: dict[str, Any] = copy.deepcopy(capture_rng())
    draw()
    before = capture_rng()
    if damage == "missing":
        del tree[key]
    elif damage == "type":
        tree[key] = "nonsense"
    elif key == "torch":
        tree[key] = tree[key][:-1]
    elif key == "python":
        tree[key]["words"] = tree[key]["words"][:-1]
    else:
        tree[key]["state"]["key"]["bytes"] = tree[key]["state"]["key"]["bytes"][:-1]
    with pytest.raises(StateMismatchError):
        restore_rng(tree)
    assert same_rng(before, capture_rng())


def test_states_of_devices_that_are_not_here_become_notes() -> None:
    tree = capture_rng()
    tree["cuda"] = {"97": torch.zeros(16, dtype=torch.uint8)}
    (note, *_) = restore_rng(tree)
    assert note.startswith("the RNG state of cuda:97 was not restored")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_cuda_device_is_captured_and_restored() -> None:
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        torch.rand(5, device=device)
    tree = through_json(capture_rng())
    expected = [torch.rand(5, device=device).tolist() for device in devices]
    assert list(tree["cuda"]) == [str(i) for i in range(len(devices))]
    assert restore_rng(tree) == []
    assert [torch.rand(5, device=device).tolist() for device in devices] == expected
    generator = torch.Generator(devices[0]).manual_seed(3)
    kept = through_json(capture_generator(generator))
    first = torch.rand(5, device=devices[0], generator=generator).tolist()
    restore_generator(generator, kept)
    assert torch.rand(5, device=devices[0], generator=generator).tolist() == first


def test_capturing_does_not_start_cuda() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA runs already")
    assert "cuda" not in capture_rng()
    assert not torch.cuda.is_initialized()


GENERATORS: dict[str, AnyGenerator] = {
    "torch": torch.Generator().manual_seed(1),
    "python": random.Random(1),
    "RandomState": np.random.RandomState(1),
    "PCG64": np.random.default_rng(1),
    "PCG64DXSM": np.random.Generator(np.random.PCG64DXSM(1)),
    "MT19937": np.random.Generator(np.random.MT19937(1)),
    "Philox": np.random.Generator(np.random.Philox(1)),
    "SFC64": np.random.Generator(np.random.SFC64(1)),
}


def draw_from(generator: AnyGenerator) -> list[float]:
    if isinstance(generator, torch.Generator):
        return torch.rand(5, generator=generator).tolist()  # type: ignore[no-any-return]
    if isinstance(generator, random.Random):
        return [generator.random(), generator.gauss(0, 1)]
    # float32 leaves half of a 64-bit draw for later.
    own = generator.standard_normal(dtype=np.float32) if isinstance(generator, np.random.Generator) else 0
    return [float(own), *map(float, generator.standard_normal(3))]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_object_goes_on_as_captured(name: str) -> None:
    generator = GENERATORS[name]
    draw_from(generator)
    tree = through_json(capture_generator(generator))
    expected = draw_from(generator)
    draw_from(generator)
    restore_generator(generator, tree)
    assert draw_from(generator) == expected


def test_a_generator_of_another_kind_is_refused() -> None:
    with pytest.raises(StateMismatchError, match="another kind"):
        restore_generator(random.Random(), capture_generator(torch.Generator()))
    with pytest.raises(StateMismatchError, match="another kind"):
        restore_generator(np.random.default_rng(), capture_generator(np.random.RandomState(0)))
    with pytest.raises(UnsupportedStateError):
        capture_generator(random.SystemRandom())


class Slotted:
    __slots__ = ("empty", "rng")

    def __init__(self) -> None:
        self.rng = random.Random(2)


class Pipeline:
    def __init__(self) -> None:
        closed_over = np.random.default_rng(5)
        self.rng = torch.Generator()
        self.same_again = self.rng
        self.steps = [Slotted(), {"deep": (lambda x: x + closed_over.random())}]
        self.draw = random.random
        self.me = self

    def __call__(self) -> float:
        return float(MODULE_RNG.random())


def test_generators_are_found_wherever_a_data_set_keeps_them() -> None:
    found = find_generators({"dataset": Pipeline()})
    assert sorted(found) == [
        "dataset.rng",
        "dataset.steps[0].rng",
        "dataset.steps[1]['deep'].closed_over",
        "dataset:MODULE_RNG",
    ]


def test_found_generators_are_restored_by_path_and_strangers_are_named() -> None:
    first, second = Pipeline(), Pipeline()
    first.rng.manual_seed(77)
    trees = capture_generators(find_generators({"dataset": first}))
    trees["dataset.gone"] = trees["dataset.rng"]
    notes = restore_generators(find_generators({"dataset": second}), trees)
    assert notes == ["the generator dataset.gone of the checkpoint is not there"]
    assert torch.equal(first.rng.get_state(), second.rng.get_state())
