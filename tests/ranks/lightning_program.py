"""A Lightning training on several ranks, for subprocesses: trains as it is told, and says what each rank has seen.

Usage: torchrun lightning_program.py RUN_DIR OPTIONS, with OPTIONS in JSON. Each rank writes one line for each batch,
and one about the end, to ``RUN_DIR-log/rank-N``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptmgr import ElasticSampler
from ckptmgr.lightning import CheckpointManager

DEFAULTS: dict[str, Any] = {
    "samples": 32,
    "batch_size": 4,
    "workers": 0,
    "epochs": 2,
    "steps": -1,
    "shuffle": True,
    "user_sampler": 0,
    "seed": 5,
    "signal": None,
    "die": None,
    "fail": None,
    "val": False,
    "distributed_sampler": True,
    "manager": {},
}


class Numbered(Dataset[Any]):
    """Samples that know their index."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(index), torch.randn(4, generator=torch.Generator().manual_seed(index))


class Model(pl.LightningModule):
    """Dropout draws random numbers on each rank, BatchNorm has buffers, and a mean is logged over the epoch."""

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.options = options
        self.log_path = log

    def say(self, **facts: Any) -> None:
        with self.log_path.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        index, x = batch
        loss: torch.Tensor = (self.net(x) - 0.5).pow(2).mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.say(step=self.global_step, epoch=self.current_epoch, samples=index.tolist(), loss=loss.item().hex())
        self.act(self.options["die"], signal.SIGKILL)
        self.act(self.options["signal"], signal.SIGTERM)
        if self.options["fail"] == [self.global_rank, self.global_step] or self.options["fail"] == self.global_step:
            raise RuntimeError("broken on purpose")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[1]).mean(), sync_dist=True)
        self.say(validates=self.global_step)
        if self.options["signal"] == [self.global_rank, "val", batch_idx]:
            os.kill(os.getpid(), signal.SIGTERM)

    def act(self, whom: Any, number: int) -> None:
        if whom == [self.global_rank, self.global_step]:
            os.kill(os.getpid(), number)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def digest(state: dict[str, torch.Tensor]) -> str:
    """Return what two models with the same bits have in common."""
    whole = hashlib.sha256()
    for name, tensor in state.items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


def main() -> None:
    """Train."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_dir, options = sys.argv[1], {**DEFAULTS, **json.loads(sys.argv[2])}
    # Another seed on each rank, unless the program says so: what is random must come from the checkpoint.
    torch.manual_seed(options["seed"])
    rank = int(os.environ.get("RANK", "0"))
    log = Path(f"{run_dir}-log") / f"rank-{rank}"
    log.parent.mkdir(exist_ok=True)
    model = Model(options, log)
    torch.manual_seed(options["seed"] * 100 + rank)
    data = Numbered(options["samples"])
    loader: DataLoader[Any]
    if options["user_sampler"]:
        sampler = ElasticSampler(len(data), global_batch_size=options["user_sampler"], seed=3)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=options["workers"])
    else:
        loader = DataLoader(
            data, batch_size=options["batch_size"], shuffle=options["shuffle"], num_workers=options["workers"]
        )
    manager = CheckpointManager(run_dir, **{"every_n_train_steps": 2, "ranks_timeout": 30.0, **options["manager"]})
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy="ddp" if "WORLD_SIZE" in os.environ else "auto",
        max_epochs=options["epochs"],
        max_steps=options["steps"],
        limit_val_batches=2 if options["val"] else 0,
        val_check_interval=2 if options["val"] else 1.0,
        num_sanity_val_steps=0,
        callbacks=[manager],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=options["distributed_sampler"],
        default_root_dir=Path(run_dir).parent,
    )
    validation = DataLoader(Numbered(8), batch_size=2) if options["val"] else None
    trainer.fit(model, loader, validation)
    metrics = {name: float(value).hex() for name, value in trainer.callback_metrics.items()}
    model.say(end=trainer.global_step, weights=digest(model.state_dict()), metrics=metrics)


if __name__ == "__main__":
    main()
