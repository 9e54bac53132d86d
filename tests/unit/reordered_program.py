"""Trains ten steps, in a plain loop or with Lightning, and may die on the way; prints the loss of every step.

Usage: python reordered_program.py FACE RUN_DIR DIE_AT ORDER, with ORDER ``usual``, ``reordered`` or ``frozen``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 10


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.third(self.second(self.first(x).tanh()).tanh())
        return out.square().mean()


def build(module: nn.Module, order: str) -> tuple[torch.optim.Optimizer, Any]:
    """Make the optimizer: two groups with their own rates; reordered, inside out and the other way round.

    With ``frozen``, it trains the last layer no longer.
    """
    named = list(module.named_parameters())
    groups = [
        {"params": [p for name, p in named if "second" in name], "lr": 0.1},
        {"params": [p for name, p in named if "second" not in name]},
    ]
    if order == "reordered":
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    if order == "frozen":
        groups[1]["params"] = [p for name, p in named if "first" in name]
        for name, parameter in named:
            parameter.requires_grad_("third" not in name)
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def loader() -> DataLoader[Any]:
    data = torch.randn(STEPS * 4, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=4, shuffle=True)


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def plain(run_dir: str, die_at: int, order: str) -> None:
    from ckptmgr import Checkpointer

    torch.manual_seed(0)
    module = Body()
    optimizer, scheduler = build(module, order)
    state = {"model": module, "optimizer": optimizer, "scheduler": scheduler}
    with Checkpointer(run_dir, state=state, every_n_steps=2) as ckpt:
        step = ckpt.resume()
        for (x,) in ckpt.batches(loader(), epochs=1):
            loss = module(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            print(step, loss.item().hex())
            ckpt.step(step)
            if step == die_at:
                ckpt.wait()
                die()


def with_lightning(run_dir: str, die_at: int, order: str) -> None:
    import lightning.pytorch as pl

    from ckptmgr import CheckpointManager

    for name in ("utilities.rank_zero", "accelerators.cuda"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.body(batch[0])
            print(self.global_step + 1, loss.item().hex())
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == die_at:
                die()

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = build(self, order)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CheckpointManager(run_dir, every_n_train_steps=2)],
    )
    with warnings.catch_warnings():
        # Few workers, for one.
        warnings.simplefilter("ignore")
        trainer.fit(Module(), loader())


FACES = {"plain": plain, "lightning": with_lightning}

if __name__ == "__main__":
    face, run_dir, die_at, order = sys.argv[1:]
    FACES[face](run_dir, int(die_at), order)
