"""Loggers go on with the run's log: nothing is there twice, nothing is missing, what does not fit is left alone."""

import contextlib
import csv
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import pytorch_lightning
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning_samples import Broken, Model, make_trainer, plain_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ckptmgr import KeepAll
from ckptmgr.format.layout import attempt_key
from ckptmgr.launch.logger_record import LoggerRecord, read_loggers, write_loggers
from ckptmgr.lightning import CheckpointManager
from ckptmgr.lightning.log_files import csv_position, cut_csv, cut_events
from ckptmgr.lightning.logger_kinds import describe
from ckptmgr.lightning.loggers import begin_logs, log_positions
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage
from ckptmgr.training_run import TrainingRun

pytestmark = [
    # Lightning's, about a folder that it is given on purpose.
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning"),
]


def train(
    root: Path,
    *loggers: Any,
    at: tuple[str, int] | None = None,
    resume: str = "auto",
    epochs: int = 2,
    run: str = "run",
    ckpt_path: str | None = None,
    model: Callable[..., Model] = Model,
    **options: Any,
) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    manager = CheckpointManager(root / run, every_n_train_steps=2, resume=resume, background=False)
    trainer = make_trainer(root, manager, **{"logger": list(loggers), "max_epochs": epochs, **options})
    try:
        trainer.fit(model(at), plain_loader(), ckpt_path=ckpt_path)
    except Broken:
        assert at is not None
    else:
        assert at is None
    return trainer


def logs(root: Path, name: str = "a") -> CSVLogger:
    return CSVLogger(root / "logs", name=name)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_log_is_the_same_as_that_of_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    train(tmp_path / "straight", logs(tmp_path / "straight"))
    broken = tmp_path / "broken"
    for at in (("training_step", 2), ("training_step", 4), ("validation_step", 1), ("on_train_epoch_end", 1), None):
        train(broken, logs(broken), at=at)
    expected = (tmp_path / "straight/logs/a/version_0/metrics.csv").read_bytes()
    assert (broken / "logs/a/version_0/metrics.csv").read_bytes() == expected
    assert [path.name for path in (broken / "logs/a").iterdir()] == ["version_0"]


def test_what_is_dropped_is_kept_beside_the_log(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    train(tmp_path, logs(tmp_path))
    dropped = rows(tmp_path / "logs/a/version_0/metrics.dropped-attempt-000002.csv")
    assert [row["step"] for row in dropped] == ["2"]
    again = [row for row in rows(tmp_path / "logs/a/version_0/metrics.csv") if row["step"] == "2"]
    assert len(again) == 1
    assert {name: again[0][name] for name in dropped[0]} == dropped[0]


def test_going_back_to_an_older_step_goes_back_in_the_log(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path))
    before = (tmp_path / "logs/a/version_0/metrics.csv").read_bytes()
    train(tmp_path, logs(tmp_path), resume="10", at=("training_step", 2))
    train(tmp_path, logs(tmp_path))
    assert (tmp_path / "logs/a/version_0/metrics.csv").read_bytes() == before
    assert len(list((tmp_path / "logs/a").iterdir())) == 1


def test_a_log_with_a_given_version_is_not_deleted(tmp_path: Path) -> None:
    for at in (("training_step", 4), None):
        train(tmp_path, CSVLogger(tmp_path / "logs", name="a", version="mine"), at=at)
    found = rows(tmp_path / "logs/a/mine/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


def test_a_run_that_never_saved_begins_its_log_again(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 2))
    train(tmp_path, logs(tmp_path))
    found = rows(tmp_path / "logs/a/version_0/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


def test_starting_anew_begins_a_new_version(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), epochs=1)
    train(tmp_path, logs(tmp_path), epochs=1, resume="never")
    first, second = (tmp_path / f"logs/a/version_{n}/metrics.csv" for n in (0, 1))
    assert first.read_bytes() == second.read_bytes()


def test_a_fork_begins_a_new_version_and_the_log_of_its_parent_stays(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), epochs=1)
    before = (tmp_path / "logs/a/version_0/metrics.csv").read_bytes()
    train(tmp_path, logs(tmp_path), run="fork", resume=f"{tmp_path / 'run'}@6")
    assert (tmp_path / "logs/a/version_0/metrics.csv").read_bytes() == before
    assert rows(tmp_path / "logs/a/version_1/metrics.csv")[0]["step"] == "6"


def test_another_checkpoint_named_by_hand_lets_go_of_the_log(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), epochs=1, run="other")
    train(tmp_path, logs(tmp_path), epochs=1)
    before = (tmp_path / "logs/a/version_1/metrics.csv").read_bytes()
    train(tmp_path, logs(tmp_path), ckpt_path=f"{tmp_path / 'other'}@6")
    assert (tmp_path / "logs/a/version_1/metrics.csv").read_bytes() == before
    assert rows(tmp_path / "logs/a/version_2/metrics.csv")[0]["step"] == "6"


def test_a_checkpoint_beside_the_line_begins_new_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, logs(tmp_path))
    abandoned = str(Catalog(open_storage(tmp_path / "run")).committed[-1])
    train(tmp_path, logs(tmp_path), resume="10")
    before = (tmp_path / "logs/a/version_0/metrics.csv").read_bytes()
    train(tmp_path, logs(tmp_path), resume=abandoned, epochs=3)
    assert (tmp_path / "logs/a/version_0/metrics.csv").read_bytes() == before
    assert rows(tmp_path / "logs/a/version_1/metrics.csv")[0]["step"] == "12"
    assert "not on the run's line" in caplog.text


def test_a_finished_run_that_is_run_again_leaves_its_log_as_it_is(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "logs/a/version_0").iterdir()}
    train(tmp_path, logs(tmp_path))
    assert {path.name: path.read_bytes() for path in (tmp_path / "logs/a/version_0").iterdir()} == before
    train(tmp_path, logs(tmp_path), epochs=3)
    found = rows(tmp_path / "logs/a/version_0/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(18)]


def test_two_loggers_of_one_kind_keep_their_own_logs(tmp_path: Path) -> None:
    for at in (("training_step", 4), None):
        train(tmp_path, logs(tmp_path), logs(tmp_path), logs(tmp_path, "b"), at=at)
    names = ["a/version_0", "a/version_1", "b/version_0"]
    found = [(tmp_path / "logs" / name / "metrics.csv").read_bytes() for name in names]
    assert found[0] == found[1] == found[2]
    assert len(list((tmp_path / "logs").glob("*/*"))) == 3


def test_a_trainer_that_is_used_again_goes_on_logging(tmp_path: Path) -> None:
    logger = logs(tmp_path)
    trainer = train(tmp_path, logger, epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, plain_loader())
    found = rows(tmp_path / "logs/a/version_0/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


def test_a_logger_object_that_is_used_again_goes_back_too(tmp_path: Path) -> None:
    logger = logs(tmp_path)
    train(tmp_path, logger, at=("training_step", 4))
    train(tmp_path, logger)
    found = rows(tmp_path / "logs/a/version_0/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


def test_a_logger_that_was_looked_at_before_fit_goes_on_and_leaves_no_empty_version(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    logger = logs(tmp_path)
    assert logger.experiment.log_dir.endswith("version_1")
    train(tmp_path, logger)
    assert [path.name for path in (tmp_path / "logs/a").iterdir()] == ["version_0"]


def test_rows_that_a_hook_logs_before_training_stay(tmp_path: Path) -> None:
    class Greeting(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.logger.log_metrics({"hello": 1.0}, step=0)

    for at in (("training_step", 4), None):
        pl.seed_everything(1, verbose=False)
        manager = CheckpointManager(tmp_path / "run", every_n_train_steps=2, background=False)
        trainer = make_trainer(tmp_path, Greeting(), manager, logger=logs(tmp_path))
        try:
            trainer.fit(Model(at), plain_loader())
        except Broken:
            continue
    found = rows(tmp_path / "logs/a/version_0/metrics.csv")
    assert sum(bool(row["hello"]) for row in found) == 2
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


def test_half_a_row_of_a_killed_process_is_taken_away(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    with (tmp_path / "logs/a/version_0/metrics.csv").open("a") as file:
        file.write("0,0.12")
    train(tmp_path, logs(tmp_path))
    found = rows(tmp_path / "logs/a/version_0/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


def test_a_log_in_memory_goes_on(tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}"
    for at in (("training_step", 4), None):
        train(tmp_path, CSVLogger(root, name="a"), at=at)
    with fsspec.open(f"{root}/a/version_0/metrics.csv", "rt", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]
    assert len(fsspec.filesystem("memory").ls(f"/{tmp_path.name}/a")) == 1


def test_a_logger_that_moved_is_left_alone_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    train(tmp_path, logs(tmp_path, "renamed"))
    assert rows(tmp_path / "logs/renamed/version_0/metrics.csv")[0]["step"] == "2"
    assert "CSVLogger does not go on with the run's earlier log: it is set up for" in caplog.text


def test_a_log_that_is_gone_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    (tmp_path / "logs").rename(tmp_path / "elsewhere")
    train(tmp_path, logs(tmp_path))
    assert rows(tmp_path / "logs/a/version_0/metrics.csv")[0]["step"] == "2"
    assert "is gone" in caplog.text


def test_a_run_directory_that_was_moved_takes_its_log_along(tmp_path: Path) -> None:
    train(tmp_path, CSVLogger(tmp_path / "run", name="log"), at=("training_step", 4))
    (tmp_path / "run").rename(tmp_path / "moved")
    train(tmp_path, CSVLogger(tmp_path / "moved", name="log"), run="moved")
    found = rows(tmp_path / "moved/log/version_0/metrics.csv")
    assert [row["step"] for row in found if row["loss_step"]] == [str(step) for step in range(12)]


class Own(Logger):
    """A user's own."""

    def __init__(self, version: str) -> None:
        super().__init__()
        self._version = version
        self.seen: list[Any] = []

    name = "own"

    @property
    def version(self) -> str:
        return self._version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(step)

    def log_hyperparams(self, params: Any) -> None:
        pass


def test_a_logger_of_the_users_own_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, Own("one"), at=("training_step", 4))
    train(tmp_path, Own("one"), at=("training_step", 4))
    assert "Own" not in caplog.text
    train(tmp_path, Own("two"))
    assert "Own is not known here, and has begun 'two'; the run's earlier log is 'one'" in caplog.text


def broken(*_: Any, **__: Any) -> Any:
    raise OSError("no such share")


def test_a_log_that_cannot_be_taken_up_stays_and_another_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    before = (tmp_path / "logs/a/version_0/metrics.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("ckptmgr.lightning.logger_kinds.mend_csv", broken)
        trainer = train(tmp_path, logs(tmp_path))
    assert trainer.global_step == 12
    assert (tmp_path / "logs/a/version_0/metrics.csv").read_bytes() == before
    assert rows(tmp_path / "logs/a/version_1/metrics.csv")[0]["step"] == "2"
    assert "the log of CSVLogger could not be continued: OSError: no such share" in caplog.text


@pytest.mark.parametrize("function", ["cut_csv", "csv_position"])
def test_log_files_that_cannot_be_read_do_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    with monkeypatch.context() as patch:
        patch.setattr(f"ckptmgr.lightning.logger_kinds.{function}", broken)
        trainer = train(tmp_path, logs(tmp_path))
    assert trainer.global_step == 12
    assert "no such share" in caplog.text


def test_without_loggers_nothing_is_recorded(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    storage = open_storage(tmp_path / "run")
    assert read_loggers(storage, 1) == ()
    assert "loggers" not in Catalog(storage).attempts[1]


def test_a_fast_run_for_development_begins_no_log(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    before = (tmp_path / "logs/a/version_0/metrics.csv").read_bytes()
    train(tmp_path, logs(tmp_path), fast_dev_run=True)
    assert (tmp_path / "logs/a/version_0/metrics.csv").read_bytes() == before


def test_a_damaged_record_of_loggers_begins_new_logs(tmp_path: Path) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    (tmp_path / "run" / attempt_key(1, "loggers")).write_text("{}")
    train(tmp_path, logs(tmp_path))
    assert rows(tmp_path / "logs/a/version_1/metrics.csv")[0]["step"] == "2"


def test_a_forged_version_leads_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    storage = open_storage(tmp_path / "run")
    (record,) = read_loggers(storage, 1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/metrics.csv").write_text("a,step\r\n1,1\r\n")
    (tmp_path / "run" / attempt_key(1, "loggers")).unlink()
    forged = LoggerRecord(
        kind="csv", type="CSVLogger", place=record.place, version="../../precious", start=record.start
    )
    write_loggers(storage, 1, [forged])
    train(tmp_path, logs(tmp_path))
    assert (tmp_path / "precious/metrics.csv").read_text() == "a,step\n1,1\n"
    assert "is no version" in caplog.text


def test_a_forged_name_of_an_event_file_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "x.tfevents").write_bytes(b"0123456789")
    (tmp_path / "log").mkdir()
    fs = fsspec.filesystem("file")
    cut_events(fs, str(tmp_path / "log"), {"../x.tfevents": 2, f"{tmp_path}/x.tfevents": 2}, set(), "dropped")
    assert (tmp_path / "x.tfevents").read_bytes() == b"0123456789"


def test_credentials_in_the_place_of_a_log_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARE_PASSWORD", "open-sesame-1")
    train(tmp_path, CSVLogger(tmp_path / "open-sesame-1", name="a"), at=("training_step", 4))
    assert "open-sesame-1" not in (tmp_path / "run" / attempt_key(1, "loggers")).read_text()
    train(tmp_path, CSVLogger(tmp_path / "open-sesame-1", name="a"))
    assert len(list((tmp_path / "open-sesame-1/a").iterdir())) == 1


def test_a_checkpoint_from_before_loggers_were_recorded_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ckptmgr.lightning.assemble.log_positions", lambda loggers: None)
        train(tmp_path, logs(tmp_path), at=("training_step", 4))
    (tmp_path / "run" / attempt_key(1, "loggers")).unlink()
    trainer = train(tmp_path, logs(tmp_path))
    assert trainer.global_step == 12
    assert rows(tmp_path / "logs/a/version_1/metrics.csv")[0]["step"] == "2"


def test_pytorch_lightning_goes_on_logging_too(tmp_path: Path) -> None:
    class Small(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Model().net[0]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.net(batch[1]).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return Model().make_optimizer(self.parameters(), lr=0.1)

    for epochs in (1, 2):
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            log_every_n_steps=1,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=pytorch_lightning.loggers.CSVLogger(tmp_path / "logs", name="a", version="mine"),
            callbacks=[CheckpointManager(tmp_path / "run", every_n_epochs=1)],
        )
        trainer.fit(Small(), plain_loader())
    assert [row["step"] for row in rows(tmp_path / "logs/a/mine/metrics.csv")] == [str(n) for n in range(12)]


def test_a_save_after_an_exception_knows_where_the_log_was_before_it(tmp_path: Path) -> None:
    def start(name: str, at: tuple[str, int] | None) -> bytes:
        pl.seed_everything(1, verbose=False)
        manager = CheckpointManager(tmp_path / name, every_n_train_steps=100, save_on_exception=True)
        trainer = make_trainer(tmp_path, manager, logger=logs(tmp_path / name))
        with contextlib.suppress(Broken):
            trainer.fit(Model(at), plain_loader())
        return (tmp_path / name / "logs/a/version_0/metrics.csv").read_bytes()

    expected = start("straight", None)
    start("broken", ("validation_step", 1))
    start("broken", ("training_step", 3))
    assert start("broken", None) == expected


class Pictures(Model):
    """Logs more than numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        writer = self.logger.experiment
        writer.add_scalars("several", {"one": self.global_step, "two": 2 * self.global_step}, self.global_step)
        writer.add_text("words", f"step {self.global_step}", self.global_step)
        return super().training_step(batch, batch_idx)


def shown(folder: Path) -> dict[str, list[Any]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    # Files of one second and one process are read in an order of their own.
    scalars = {
        tag: sorted((event.step, event.value) for event in found.Scalars(tag)) for tag in found.Tags()["scalars"]
    }
    tensors = {tag: sorted(event.step for event in found.Tensors(tag)) for tag in found.Tags()["tensors"]}
    return {**scalars, **tensors}


def test_tensorboard_goes_on_with_everything_that_it_holds(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        return tmp_path / name / "lightning_logs/version_0"

    train(tmp_path / "straight", model=Pictures, logger=TensorBoardLogger(tmp_path / "straight"))
    for at in (("training_step", 2), ("training_step", 4), ("validation_step", 1), ("training_step", 2), None):
        train(tmp_path / "broken", model=Pictures, at=at, logger=True, default_root_dir=tmp_path / "broken")
    assert [path.name for path in folder("broken").parent.iterdir()] == ["version_0"]
    assert shown(folder("broken")) == shown(folder("straight"))
    for name in ("several_one", "several_two"):
        points = shown(folder("broken") / name)["several"]
        assert points == shown(folder("straight") / name)["several"]
        assert len(points) == 12
    # What was cut off can be read by who wants it, under its old name.
    cut = next(folder("broken").glob("*.dropped-attempt-*"))
    (tmp_path / "cut").mkdir()
    shutil.copy(cut, tmp_path / "cut" / "events.tfevents.1")
    assert shown(tmp_path / "cut")["loss_step"]


def test_a_tensorboard_log_that_was_looked_at_before_fit_goes_on(tmp_path: Path) -> None:
    train(tmp_path, TensorBoardLogger(tmp_path), at=("training_step", 4))
    logger = TensorBoardLogger(tmp_path)
    assert logger.experiment.log_dir.endswith("version_1")
    train(tmp_path, logger, at=("training_step", 4))
    # The same object again, as in a notebook.
    train(tmp_path, logger)
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    assert [step for step, _ in shown(tmp_path / "lightning_logs/version_0")["loss_step"]] == list(range(12))


def test_files_of_others_in_a_tensorboard_folder_stay(tmp_path: Path) -> None:
    train(tmp_path, TensorBoardLogger(tmp_path), at=("training_step", 4))
    others = [tmp_path / "lightning_logs/version_0" / name for name in ("notes.txt", "nested/events.tfevents.9")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    train(tmp_path, TensorBoardLogger(tmp_path))
    assert [path.read_text() for path in others] == ["mine", "mine"]


@pytest.fixture
def mlflow_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def adopt(logger: Any, version: str, caplog: pytest.LogCaptureFixture) -> str:
    """Try to go on with another run's log, and return what was said."""
    record = describe(logger, "runs/x")
    record = LoggerRecord(kind=record.kind, type=record.type, place=record.place, version=version)
    caplog.clear()
    with run_of_one_attempt(record) as run_dir:
        stub = SimpleNamespace(loggers=[logger], global_step=0, world_size=1, is_global_zero=True)
        begin_logs(stub, run_dir, "auto", storage_options=None).close()
    return caplog.text


@contextlib.contextmanager
def run_of_one_attempt(record: LoggerRecord) -> Iterator[str]:
    fsspec.filesystem("memory").store.clear()
    run = TrainingRun.open("memory://adopt", retention=KeepAll())
    write_loggers(run.storage, 1, [record])
    yield "memory://adopt"
    run.close("failed")


def test_a_wandb_run_that_the_user_chose_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = WandbLogger(id="chosen", save_dir=tmp_path, offline=True)
    assert "run chosen was chosen before `fit`; the earlier one is recorded" in adopt(logger, "recorded", caplog)
    assert logger.version == "chosen"
    assert adopt(logger, "chosen", caplog) == ""
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert adopt(logger, "recorded", caplog) == ""
    assert logger.version == logger._wandb_init["id"] == "recorded"


def test_an_mlflow_run_that_was_chosen_deleted_or_lost_is_not_taken_up(
    mlflow_files: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def logger(**options: Any) -> MLFlowLogger:
        return MLFlowLogger("e", tracking_uri=f"file:{tmp_path}/ml", **options)

    first, second = logger().run_id, logger().run_id
    assert first is not None
    assert second is not None
    assert f"run {second} was chosen before `fit`; the earlier one is {first}" in adopt(
        logger(run_id=second), first, caplog
    )
    logger().experiment.delete_run(second)
    assert f"run {second} was deleted" in adopt(logger(), second, caplog)
    assert "could not be continued: MlflowException" in adopt(logger(), "0" * 32, caplog)
    going_on = logger()
    assert adopt(going_on, first, caplog) == ""
    assert going_on.run_id == first


def test_uploading_checkpoints_is_refused_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Uploading(Own):
        _log_model = True

    train(tmp_path, Uploading("one"), epochs=1)
    assert "Uploading(log_model=...) uploads nothing" in caplog.text


def test_a_position_from_before_a_new_column_names_the_same_rows(tmp_path: Path) -> None:
    logger = logs(tmp_path)
    logger.log_metrics({"b": 0.1, "text": 'a,\n"b" é'}, 0)
    logger.log_metrics({"b": 1e-30}, 1)
    (early,) = log_positions([logger])
    before = Path(logger.experiment.metrics_file_path).read_bytes()
    logger.log_metrics({"a": 3.0, "b": float("nan")}, 0)
    (late,) = log_positions([logger])
    assert json.loads(json.dumps(early)) == early
    path, fs = logger.experiment.metrics_file_path, fsspec.filesystem("file")
    assert cut_csv(fs, path, early["end"], late["end"], f"{path}.dropped") is None
    assert Path(path).read_bytes() == before
    assert rows(Path(f"{path}.dropped")) == [{"a": "3.0", "b": "nan", "step": "0", "text": ""}]


def test_rows_that_are_missing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, logs(tmp_path), at=("training_step", 4))
    path = tmp_path / "logs/a/version_0/metrics.csv"
    path.write_bytes(path.read_bytes().split(b"\r\n")[0] + b"\r\n")
    train(tmp_path, logs(tmp_path))
    assert "the log of CSVLogger is incomplete: rows that were logged before the checkpoint are gone" in caplog.text
    assert csv_position(fsspec.filesystem("file"), str(path))["nbytes"] > 100


def test_a_trainer_without_a_manager_is_left_alone(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("ckptmgr"), "disabled", True)
        trainer = make_trainer(tmp_path, logger=logs(tmp_path), max_epochs=1, enable_checkpointing=False)
        trainer.fit(Model(), plain_loader())
    assert trainer.logger.version == 0
