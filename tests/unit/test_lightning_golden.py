"""Golden samples and preprocessors of a Lightning training: saved with the model, and no trace in the training."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from saved_state import bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import CheckpointManager, load_inference
from ckptmgr.errors import GoldenSampleError, StateMismatchError
from ckptmgr.golden.compare import compare_golden
from ckptmgr.golden.run import Chain
from ckptmgr.loading import load_checkpoint
from ckptmgr.state.rng import capture_rng
from ckptmgr.state.selection import Selection

SAMPLES = [[[0.0, 1.0, -1.0, 0.5]], [[1.0, 1.0, 1.0, 1.0]]]


class Model(L.LightningModule):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.3), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(run_dir: Path, *, callbacks: Any = (), max_steps: int = 6, **arguments: Any) -> Model:
    L.seed_everything(5, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), batch_size=8, shuffle=True)
    model = Model()
    manager = CheckpointManager(run_dir, every_n_train_steps=2, background=False, keep_last=9, **arguments)
    trainer = L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, manager],
    )
    trainer.fit(model, data)
    return model


def test_training_with_golden_samples_is_bit_identical_to_training_without(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain")
    rng = capture_rng()
    watched = fit(tmp_path / "watched", golden=SAMPLES)
    assert bits(watched.state_dict()) == bits(plain.state_dict())
    assert bits(capture_rng()) == bits(rng)


def test_each_checkpoint_has_what_its_own_weights_predict(tmp_path: Path) -> None:
    fit(tmp_path, golden=SAMPLES)
    for step in (2, 4, 6):
        loaded = load_checkpoint(f"{tmp_path}@{step}")
        model = Model.load_from_checkpoint(f"ckptmgr://{tmp_path}@{step}")
        assert compare_golden(loaded.entries["golden"].tree, Chain(model)) == []


def test_with_averaged_weights_the_samples_are_predicted_by_the_average(tmp_path: Path) -> None:
    averaging = WeightAveraging(avg_fn=lambda average, live, _: average + 0.1 * (live - average))
    plain = fit(tmp_path / "plain", callbacks=[averaging])
    averaging = WeightAveraging(avg_fn=lambda average, live, _: average + 0.1 * (live - average))
    watched = fit(tmp_path / "watched", callbacks=[averaging], golden=SAMPLES)
    assert bits(watched.state_dict()) == bits(plain.state_dict())
    loaded = load_checkpoint(f"{tmp_path / 'watched'}@4")
    model = Model()
    model.load_state_dict(loaded.entries["model"].tree["tensors"])
    assert compare_golden(loaded.entries["golden"].tree, Chain(model)) == []


def test_a_sample_that_raises_is_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(GoldenSampleError, match="golden sample 1"):
        fit(tmp_path, golden=[SAMPLES[0], [[1.0]]])
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_preprocessor_is_saved_with_the_model(tmp_path: Path, weights_only: bool) -> None:
    fit(tmp_path, preprocessor={"a": 0, "b": 1}, save_weights_only=weights_only)
    loaded = load_checkpoint(str(tmp_path))
    assert "preprocessor" in loaded.entries
    (entry,) = [entry for entry in loaded.manifest.entries if entry.name == "preprocessor"]
    assert entry.fingerprint is not None
    assert len(entry.fingerprint) == 32


def test_training_goes_on_with_the_same_preprocessor_and_not_with_another(tmp_path: Path) -> None:
    fit(tmp_path, preprocessor={"a": 0, "b": 1}, max_steps=4)
    fit(tmp_path, preprocessor={"a": 0, "b": 1}, max_steps=6)
    with pytest.raises(StateMismatchError, match="b"):
        fit(tmp_path, preprocessor={"a": 0, "b": 2}, max_steps=8)
    with pytest.raises(StateMismatchError, match="the manager was given none"):
        fit(tmp_path, max_steps=8)
    assert load_checkpoint(str(tmp_path)).manifest.step == 6


def test_a_vocabulary_that_lacks_what_the_checkpoint_has_is_completed(tmp_path: Path) -> None:
    fit(tmp_path, preprocessor={"a": 0, "b": 1}, max_steps=4)
    vocabulary: dict[str, int] = {}
    fit(tmp_path, preprocessor=vocabulary, max_steps=6)
    assert vocabulary == {"a": 0, "b": 1}


def test_a_preprocessor_may_come_later(tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight", max_steps=6)
    fit(tmp_path / "cut", max_steps=4)
    resumed = fit(tmp_path / "cut", preprocessor={"a": 0}, max_steps=6)
    assert bits(resumed.state_dict()) == bits(straight.state_dict())
    assert "preprocessor" in load_checkpoint(str(tmp_path / "cut")).entries


@pytest.mark.parametrize(
    "selection",
    [Selection.without("preprocessor"), Selection.only("model"), Selection.without("preprocessor", "optimizer")],
    ids=["without", "only the model", "without several"],
)
def test_another_run_may_begin_without_the_checkpoints_preprocessor(tmp_path: Path, selection: Selection) -> None:
    fit(tmp_path / "one", preprocessor={"a": 0}, max_steps=4)
    other = {"a": 7}
    fit(tmp_path / "two", preprocessor=other, resume=f"{tmp_path / 'one'}@4", selection=selection)
    assert other == {"a": 7}


def test_a_selection_that_takes_the_preprocessor_restores_it(tmp_path: Path) -> None:
    fit(tmp_path / "one", preprocessor={"a": 0}, max_steps=4)
    vocabulary: dict[str, int] = {}
    only = Selection.only("model", "preprocessor")
    fit(tmp_path / "two", preprocessor=vocabulary, resume=f"{tmp_path / 'one'}@4", selection=only)
    assert vocabulary == {"a": 0}


class LogsInForward(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log("mean of x", x.mean(), on_step=True, on_epoch=True)
        self.log_dict({"largest x": x.max()})
        return super().forward(x)


@pytest.mark.parametrize("golden", [None, SAMPLES, [[[1e6] * 4]]])
def test_what_a_forward_logs_for_golden_samples_is_no_metric(tmp_path: Path, golden: Any) -> None:
    L.seed_everything(5, verbose=False)
    data = DataLoader(TensorDataset(torch.full((16, 4), 2.0), torch.randn(16, 1)), batch_size=8)
    trainer = quick_trainer(CheckpointManager(tmp_path, every_n_train_steps=1, background=False, golden=golden))
    trainer.fit(LogsInForward(), data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics == {"mean of x": 2.0, "mean of x_step": 2.0, "mean of x_epoch": 2.0, "largest x": 2.0}
    assert ("golden" in load_checkpoint(str(tmp_path)).entries) == (golden is not None)


def quick_trainer(manager: CheckpointManager) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[manager],
    )


class KeepsMore(Model):
    """Keeps a hyper-parameter that it does not take."""

    def __init__(self, hidden: int = 8) -> None:
        L.LightningModule.__init__(self)
        self.save_hyperparameters({"hidden": hidden, "note": "x"})
        self.net = nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 1))


class TakesAll(L.LightningModule):
    """Takes its hyper-parameters as one object."""

    forward, training_step, configure_optimizers = Model.forward, Model.training_step, Model.configure_optimizers

    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.net = nn.Sequential(nn.Linear(4, hparams.hidden), nn.Linear(hparams["hidden"], 1))


class Late(Model):
    """Makes its layers in the hook for it."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(4, 1))


class Settings(dict[str, int]):
    hidden = 5


@pytest.mark.parametrize(
    ("made", "kind"),
    [(lambda: KeepsMore(5), KeepsMore), (lambda: TakesAll(Settings(hidden=5)), TakesAll), (Late, Late)],
    ids=["more", "all", "late"],
)
def test_a_class_is_called_as_lightning_itself_would(tmp_path: Path, made: Any, kind: Any) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 1)), batch_size=8)
    quick_trainer(CheckpointManager(tmp_path, background=False, golden=SAMPLES)).fit(made(), data)
    assert load_inference(str(tmp_path), model=kind).ngolden == 2


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_training_in_another_precision_is_proved_in_it(tmp_path: Path, precision: Any) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 1)), batch_size=8)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CheckpointManager(tmp_path, background=False, golden=SAMPLES)],
    )
    trainer.fit(Model(), data)
    loaded = load_inference(str(tmp_path), model=Model)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert (loaded.ngolden, loaded.model.net[0].weight.dtype) == (2, dtype)


def test_a_selection_of_the_preprocessor_alone_restores_it_alone(tmp_path: Path) -> None:
    fit(tmp_path / "a", preprocessor={"a": 0, "b": 1})
    vocabulary: dict[str, int] = {}
    selection = Selection.only("preprocessor")
    fit(tmp_path / "b", preprocessor=vocabulary, selection=selection, resume=str(tmp_path / "a"))
    assert vocabulary == {"a": 0, "b": 1}


@pytest.mark.parametrize("selection", [Selection.without("optimizer"), Selection.only("model", "preprocessor")])
def test_a_preprocessor_that_is_selected_and_that_nothing_takes_is_refused(tmp_path: Path, selection: Any) -> None:
    fit(tmp_path / "a", preprocessor={"a": 0})
    with pytest.raises(StateMismatchError, match="the manager was given none"):
        fit(tmp_path / "b", selection=selection, resume=str(tmp_path / "a"))
