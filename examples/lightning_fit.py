"""Train on handwritten digits with Lightning, and go on by itself when started again.

python examples/lightning_fit.py              # trains, saves in runs/digits
python examples/lightning_fit.py              # says that the run is finished
ckptmgr ls runs/digits
"""

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ckptmgr import CheckpointManager


class DigitClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(16 * 4 * 4, 10),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        hits = self.network(images).argmax(dim=1) == labels
        self.log("val_acc", hits.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def read_digits() -> TensorDataset:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(digits.target))


def main(run_dir: str) -> None:
    L.seed_everything(1)
    train, val = random_split(read_digits(), [1437, 360])

    manager = CheckpointManager(run_dir, monitor="val_acc", mode="max")
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", logger=False, callbacks=[manager])
    model = DigitClassifier()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=360))

    (scores,) = trainer.validate(model, DataLoader(val, batch_size=360), ckpt_path=f"{run_dir}@best", verbose=False)
    print(f"best checkpoint: {manager.best_model_path}, accuracy {scores['val_acc']:.3f}")
    assert scores["val_acc"] > 0.9


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
