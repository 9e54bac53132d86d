"""A user's training script with `Checkpointer`; without it (``run_dir`` None) it is the uninterrupted reference."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from faults import Fault, Faults
from ingredients import Setup, make_loader, make_model, make_optimizers, make_scheduler, seed_all, validation_loader
from results import digest_of, write_result
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckptmgr import Checkpointer

__all__ = ["main"]


class Unmanaged:
    """What the loop would be without a checkpointer: two nested loops, and nothing else."""

    def __init__(self) -> None:
        self.epoch = 0
        self.is_last_batch: bool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def resume(self) -> int:
        return 0

    def batches(self, loader: Any, *, epochs: int) -> Iterator[Any]:
        for self.epoch in range(epochs):
            dataset = getattr(loader, "dataset", None)
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(self.epoch)
            length = _length(loader)
            for number, batch in enumerate(loader, start=1):
                self.is_last_batch = None if length is None else number == length
                yield batch

    def step(self, step: int, *, metrics: Any = None) -> None:
        """Nothing to save."""


def main(job: dict[str, Any]) -> None:
    """Train to the end, or to the fault.

    Args:
        job: ``setup``, ``fault`` and ``options`` (of the checkpointer) as dicts, ``run_dir``, ``result`` (a path),
            ``seed``.
    """
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torchdata")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    torch.set_num_threads(1)
    setup = Setup(**job["setup"])
    faults = Faults(Fault(**job["fault"]) if job["fault"] else None)
    seed_all(job["seed"])
    train(setup, faults, job)


def train(setup: Setup, faults: Faults, job: dict[str, Any]) -> None:
    """The script itself."""
    loader = make_loader(setup)
    model = make_model()
    optimizers = make_optimizers(setup, model)
    scheduler = make_scheduler(setup, optimizers["optimizer"])
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) if setup.ema else None
    progress: dict[str, Any] = {"epoch": 0, "in_epoch": 0, "trace": []}
    state = {"model": model, **optimizers, "progress": progress}
    state |= {"scheduler": scheduler} if scheduler else {}
    state |= {"ema": ema} if ema else {}
    if "optimizing" in str(job["fault"]):
        _fail_inside_of_step(faults, optimizers["optimizer"], progress)

    manager: Any = Checkpointer(job["run_dir"], state, **job["options"]) if job["run_dir"] else Unmanaged()
    with manager as ckpt:
        step = ckpt.resume()
        is_done = setup.max_steps is not None and step >= setup.max_steps
        batches = [] if is_done else ckpt.batches(loader, epochs=setup.epochs, **job.get("batches", {}))
        for numbers, x, y in batches:
            turn = len(progress["trace"]) + 1
            faults.reached("fetched", turn)
            if ckpt.epoch != progress["epoch"]:
                if ckpt.is_last_batch is None:
                    # Without a length nobody knows the last batch; the epoch has ended when the next one begins.
                    validate(setup, model, ema, scheduler, faults, turn)
                progress["epoch"], progress["in_epoch"] = ckpt.epoch, 0
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16"):
                loss = nn.functional.mse_loss(model(x).float(), y)
            faults.reached("forward", turn)
            (loss / setup.accumulate).backward()
            progress["in_epoch"] += 1
            ngathered = progress["in_epoch"] if setup.flush else turn
            if ngathered % setup.accumulate == 0 or (setup.flush and ckpt.is_last_batch):
                for optimizer in optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
                faults.reached("stepped", turn)
                if setup.scheduler == "onecycle":
                    scheduler.step()
                if ema:
                    ema.update_parameters(model)
                step += 1
            progress["trace"].append(
                {"epoch": ckpt.epoch, "samples": numbers.tolist(), "loss": loss.item().hex(), "net": digest_of(model)}
            )
            if ckpt.is_last_batch:
                validate(setup, model, ema, scheduler, faults, turn)
            ckpt.step(step, metrics={"loss": loss})
            faults.reached("turn-end", turn)
            if setup.max_steps is not None and step >= setup.max_steps:
                break
    result = {
        "trace": progress["trace"],
        "step": step,
        "net": model.state_dict(),
        "ema": ema.state_dict() if ema else None,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "scheduler": scheduler.state_dict() if scheduler else None,
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
    }
    write_result(job["result"], result)


def validate(setup: Setup, model: nn.Module, ema: Any, scheduler: Any, faults: Faults, turn: int) -> None:
    """Validate, and tell the scheduler that wants to know."""
    net = ema or model
    net.eval()
    total = 0.0
    with torch.no_grad():
        for _, x, y in validation_loader():
            total += nn.functional.mse_loss(net(x), y).item()
            faults.reached("validating", turn)
    net.train()
    if setup.scheduler == "plateau":
        scheduler.step(total)


def _fail_inside_of_step(faults: Faults, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    step = optimizer.step.__func__  # type: ignore[attr-defined]

    def failing(*args: Any, **kwargs: Any) -> None:
        step(optimizer, *args, **kwargs)
        faults.reached("optimizing", len(progress["trace"]) + 1)

    optimizer.step = failing  # type: ignore[method-assign]


def _length(loader: Any) -> int | None:
    with contextlib.suppress(TypeError):
        return len(loader)
    return None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
