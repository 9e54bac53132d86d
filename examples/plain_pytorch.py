"""Train on handwritten digits with a plain PyTorch loop, and go on by itself when started again.

python examples/plain_pytorch.py
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16 * 4 * 4, 10),
    )


def main(run_dir: str) -> None:
    torch.manual_seed(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=32, shuffle=True)

    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=4 * len(loader))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    with Checkpointer(run_dir, state, every_n_steps=50, monitor="loss") as ckpt:
        step = ckpt.resume()  # 0 on a fresh run
        for batch_images, batch_labels in ckpt.batches(loader, epochs=4):
            loss = nn.functional.cross_entropy(model(batch_images), batch_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            ckpt.step(step, metrics={"loss": loss.item()})  # saves when due

    model.eval()
    accuracy = (model(images[1437:]).argmax(dim=1) == labels[1437:]).float().mean().item()
    print(f"{step} steps, accuracy {accuracy:.3f} on digits that were not trained")
    assert step == 4 * len(loader)
    assert accuracy > 0.85


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/plain-digits")
