"""What a user of the Lightning callback sees: where it saves, what it resumes, what it refuses, how it ends."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning_samples import Broken, Model, Numbered, differences, fingerprint, make_trainer, plain_loader
from lightning_utilities.core.rank_zero import log as lightning_log
from torch.utils.data import DataLoader

from ckptmgr import EverySteps, OnImprovement
from ckptmgr.errors import (
    IncompatibleLightningError,
    StateMismatchError,
    TopologyError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.launch.run_directory import job_name
from ckptmgr.lightning import CheckpointManager, compat
from ckptmgr.lightning.strategies import refuse_strategy
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage


def fit(
    root: Path,
    *callbacks: Any,
    model: Callable[[], Model] | None = None,
    seed: int = 1,
    ckpt_path: Any = None,
    **options: Any,
):
    pl.seed_everything(seed, verbose=False)
    model = (model or Model)()
    trainer = make_trainer(root, *callbacks, **options)
    trainer.fit(model, plain_loader(), ckpt_path=ckpt_path)
    return trainer, model


def catalog(run_dir: Path) -> Catalog:
    return Catalog.of_existing_run(open_storage(run_dir))


def reasons(run_dir: Path) -> list[str]:
    found = catalog(run_dir)
    return [found.manifest(checkpoint).reason for checkpoint in found.on_line]


def test_a_bare_manager_makes_a_fresh_run_and_saves_each_epoch(tmp_path: Path) -> None:
    manager = CheckpointManager()
    fit(tmp_path, manager)
    assert Path(manager.run_dir).parent == tmp_path / "runs"
    assert reasons(Path(manager.run_dir)) == ["epoch end", "end of training"]


def test_under_slurm_a_bare_manager_goes_on_in_the_directory_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    fit(tmp_path, CheckpointManager(), max_epochs=1)
    trainer, model = fit(tmp_path, CheckpointManager())
    assert (trainer.global_step, len(model.seen)) == (12, 6)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["elastic-job-7"]


def test_jobs_that_share_an_id_are_not_taken_for_one() -> None:
    assert job_name({"SLURM_JOB_ID": "7"}) == "slurm-7"
    assert job_name({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "slurm-7-2"
    assert job_name({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}) is None
    assert job_name({"TORCHELASTIC_RUN_ID": "none"}) is None


def test_resuming_from_the_shell_overrides_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, CheckpointManager(tmp_path / "first"), max_epochs=1)
    monkeypatch.setenv("CKPTMGR_RUN_DIR", str(tmp_path / "first"))
    _, model = fit(tmp_path, CheckpointManager(tmp_path / "other"))
    assert len(model.seen) == 6
    assert not (tmp_path / "other").exists()


def test_fast_dev_run_leaves_no_trace(tmp_path: Path) -> None:
    fit(tmp_path, CheckpointManager(), fast_dev_run=True)
    fit(tmp_path, CheckpointManager(tmp_path / "run"), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_trained_again_and_ends_in_the_same_state(tmp_path: Path, caplog: Any) -> None:
    first = fit(tmp_path, EMAWeightAveraging(decay=0.9), CheckpointManager(tmp_path / "run"))
    lightning_log.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, lightning_log.name):
        second = fit(tmp_path, EMAWeightAveraging(decay=0.9), CheckpointManager(tmp_path / "run"), seed=5)
    lightning_log.removeHandler(caplog.handler)
    assert second[1].seen == []
    assert differences(fingerprint(*first), fingerprint(*second)) == []
    assert "is finished: step 12" in caplog.text


@pytest.mark.parametrize("limits", [({"max_epochs": 1}, {}), ({"max_steps": 4}, {"max_steps": 9})], ids=str)
def test_a_raised_limit_goes_on_as_if_it_had_been_there_before(limits: Any, tmp_path: Path) -> None:
    before, after = limits
    straight = fit(tmp_path, CheckpointManager(tmp_path / "straight"), **after)
    first = fit(tmp_path, CheckpointManager(tmp_path / "run"), **before)
    second = fit(tmp_path, CheckpointManager(tmp_path / "run"), seed=5, **after)
    assert first[1].seen + second[1].seen == straight[1].seen
    model = second[1].state_dict()
    assert all(torch.equal(value, model[name]) for name, value in straight[1].state_dict().items())


def test_a_second_fit_of_one_trainer_goes_on_from_memory(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run")
    trainer, model = fit(tmp_path, manager)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, plain_loader())
    assert (trainer.global_step, len(model.seen)) == (18, 18)
    assert "@0000000018-000002" in manager.last_model_path


def test_best_last_and_references_work_in_every_entry_point(tmp_path: Path) -> None:
    class InOrder(Model):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(Numbered(8), batch_size=4)

    manager = CheckpointManager(tmp_path / "run", monitor="val_loss", keep_last=9)
    trainer, model = fit(tmp_path, manager, model=InOrder)
    assert manager.best_model_score == min(
        facts.metrics["val_loss"] for facts in map(catalog(tmp_path / "run").facts, catalog(tmp_path / "run").on_line)
        if "val_loss" in facts.metrics
    )  # fmt: skip
    best = trainer.validate(model, ckpt_path="best", verbose=False)
    assert trainer.validate(model, ckpt_path=manager.best_model_path, verbose=False) == best
    last = trainer.validate(model, ckpt_path="last", verbose=False)
    for reference in ("best", f"{tmp_path}/run@best", f"ckptmgr://{tmp_path}/run@best"):
        again = make_trainer(tmp_path, CheckpointManager(tmp_path / "run", monitor="val_loss"))
        assert again.validate(InOrder(), ckpt_path=reference, verbose=False) == best
    plain = make_trainer(tmp_path, enable_checkpointing=False)
    assert plain.validate(InOrder(), ckpt_path=f"ckptmgr://{tmp_path}/run@6", verbose=False) != last
    # Readers claim nothing.
    assert len(catalog(tmp_path / "run").attempts) == 1


def test_load_from_checkpoint_takes_a_reference(tmp_path: Path) -> None:
    class WithHyperParameters(Model):
        def __init__(self, width: int = 1, act: Any = None, path: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    manager = CheckpointManager(tmp_path / "run")
    model = WithHyperParameters(3, torch.relu, Path("data"))
    fit(tmp_path, manager, model=lambda: model, max_epochs=1)
    for reference in (manager.last_model_path, manager.best_model_path, f"ckptmgr://{tmp_path}/run"):
        loaded = WithHyperParameters.load_from_checkpoint(reference, weights_only=True)
        assert dict(loaded.hparams) == {"width": 3, "act": None, "path": "data"}
        assert torch.equal(loaded.net[0].weight, model.net[0].weight)


def test_hyper_parameters_that_are_no_plain_values_are_named(tmp_path: Path, caplog: Any) -> None:
    class WithFunction(Model):
        def __init__(self, activation: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    fit(tmp_path, CheckpointManager(tmp_path / "run"), model=lambda: WithFunction(torch.relu), max_epochs=1)
    assert "no plain values are not saved: activation (builtin_function_or_method)" in caplog.text


def test_a_checkpoint_of_another_run_can_be_where_this_one_begins(tmp_path: Path) -> None:
    straight = fit(tmp_path, CheckpointManager(tmp_path / "first"), max_epochs=1)
    _, model = fit(tmp_path, CheckpointManager(tmp_path / "fork"), ckpt_path=f"{tmp_path}/first")
    assert len(model.seen) == 6
    manager = CheckpointManager(tmp_path / "third", resume=f"{tmp_path}/first@latest")
    _, again = fit(tmp_path, manager)
    assert again.seen == model.seen
    # Requeued, it goes on with its own.
    _, requeued = fit(tmp_path, CheckpointManager(tmp_path / "third", resume=f"{tmp_path}/first@latest"), max_epochs=3)
    assert len(requeued.seen) == 6
    assert len(catalog(tmp_path / "first").attempts) == 1
    assert straight[0].global_step == 6


def test_going_back_to_an_older_step_begins_a_new_line(tmp_path: Path) -> None:
    fit(tmp_path, CheckpointManager(tmp_path / "run", every_n_train_steps=3, keep_last=9))
    _, model = fit(tmp_path, CheckpointManager(tmp_path / "run"), ckpt_path=f"{tmp_path}/run@3")
    assert len(model.seen) == 9
    assert [id.attempt for id in catalog(tmp_path / "run").on_line][:2] == [1, 2]


def test_paths_that_are_not_ours_are_handed_on(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, CheckpointManager(tmp_path / "run"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    _, model = fit(tmp_path, CheckpointManager(tmp_path / "other"), ckpt_path=tmp_path / "own.ckpt")
    assert len(model.seen) == 6
    with pytest.raises(UsageError, match="points into a run"):
        trainer.save_checkpoint(f"{tmp_path}/run@mine")


def test_metrics_of_an_earlier_validation_are_not_attached_to_a_step(tmp_path: Path) -> None:
    fit(tmp_path, CheckpointManager(tmp_path / "run", every_n_train_steps=2, keep_last=99))
    found = catalog(tmp_path / "run")
    with_validation = [id.step for id in found.on_line if "val_loss" in found.facts(id).metrics]
    assert sorted(set(with_validation)) == [6, 12]
    assert all("loss" in found.facts(id).metrics for id in found.on_line)


def test_a_metric_can_say_when_to_save(tmp_path: Path) -> None:
    fit(tmp_path, CheckpointManager(tmp_path / "run", triggers=OnImprovement("val_loss", "min")), max_epochs=1)
    assert reasons(tmp_path / "run")[0].startswith("first val_loss")


def test_a_monitored_metric_that_is_never_logged_is_named(tmp_path: Path, caplog: Any) -> None:
    manager = CheckpointManager(tmp_path / "run", monitor="val_acc")
    fit(tmp_path, manager)
    assert "monitor='val_acc' was not logged" in caplog.text
    assert "val_loss" in caplog.text
    assert manager.best_model_path == ""
    assert manager.last_model_path != ""


@pytest.mark.parametrize("place", [("training_step", 4), ("validation_step", 2), ("on_train_epoch_end", 1)], ids=str)
@pytest.mark.parametrize("averaging", [False, True])
def test_an_exception_saves_the_last_completed_step(averaging: bool, place: Any, tmp_path: Path) -> None:
    def callbacks(run: str, **options: Any) -> list[Any]:
        manager = CheckpointManager(tmp_path / run, every_n_epochs=99, **options)
        return [EMAWeightAveraging(decay=0.9), manager] if averaging else [manager]

    straight = fit(tmp_path, *callbacks("straight"))
    with pytest.raises(Broken):
        fit(tmp_path, *callbacks("run", save_on_exception=True), model=lambda: Model(place))
    assert reasons(tmp_path / "run") == ["exception: Broken"]
    resumed = fit(tmp_path, *callbacks("run"), seed=5)
    assert len(resumed[1].seen) == (9 if place[0] == "training_step" else 6)
    assert differences(fingerprint(*straight), fingerprint(*resumed)) == []


def test_an_exception_inside_the_optimizers_step_saves_nothing(tmp_path: Path) -> None:
    class Breaking(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.count = getattr(self, "count", 0) + 1
            if self.count == 4:
                raise Broken
            return loss

    manager = CheckpointManager(tmp_path / "run", every_n_epochs=99, save_on_exception=True)
    with pytest.raises(Broken):
        fit(tmp_path, manager, model=lambda: Model(optimizer=Breaking))
    assert catalog(tmp_path / "run").committed == []


@pytest.mark.parametrize("place", [("training_step", 4), ("validation_step", 1), ("on_train_epoch_end", 1)], ids=str)
def test_sigterm_saves_at_the_boundary_and_exits_with_75(place: Any, tmp_path: Path) -> None:
    class Told(Model):
        def reach(self, name: str) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if (name, self.calls[name]) == place:
                os.kill(os.getpid(), signal.SIGTERM)

    heard = []
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append("told"))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        straight = fit(tmp_path, CheckpointManager(tmp_path / "straight"))
        with pytest.raises(SystemExit) as error:
            fit(tmp_path, CheckpointManager(tmp_path / "run", every_n_epochs=99), model=Told)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert error.value.code == 75
    assert heard == ["told"]
    assert reasons(tmp_path / "run") == ["signal"]
    resumed = fit(tmp_path, CheckpointManager(tmp_path / "run"), seed=5)
    assert differences(fingerprint(*straight), fingerprint(*resumed)) == []


def test_weights_only_checkpoints_cannot_be_resumed(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run", save_weights_only=True)
    _, model = fit(tmp_path, manager, max_epochs=1)
    loaded = Model.load_from_checkpoint(manager.last_model_path)
    assert torch.equal(loaded.net[0].weight, model.net[0].weight)
    with pytest.raises(UsageError, match="save_weights_only"):
        fit(tmp_path, CheckpointManager(tmp_path / "run"))


def test_another_model_is_refused_before_it_is_changed(tmp_path: Path) -> None:
    fit(tmp_path, CheckpointManager(tmp_path / "run"), max_epochs=1)
    model = Model()
    model.net[3] = torch.nn.Linear(6, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"net\.3\.weight"):
        fit(tmp_path, CheckpointManager(tmp_path / "run"), model=lambda: model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_number_of_optimizers_is_refused(tmp_path: Path) -> None:
    class Two(Model):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[1:])], []

    fit(tmp_path, CheckpointManager(tmp_path / "run"), max_epochs=1)
    model = Two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match="1 optimizer, the module configures 2"):
        fit(tmp_path, CheckpointManager(tmp_path / "run"), model=lambda: model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_data_set_is_refused_in_mid_epoch_only(tmp_path: Path) -> None:
    with pytest.raises(Broken):
        fit(
            tmp_path,
            CheckpointManager(tmp_path / "run", every_n_train_steps=2),
            model=lambda: Model(("training_step", 4)),
        )
    trainer = make_trainer(tmp_path, CheckpointManager(tmp_path / "run"))
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match="dataset_length is 24 in the checkpoint, 16"):
        trainer.fit(model, DataLoader(Numbered(16), batch_size=4, shuffle=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fit(tmp_path, CheckpointManager(tmp_path / "run"), max_epochs=1)
    trainer = make_trainer(tmp_path, CheckpointManager(tmp_path / "run"))
    trainer.fit(Model(), DataLoader(Numbered(16), batch_size=8, shuffle=True))
    assert trainer.global_step == 8


def test_state_that_cannot_be_stored_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd(pl.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"lock": object()}

    model = Model()
    with pytest.raises(UnsupportedStateError, match="Odd/lock"):
        fit(tmp_path, Odd(), CheckpointManager(tmp_path / "run"), model=lambda: model)
    assert model.seen == []


def test_two_managers_of_one_run_are_refused_and_two_runs_are_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two CheckpointManagers of one Trainer"):
        fit(tmp_path, CheckpointManager(tmp_path / "run"), CheckpointManager(tmp_path / "run"))
    for epochs in (1, 2):
        fit(tmp_path, CheckpointManager(tmp_path / "a"), CheckpointManager(tmp_path / "b"), max_epochs=epochs)
    assert [id.step for id in catalog(tmp_path / "b").on_line] == [id.step for id in catalog(tmp_path / "a").on_line]


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_a_strategy_with_shards_of_its_own_form_is_refused_by_name(name: str) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    refuse_strategy(trainer)
    trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})
    with pytest.raises(TopologyError, match=f"cannot save a {name}"):
        refuse_strategy(trainer)


def test_it_is_the_trainers_own_checkpoint_callback_in_both_packages(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run")
    for package in (pl, pytorch_lightning):
        assert isinstance(manager, package.callbacks.ModelCheckpoint)
        trainer = package.Trainer(callbacks=[manager], logger=False, accelerator="cpu", enable_progress_bar=False)
        assert trainer.checkpoint_callbacks == [manager]


def test_it_works_under_pytorch_lightning(tmp_path: Path) -> None:
    class Small(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[1]).pow(2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(epochs: int) -> pytorch_lightning.Trainer:
        trainer = pytorch_lightning.Trainer(
            callbacks=[CheckpointManager(tmp_path / "run")],
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Small(), plain_loader())
        return trainer

    train(1)
    assert "@0000000006" in str(train(2).ckpt_path)
    Small.load_from_checkpoint(f"ckptmgr://{tmp_path}/run")


def test_a_subclass_is_one_too(tmp_path: Path) -> None:
    class Mine(CheckpointManager):
        pass

    manager = Mine(tmp_path / "run")
    assert isinstance(manager, Mine)
    assert isinstance(manager, ModelCheckpoint)


def test_arguments_of_model_checkpoint_are_understood(tmp_path: Path, caplog: Any) -> None:
    manager = CheckpointManager(dirpath=tmp_path / "run", save_last=True, filename="{epoch}")
    assert manager.run_dir == str(tmp_path / "run")
    assert "filename='{epoch}' does nothing" in caplog.text
    with pytest.raises(TypeError, match=r"every_n_steps.*called .every_n_train_steps"):
        CheckpointManager(every_n_steps=3)
    with pytest.raises(UsageError, match="without monitor"):
        CheckpointManager(save_top_k=3)
    with pytest.raises(UsageError):
        CheckpointManager(every_n_train_steps=-1)


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "__version__", "2.9.0")
    with pytest.raises(IncompatibleLightningError, match=r"lightning\.pytorch 2\.9\.0 is outside the tested range"):
        compat.check_version("lightning.pytorch")


def test_a_changed_internal_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CheckpointManager(tmp_path / "run"))
    del trainer.fit_loop.epoch_loop._batches_that_stepped
    with pytest.raises(IncompatibleLightningError, match=r"epoch_loop\._batches_that_stepped is gone"):
        trainer.fit(Model(), plain_loader())


def test_nothing_of_ours_stays_on_the_trainer(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, CheckpointManager(tmp_path / "run"), max_epochs=1)
    with pytest.raises(Broken):
        fit(tmp_path, CheckpointManager(tmp_path / "other"), model=lambda: Model(("training_step", 2)))
    for owner in (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer._checkpoint_connector):
        assert not [name for name, value in vars(owner).items() if callable(value) and "patched" in repr(value)]
        assert "resume_start" not in vars(owner)


def test_an_interval_that_cannot_be_meant_is_refused_beside_triggers_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        CheckpointManager(tmp_path / "run", every_n_train_steps=-5, triggers=EverySteps(2))
