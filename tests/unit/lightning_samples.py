"""Small Lightning programs that break where they are told to, and what two of them can be compared by."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ckptmgr.lightning import CheckpointManager

torch.set_num_threads(1)
for _name in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(f"{_name}.utilities.rank_zero").setLevel(logging.ERROR)
    logging.getLogger(f"{_name}.accelerators.cuda").setLevel(logging.ERROR)


class Broken(Exception):
    """What a program breaks with."""


class Numbered(Dataset):
    """Samples that know their index; with ``noise``, each draws from all three global generators."""

    def __init__(self, n: int = 24, noise: bool = False) -> None:
        self.n = n
        self.noise = noise

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        if self.noise:
            x = x + 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return torch.tensor(float(index)), x


class Stream(IterableDataset):
    """The same samples without a length, shared between workers."""

    def __init__(self, n: int = 24) -> None:
        self.samples = Numbered(n)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.samples), step):
            yield self.samples[index]


class StatefulStream(IterableDataset):
    """A stream that keeps its position on itself."""

    def __init__(self, n: int = 24) -> None:
        self.samples = Numbered(n)
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.samples):
            self.position += 1
            yield self.samples[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def plain_loader(**kwargs: Any) -> DataLoader:
    return DataLoader(Numbered(), batch_size=4, shuffle=True, **kwargs)


class Model(pl.LightningModule):
    """Dropout, BatchNorm, logged means, hooks that draw random numbers; breaks at the n-th call of one of its hooks.

    Args:
        breaks_at: Name of a hook and the number of the call.
        scheduler: Makes the scheduler configuration from the optimizer.
    """

    def __init__(
        self,
        breaks_at: tuple[str, int] | None = None,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        scheduler: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
        self.register_buffer("shadow", torch.zeros(24))
        self.metric = torchmetrics.MeanMetric()
        self.breaks_at = breaks_at
        self.calls: dict[str, int] = {}
        self.seen: list[Any] = []
        self.validated: list[Any] = []
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler

    def reach(self, place: str) -> None:
        self.calls[place] = self.calls.get(place, 0) + 1
        if self.breaks_at == (place, self.calls[place]):
            raise Broken(place)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.reach("training_step")
        self.seen.append((self.current_epoch, batch_idx, batch[0].int().tolist()))
        loss = self.net(batch[1]).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        self.metric(loss.detach())
        self.log("mean", self.metric, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.reach("on_train_batch_end")
        # A target network, as self-supervised training keeps: changed after every callback's hook.
        self.shadow.mul_(0.9).add_(0.1 * self.net[0].weight.detach().flatten() + 0.01 * torch.randn(24))

    def on_train_epoch_start(self) -> None:
        self.reach("on_train_epoch_start")
        torch.rand(1)

    def on_train_epoch_end(self) -> None:
        self.reach("on_train_epoch_end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.reach("validation_step")
            self.validated.append((self.trainer.global_step, batch[0].int().tolist()))
        self.log("val_loss", self.net(batch[1]).pow(2).mean(), batch_size=len(batch[1]))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Numbered(8), batch_size=4, shuffle=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters(), lr=1e-2)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer, self.trainer)}


class TwoOptimizers(Model):
    """Manual optimization."""

    def __init__(self, breaks_at: tuple[str, int] | None = None) -> None:
        super().__init__(breaks_at)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.net[:2].parameters(), lr=1e-2)
        return [first, torch.optim.SGD(self.net[2:].parameters(), lr=1e-2, momentum=0.9)], []


def make_trainer(root: Path, *callbacks: Any, **kwargs: Any) -> pl.Trainer:
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**options, **kwargs})


def fingerprint(trainer: pl.Trainer, model: Model) -> dict[str, Any]:
    """Everything by which the ends of two runs are compared."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    found: dict[str, Any] = {
        **{f"model {name}": value.clone() for name, value in model.state_dict().items()},
        **{f"metric {name}": value for name, value in trainer.callback_metrics.items()},
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "progress": (trainer.global_step, trainer.current_epoch, str(progress), str(trainer.fit_loop.epoch_progress)),
        "stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
    }
    for i, optimizer in enumerate(trainer.optimizers):
        found[f"rates {i}"] = [group["lr"] for group in optimizer.param_groups]
        for key, slots in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {key} {name}": value for name, value in slots.items()}
    for config in trainer.lr_scheduler_configs:
        found["scheduler"] = repr(sorted(config.scheduler.state_dict().items(), key=str))
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if average is not None:
            found |= {f"average {name}": value.clone() for name, value in average.state_dict().items()}
    return found


def differences(first: Any, second: Any) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if not _same(first.get(name), second.get(name)))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and first == second


def assert_resumes_exactly(
    root: Path,
    *breaks: tuple[str, int],
    model: Callable[[Any], Model] = Model,
    loader: Callable[[], Any] = plain_loader,
    callbacks: Callable[[], list[Any]] = list,
    manager: dict[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Train once straight and once with breaks, each in a new Trainer with another seed, and compare everything.

    Returns:
        The checkpoint that each restart went on from.
    """
    manager = {"every_n_train_steps": 1, **(manager or {})}

    def train(name: str, seed: int, breaks_at: tuple[str, int] | None) -> tuple[pl.Trainer, Model]:
        pl.seed_everything(seed, verbose=False)
        module = model(breaks_at)
        trainer = make_trainer(root, *callbacks(), CheckpointManager(root / name, **manager), **options)
        try:
            trainer.fit(module, loader())
        except Broken:
            assert breaks_at is not None
        else:
            assert breaks_at is None, f"nothing called {breaks_at[0]} {breaks_at[1]} times"
        return trainer, module

    straight = train("straight", 1, None)
    starts, validated = [], []
    for number, breaks_at in enumerate((*breaks, None)):
        trainer, module = train("broken", 1 + number, breaks_at)
        starts.append(str(trainer.ckpt_path).rpartition("@")[2])
        validated.append(module.validated)
    assert starts[0] == "None"
    assert None not in starts[1:]
    assert differences(fingerprint(*straight), fingerprint(trainer, module)) == []
    n = len(module.seen)
    assert module.seen == straight[1].seen[len(straight[1].seen) - n :]
    assert validated[-1] == straight[1].validated[len(straight[1].validated) - len(validated[-1]) :]
    return starts[1:]
