"""From one device to another: what was trained on a GPU goes on on the CPU, and back; on the same one, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer
from ckptmgr.state.divergence import tensor_digest
from ckptmgr.state.tensors import same_bits

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU = pytest.param("cpu", id="cpu")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA], id="cuda")
PINNED = pytest.param("cuda:0", marks=[pytest.mark.gpu, NO_CUDA], id="cuda:0")
TOLERANCE = 1e-4


def adamw(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2, **options)


OPTIMIZERS = {
    "default": adamw(),
    "fused": adamw(fused=True),
    "foreach": adamw(foreach=True),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9),
}


class Training:
    """A small model with dropout on a device, and a scaler; everything that a checkpoint has to hold."""

    def __init__(self, device: str, make: Callable[[nn.Module], torch.optim.Optimizer], *, dropout: float) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1)).to(device)
        self.optimizer = make(self.model)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=256.0, growth_interval=2)
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(64, 6, generator=generator), torch.randn(64, 1, generator=generator))
        self.loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2))

    def checkpointer(self, run_dir: Path) -> Checkpointer:
        state = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return Checkpointer(run_dir, state, every_n_steps=5)

    def run(self, run_dir: Path, *, until: int) -> list[float]:
        losses: list[float] = []
        with self.checkpointer(run_dir) as ckpt:
            step = ckpt.resume()
            for x, y in ckpt.batches(self.loader, epochs=4):
                loss = nn.functional.mse_loss(self.model(x.to(self.device)), y.to(self.device))
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                step += 1
                losses.append(loss.item())
                ckpt.step(step)
                if step >= until:
                    break
        return losses

    def moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{slot}": value
            for name, parameter in self.model.named_parameters()
            for slot, value in self.optimizer.state[parameter].items()
        }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device", [CPU, CUDA, PINNED])
def test_on_one_device_a_resume_is_bit_identical(device: str, optimizer: str, tmp_path: Path) -> None:
    make = OPTIMIZERS[optimizer]
    whole = Training(device, make, dropout=0.3)
    expected = whole.run(tmp_path / "whole", until=10)

    Training(device, make, dropout=0.3).run(tmp_path / "run", until=5)
    again = Training(device, make, dropout=0.3)
    torch.manual_seed(99)
    assert again.run(tmp_path / "run", until=10) == expected[5:]
    for name, parameter in again.model.named_parameters():
        assert same_bits(parameter, dict(whole.model.named_parameters())[name])
    moments = whole.moments()
    assert all(same_bits(value, moments[name]) for name, value in again.moments().items())
    assert again.scaler.state_dict() == whole.scaler.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("new", [CPU, CUDA, PINNED])
@pytest.mark.parametrize("old", [CPU, CUDA, PINNED])
def test_on_another_device_the_state_is_the_same_and_training_goes_on(
    old: str, new: str, optimizer: str, tmp_path: Path
) -> None:
    make = OPTIMIZERS[optimizer]
    saved = Training(old, make, dropout=0.0)
    saved.run(tmp_path / "run", until=5)
    expected = {name: value.cpu() for name, value in saved.moments().items()}
    weights = {name: value.cpu() for name, value in saved.model.state_dict().items()}

    again = Training(new, make, dropout=0.0)
    with again.checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.resume() == 5
    assert all(same_bits(value.cpu(), weights[name]) for name, value in again.model.state_dict().items())
    assert all(same_bits(value.cpu(), expected[name]) for name, value in again.moments().items())
    assert all(
        value.device == torch.device(again.model[0].weight.device) for value in again.model.state_dict().values()
    )
    uninterrupted = Training(old, make, dropout=0.0).run(tmp_path / "whole", until=8)
    assert Training(new, make, dropout=0.0).run(tmp_path / "run", until=8) == pytest.approx(
        uninterrupted[5:], abs=TOLERANCE
    )


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_of_a_capturable_optimizer_is_on_the_device(capturable: bool, tmp_path: Path) -> None:
    Training("cuda", adamw(), dropout=0.0).run(tmp_path / "run", until=5)
    again = Training("cuda", adamw(capturable=capturable), dropout=0.0)
    again.run(tmp_path / "run", until=6)
    steps = [value for name, value in again.moments().items() if name.endswith("/step")]
    assert {step.device.type for step in steps} == {"cuda" if capturable else "cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.int8])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_digest_sees_one_changed_element_and_two_that_changed_places(device: str, dtype: torch.dtype) -> None:
    values = torch.arange(1000).remainder(2 if dtype == torch.bool else 100).to(device=device, dtype=dtype)
    digest = tensor_digest(values)
    assert tensor_digest(values.clone()) == digest
    assert tensor_digest(values.view(10, 100).t()) != digest
    changed, swapped = values.clone(), values.clone()
    changed[7] = changed[8]
    swapped[[7, 8]] = values[[8, 7]]
    assert tensor_digest(changed) != digest
    assert tensor_digest(swapped) != digest
