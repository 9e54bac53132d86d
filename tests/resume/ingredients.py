"""What is trained: the ingredients that a case of the matrix combines, the same for every face."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import PerSampleSeed

__all__ = ["LOADERS", "NBATCHES", "NSAMPLES", "Setup", "make_loader", "make_model", "seed_all", "validation_loader"]

NSAMPLES, BATCH, NFEATURES = 26, 4, 6
NBATCHES = 7  # The last one is short.


@dataclass(frozen=True)
class Setup:
    """One way to train."""

    loader: str = "shuffle"
    workers: int = 0
    optimizer: str = "adamw"
    scheduler: str = "none"
    accumulate: int = 1
    flush: bool = True  # Step at the end of an epoch, even if fewer batches than `accumulate` were gathered.
    precision: str = "float32"
    ema: bool = False
    epochs: int = 3
    max_steps: int | None = None
    validate_every: int = 0  # batches; 0: at the end of each epoch

    def __str__(self) -> str:
        """Name what differs from the default."""
        default = asdict(Setup())
        parts = [f"{k}={v}" for k, v in asdict(self).items() if v != default[k]]
        return ",".join(parts) or "default"


def sample(index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return a sample that depends on the index only, and tells it."""
    x = torch.sin(torch.arange(NFEATURES, dtype=torch.float32) * (index + 1) * 0.37)
    return index, x, x.sum().reshape(1)


class Plain(Dataset[Any]):
    """No randomness. Not one of torch's own data sets, so that nobody knows."""

    def __len__(self) -> int:
        return NSAMPLES

    def __getitem__(self, index: int) -> Any:
        return sample(index)


class Augmented(Plain):
    """Draws from the global generators of torch, NumPy and Python, and from one of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __getitem__(self, index: int) -> Any:
        index, x, y = sample(index)
        noise = torch.randn(NFEATURES) * 0.1 + float(np.random.rand()) * 0.1
        return index, x + noise + random.random() * 0.1 + float(self.rng.normal()) * 0.1, y


class Stream(IterableDataset[Any]):
    """Has no length; draws its order from torch's generator and its noise from NumPy's."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        # Unequal shares: one worker ends its epoch before the other.
        first, last = ((0, 14), (14, NSAMPLES))[worker.id] if worker else (0, NSAMPLES)
        order = torch.randperm(NSAMPLES).tolist()
        for index in range(first, last):
            number, x, y = sample(order[index])
            yield number, x + float(np.random.rand()) * 0.1, y


class Countless:
    """A loader of the user's own: no length, no state, a generator of its own that goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def __iter__(self) -> Iterator[Any]:
        order = self.rng.permutation(NSAMPLES).tolist()
        for start in range(0, NSAMPLES, BATCH):
            numbers, xs, ys = zip(*map(sample, order[start : start + BATCH]), strict=True)
            yield torch.tensor(numbers), torch.stack(xs), torch.stack(ys)


LOADERS = ("shuffle", "generator", "stateful", "augmented", "sample-seed", "stream", "countless", "kept-workers")


def make_loader(setup: Setup) -> Any:
    """Build the loader, as each process start does."""
    how: dict[str, Any] = {"batch_size": BATCH, "num_workers": setup.workers}
    match setup.loader:
        case "shuffle":
            return DataLoader(Plain(), shuffle=True, **how)
        case "generator":
            return DataLoader(Plain(), shuffle=True, generator=torch.Generator().manual_seed(11), **how)
        case "stateful":
            return StatefulDataLoader(Plain(), shuffle=True, **how)
        case "stateful-augmented":
            return StatefulDataLoader(Augmented(), shuffle=True, **how)
        case "augmented":
            return DataLoader(Augmented(), shuffle=True, **how)
        case "sample-seed":
            return DataLoader(PerSampleSeed(Augmented(), seed=7), shuffle=True, **how)
        case "kept-workers":
            kept = setup.workers > 0
            return DataLoader(PerSampleSeed(Augmented(), seed=7), shuffle=True, persistent_workers=kept, **how)
        case "augmented-kept-workers":
            return DataLoader(Augmented(), shuffle=True, persistent_workers=True, **how)
        case "stream":
            return DataLoader(Stream(), **how)
        case "countless":
            return Countless()
    raise ValueError(setup.loader)


def validation_loader() -> Any:
    """Build the validation data. Iterating a DataLoader draws from torch's generator, as everywhere."""
    return DataLoader(Plain(), batch_size=13)


def make_model() -> nn.Module:
    """Build a net with everything that forward changes or draws: BatchNorm and dropout."""
    return nn.Sequential(nn.Linear(NFEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


def make_optimizers(setup: Setup, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Build one optimizer over everything, or two that share the net."""
    match setup.optimizer:
        case "adamw":
            return {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.02)}
        case "adamw-fused":
            return {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)}
        case "sgd":
            return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)}
        case "two":
            body, head = list(model[:4].parameters()), list(model[4:].parameters())
            return {
                "optimizer": torch.optim.AdamW(body, lr=0.02),
                "head_optimizer": torch.optim.SGD(head, lr=0.01, momentum=0.9, nesterov=True),
            }
    raise ValueError(setup.optimizer)


def make_scheduler(setup: Setup, optimizer: torch.optim.Optimizer) -> Any:
    """Build the learning rate's scheduler, or None."""
    match setup.scheduler:
        case "onecycle":
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=100)
        case "plateau":
            return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        case "none":
            return None
    raise ValueError(setup.scheduler)


def seed_all(seed: int) -> None:
    """Seed as a user's script does."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
