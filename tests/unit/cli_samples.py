"""What a program hands to LightningCLI: its classes are imported by name."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()


class Model(LightningModule):
    def __init__(self, width: int = 3, act: torch.nn.Module = torch.nn.ReLU()) -> None:  # noqa: B008
        super().__init__()
