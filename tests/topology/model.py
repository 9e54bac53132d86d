"""What every topology trains: a small language model in float32, whose sizes do not divide evenly.

Of 6 rows each of 4 ranks gets 2, 2, 2 and 0; of 10 rows 3, 3, 3 and 1; of 17 rows 5, 5, 5 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

__all__ = ["GLOBAL_BATCH", "SAMPLES", "Block", "Model", "Sequences", "build_optimizer", "loss_of"]

WORDS, WIDTH, HIDDEN, LENGTH = 17, 6, 10, 5
SAMPLES, GLOBAL_BATCH = 40, 8


class Block(nn.Module):
    """A residual MLP; tensor parallelism splits `up` by columns and `down` by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` and what the block adds to it."""
        out: torch.Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """Embedding, two blocks, norm, and a head that shares the embedding's weight.

    Attributes:
        progress: A buffer that each training step changes, in the same way on all ranks.
    """

    progress: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("progress", torch.zeros(3))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return what comes after each word, as logits."""
        if self.training:
            self.progress.mul_(0.9).add_(torch.tensor([1.0, 0.3, 1e-6]))
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Sequences(Dataset[tuple[int, torch.Tensor]]):
    """Fixed sequences of words; each sample comes with its number."""

    def __init__(self) -> None:
        self._words = torch.randint(0, WORDS, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor]:
        return number, self._words[number]


def loss_of(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a batch."""
    logits = model(words[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def build_optimizer(model: nn.Module) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """Make AdamW with and without weight decay, and a scheduler that computes each rate from the one before."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0, "lr": 0.01},
    ]
    # One by one: foreach cannot handle parameters of several meshes together.
    optimizer = torch.optim.AdamW(groups, lr=0.02, foreach=False)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
