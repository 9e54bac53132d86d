"""A classifier of handwritten digits, as `configs/digits.yaml` trains it with Lightning.

ckptmgr run configs/digits.yaml
ckptmgr run configs/digits.yaml model.hidden=128 trainer.max_epochs=20
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class DigitsModel(L.LightningModule):
    """A small network with everything that a checkpoint could forget: running means, dropout's RNG, a schedule."""

    def __init__(self, hidden: int = 64, lr: float = 0.01, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * 8, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 10),
        )

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class DigitsData(L.LightningDataModule):
    """1797 images of 8 x 8 pixels, from scikit-learn; the last 360 are for validation."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        self.train = TensorDataset(images[:-360], labels[:-360])
        self.val = TensorDataset(images[-360:], labels[-360:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=360)
