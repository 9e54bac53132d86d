"""A LightningModule whose names differ from the checkpoint's by a prefix alone goes on, and says so."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_samples import plain_loader
from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.lightning import CheckpointManager


class Bare(pl.LightningModule):
    """The layers are the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[1]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Wrapped(Bare):
    """The same layers, as many programs have them: in an attribute ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"first": self.first, "last": self.last})
        del self.first, self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["last"](self.model["first"](x))


class Grown(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1)


def fit(root: Path, module: pl.LightningModule, steps: int) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=root,
        max_steps=steps,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CheckpointManager(root / "run", every_n_train_steps=2)],
    )
    trainer.fit(module, plain_loader())
    return trainer


def weights(module: pl.LightningModule) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


@pytest.mark.parametrize(("old", "new"), [(Bare, Wrapped), (Wrapped, Bare)])
def test_weights_and_moments_go_on_under_the_live_names(
    old: type[Bare], new: type[Bare], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pl.seed_everything(1, verbose=False)
    whole = old()
    initial = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(tmp_path / "whole", whole, 8)

    begun = old()
    begun.load_state_dict(initial)
    pl.seed_everything(1, verbose=False)
    old()  # draws what the uninterrupted program drew
    fit(tmp_path, begun, 4)
    goes_on = new()
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        trainer = fit(tmp_path, goes_on, 8)
    assert trainer.global_step == 8
    assert all(map(torch.equal, weights(goes_on), weights(whole)))
    assert "all 4 names of the checkpoint fit" in caplog.text


def test_a_prefix_that_does_not_explain_every_name_is_not_applied(tmp_path: Path) -> None:
    fit(tmp_path, Bare(), 4)
    grown = Grown()
    before = weights(grown)
    with pytest.raises(StateMismatchError, match="does not fit"):
        fit(tmp_path, grown, 8)
    assert all(map(torch.equal, weights(grown), before))
