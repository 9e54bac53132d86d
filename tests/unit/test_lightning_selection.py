"""Selections of a Trainer's checkpoint: what begins anew, what goes on, and what Lightning cannot do."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_samples import Broken, Model, TwoOptimizers, make_trainer, plain_loader
from torch import nn

from ckptmgr import CheckpointManager, Selection, StateMismatchError, UsageError
from ckptmgr.loading import load_checkpoint


class Start(pl.Callback):
    """Notes where training starts."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self.weights = copy.deepcopy(pl_module.state_dict())
        self.optimizers = copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers])
        self.schedulers = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]

    def lr(self, index: int = 0) -> float:
        return float(self.optimizers[index]["param_groups"][0]["lr"])


def halving(optimizer: Any, trainer: Any) -> Any:
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5), "interval": "step"}


class Scheduled(Model):
    """Its learning rate is halved every other step."""

    def __init__(self, lr: float = 1e-2, nout: int = 1, first: str = "net", breaks_at: Any = None) -> None:
        super().__init__(breaks_at, scheduler=halving)
        net = self.net
        net[3] = nn.Linear(6, nout)
        if first != "net":
            del self.net
            self.add_module(first, net)
            object.__setattr__(self, "net", net)
        self.lr = lr

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        made["optimizer"].param_groups[0]["lr"] = self.lr
        made["optimizer"].param_groups[0]["initial_lr"] = self.lr
        made["lr_scheduler"]["scheduler"].base_lrs = [self.lr]
        return made


Fit = Callable[..., Start]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(
        name: str, model: Model, selection: Selection | None = None, *, fit_with: Any = None, **options: Any
    ) -> Start:
        trainer_options = {key: options.pop(key) for key in ("max_epochs", "precision") if key in options}
        start = Start()
        manager = CheckpointManager(tmp_path / name, every_n_train_steps=1, keep_last=9, selection=selection, **options)
        trainer = make_trainer(tmp_path, manager, start, **trainer_options)
        if model.breaks_at is None:
            trainer.fit(model, plain_loader(), **(fit_with or {}))
        else:
            with pytest.raises(Broken):
                trainer.fit(model, plain_loader(), **(fit_with or {}))
        return start

    return run


@pytest.fixture
def old(tmp_path: Path, fit: Fit) -> Any:
    """The entries of a run that was broken off after four steps."""
    pl.seed_everything(1, verbose=False)
    fit("old", Scheduled(breaks_at=("training_step", 5)))
    return load_checkpoint(str(tmp_path / "old")).entries


def same_tensors(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moment(start: Start, index: int) -> Any:
    return start.optimizers[0]["state"].get(index, {}).get("exp_avg")


def test_only_the_model_begins_another_run_at_step_0(old: Any, tmp_path: Path, fit: Fit, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "ckptmgr")
    selection = Selection.only("model")
    start = fit("new", Scheduled(breaks_at=("training_step", 3)), selection, resume=f"{tmp_path / 'old'}@latest")
    assert start.step == 0
    assert same_tensors(start.weights, old["model"].tree["tensors"])
    assert start.optimizers[0]["state"] == {}
    assert (start.lr(), start.schedulers) == (1e-2, [0])
    (told,) = [message for message in caplog.messages if message.startswith("not restored from ")]
    assert ": optimizer; scheduler; data (" in told
    assert told.endswith("progress (steps are counted from 0)")
    # Started again, the job goes on with its own checkpoint, whole.
    again = fit("new", Scheduled(breaks_at=("training_step", 2)), selection, resume=f"{tmp_path / 'old'}@latest")
    assert again.step == 2
    assert len(again.optimizers[0]["state"]) > 0


def test_a_run_that_begins_anew_from_its_own_weights_goes_on_from_there(old: Any, tmp_path: Path, fit: Fit) -> None:
    start = fit("old", Scheduled(breaks_at=("training_step", 3)), Selection.only("model"), resume="3")
    assert start.step == 0
    # Steps 1 and 2 of the new line, and not step 4 of the one before.
    again = fit("old", Scheduled(breaks_at=("training_step", 1)))
    assert again.step == 2


def test_a_new_head_goes_on_in_the_same_run_and_one_that_does_not_fit_claims_nothing(
    old: Any, tmp_path: Path, fit: Fit
) -> None:
    attempts = len(list((tmp_path / "old" / "attempts").iterdir()))
    with pytest.raises(StateMismatchError, match=r"net\.3\.bias"):
        fit("old", Scheduled(nout=3), Selection.without("model/net.3.weight"), resume="3")
    with pytest.raises(UsageError, match=r"net\.4"):
        fit("old", Scheduled(nout=3), Selection.without("model/net.4.*"), resume="3")
    assert len(list((tmp_path / "old" / "attempts").iterdir())) == attempts
    start = fit(
        "old", Scheduled(nout=3, breaks_at=("training_step", 2)), Selection.without("model/net.3.*"), resume="3"
    )
    assert start.step == 3
    again = fit("old", Scheduled(nout=3, breaks_at=("training_step", 1)))
    assert again.step == 4


def test_moments_go_on_while_rate_and_schedule_are_the_programs(old: Any, tmp_path: Path, fit: Fit) -> None:
    model = Scheduled(lr=0.5, breaks_at=("training_step", 1))
    start = fit(
        "new",
        model,
        Selection.without("optimizer/options/lr", "scheduler"),
        resume=f"{tmp_path / 'old'}@latest",
    )
    assert start.step == 4
    assert (start.lr(), start.schedulers) == (0.5, [0])
    assert torch.equal(moment(start, 0), old["optimizer"].tree["state"]["model/net.0.weight"]["exp_avg"])


def test_a_schedule_over_a_rate_that_stays_is_refused_and_the_weights_are_put_back(
    old: Any, tmp_path: Path, fit: Fit
) -> None:
    model = Scheduled(lr=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="'optimizer/options/lr' is left out and 'scheduler'"):
        fit("new", model, Selection.without("optimizer/options/lr"), resume=f"{tmp_path / 'old'}@latest")
    assert same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("more", [(), ("progress", "data", "rng")])
def test_fine_tuning_takes_the_body_and_trains_a_new_head(old: Any, tmp_path: Path, fit: Fit, more: Any) -> None:
    model = Scheduled(nout=3, breaks_at=("training_step", 2))
    head = copy.deepcopy(model.net[3].state_dict())
    selection = Selection.without("model/net.3.*", *more)
    start = fit("new", model, selection, resume=f"{tmp_path / 'old'}@latest")
    assert start.step == (0 if more else 4)
    saved = old["model"].tree["tensors"]
    assert torch.equal(start.weights["net.0.weight"], saved["net.0.weight"])
    assert torch.equal(start.weights["net.3.weight"], head["weight"])
    assert torch.equal(moment(start, 0), old["optimizer"].tree["state"]["model/net.0.weight"]["exp_avg"])
    assert moment(start, 4) is None


def test_renamed_layers_take_their_moments_along(old: Any, tmp_path: Path, fit: Fit) -> None:
    model = Scheduled(first="encoder", breaks_at=("training_step", 1))
    selection = Selection(rename={"model/net.*": "model/encoder.*"})
    start = fit("new", model, selection, resume=f"{tmp_path / 'old'}@latest")
    assert start.step == 4
    assert torch.equal(start.weights["encoder.0.weight"], old["model"].tree["tensors"]["net.0.weight"])
    assert torch.equal(moment(start, 0), old["optimizer"].tree["state"]["model/net.0.weight"]["exp_avg"])


def test_weights_and_moments_are_cast_to_the_dtype_of_the_live_model(
    old: Any, tmp_path: Path, fit: Fit, caplog: Any
) -> None:
    class Double(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step([batch[0], batch[1].double()], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step([batch[0], batch[1].double()], batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            self.reach("on_train_batch_end")

    caplog.set_level(logging.WARNING, "ckptmgr")
    with pytest.raises(StateMismatchError, match="dtype of"):
        fit("strict", Double().double(), Selection(), resume=f"{tmp_path / 'old'}@latest")
    model = Double(breaks_at=("training_step", 2)).double()
    start = fit("new", model, Selection(dtype="live"), resume=f"{tmp_path / 'old'}@latest")
    assert torch.equal(start.weights["net.0.weight"], old["model"].tree["tensors"]["net.0.weight"].double())
    assert moment(start, 0).dtype == torch.float64
    assert [message for message in caplog.messages if "cast from float32 to float64" in message]


def test_the_live_random_state_goes_on_where_rng_is_left_out(old: Any, tmp_path: Path, fit: Fit) -> None:
    def drawn(seed: int, selection: Selection | None) -> torch.Tensor:
        class Drawing(Scheduled):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                self.drawn = torch.rand(2)
                return super().training_step(batch, batch_idx)

        model = Drawing(breaks_at=("training_step", 1))
        pl.seed_everything(seed, verbose=False)
        fit(f"new-{seed}-{selection is None}", model, selection, resume=f"{tmp_path / 'old'}@latest")
        return model.drawn

    assert torch.equal(drawn(3, None), drawn(4, None))
    assert not torch.equal(drawn(3, Selection.without("rng")), drawn(4, Selection.without("rng")))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection.without("progress"), "progress left out, and data and rng not"),
        (Selection.without("data"), "data left out, and progress and rng not"),
        (Selection.without("data", "progress"), "data and progress left out, and rng not"),
        (Selection(dtype="saved"), "dtype='saved' has no meaning for a Trainer"),
        (Selection.without("model/nett.*"), "the pattern 'model/nett.*' of the selection matches nothing"),
        (Selection.without("optimizer/options/lrr"), "the pattern 'optimizer/options/lrr'"),
        (Selection.only("model", "optimizer-3"), "the pattern 'optimizer-3'"),
        (Selection(rename={"model/nett.*": "model/net.*"}), "renames nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    old: Any, tmp_path: Path, fit: Fit, selection: Selection, message: str
) -> None:
    model = Scheduled()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        fit("new", model, selection, resume=f"{tmp_path / 'old'}@latest")
    assert message in str(caught.value)
    assert same_tensors(model.state_dict(), before)


def test_a_file_of_lightnings_is_not_restored_in_parts(tmp_path: Path, fit: Fit) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Scheduled(), plain_loader())
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    with pytest.raises(UsageError, match="a file of Lightning's"):
        fit("new", Scheduled(), Selection.only("model"), fit_with={"ckpt_path": str(tmp_path / "file.ckpt")})


def test_weights_alone_begin_a_run_from_a_checkpoint_that_has_nothing_else(tmp_path: Path, fit: Fit) -> None:
    fit("old", Scheduled(breaks_at=("training_step", 3)), save_weights_only=True)
    saved = load_checkpoint(str(tmp_path / "old")).entries["model"].tree["tensors"]
    start = fit(
        "new",
        Scheduled(breaks_at=("training_step", 2)),
        Selection.only("model"),
        fit_with={"ckpt_path": f"ckptmgr://{tmp_path / 'old'}@latest"},
    )
    assert start.step == 0
    assert same_tensors(start.weights, saved)


def test_several_optimizers_are_selected_together_and_one_by_one(tmp_path: Path, fit: Fit) -> None:
    fit("old", TwoOptimizers(breaks_at=("training_step", 3)))
    old = f"{tmp_path / 'old'}@latest"
    start = fit("one", TwoOptimizers(breaks_at=("training_step", 1)), Selection.without("optimizer-1"), resume=old)
    assert (len(start.optimizers[0]["state"]), len(start.optimizers[1]["state"])) == (4, 0)
    model = TwoOptimizers(breaks_at=("training_step", 2))
    start = fit("none", model, Selection.without("optimizer"), resume=old)
    assert (len(start.optimizers[0]["state"]), len(start.optimizers[1]["state"])) == (0, 0)
    start = fit("both", TwoOptimizers(breaks_at=("training_step", 1)), Selection.only("model", "optimizer"), resume=old)
    assert (start.step, len(start.optimizers[0]["state"]), len(start.optimizers[1]["state"])) == (0, 4, 2)
