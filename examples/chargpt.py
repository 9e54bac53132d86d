"""A small GPT that learns to write Python, character by character: `configs/chargpt.yaml` trains it in a plain loop."""

import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

import ckptmgr


class StdlibSource(TensorDataset):
    """The source of Python's standard library, in windows of ``block`` characters; each tenth is for validation."""

    def __init__(self, split: str = "train", block: int = 64, max_chars: int = 500_000) -> None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "".join(path.read_text("utf-8") for path in modules)[:max_chars]
        characters = torch.tensor(list(text.encode("ascii", "replace")))  # 128 of them: what is not ASCII becomes "?"
        windows = characters.unfold(0, block + 1, block)
        is_validation = torch.arange(len(windows)) % 10 == 9
        windows = windows[is_validation if split == "val" else ~is_validation]
        super().__init__(windows[:, :-1], windows[:, 1:])


class CharGPT(nn.Module):
    """A decoder-only transformer; embedding and output layer share their weight. Gives the mean loss of a batch."""

    def __init__(self, block: int = 64, width: int = 128, layers: int = 3, heads: int = 4, dropout: float = 0.1):
        super().__init__()
        self.token, self.position = nn.Embedding(128, width), nn.Embedding(block, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 128, bias=False)
        self.head.weight = self.token.weight
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.blocks(self.token(x) + self.position.weight[: x.shape[1]], mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


class WarmupCosine(LambdaLR):
    """The learning rate rises for ``warmup`` steps, falls as a cosine until ``steps``, and stays at a tenth."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> None:
        def factor(step: int) -> float:
            progress = min(max(step - warmup, 0) / max(steps - warmup, 1), 1)
            return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))

        super().__init__(optimizer, factor)


@ckptmgr.factory
def train(checkpointer, model, optimizer, scheduler, train_loader, val_loader, epochs, val_every):
    """`ckptmgr run` calls this with what it has built, and closes the checkpointer behind it."""
    step = checkpointer.resume()
    for x, y in checkpointer.batches(train_loader, epochs=epochs):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        step += 1
        metrics = {"loss": loss.item()}
        if step % val_every == 0 or checkpointer.is_last_batch:
            model.eval()
            with torch.no_grad():
                metrics["val_loss"] = sum(model(*batch).item() for batch in val_loader) / len(val_loader)
            model.train()
            print(f"step {step}: loss {metrics['loss']:.3f}, val_loss {metrics['val_loss']:.3f}", flush=True)
        checkpointer.step(step, metrics=metrics)  # saves when due; last, so that a checkpoint has all of the step
