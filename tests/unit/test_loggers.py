"""Loggers go on with the run's log: nothing is there twice, nothing is missing, what does not fit is left alone."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import pytorch_lightning
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_samples import Broken, Model, make_trainer, plain_loader

from ckptmgr.format.layout import attempt_key
from ckptmgr.launch.logger_record import LoggerRecord, read_loggers, write_loggers
from ckptmgr.lightning import CheckpointManager
from ckptmgr.lightning.log_files import csv_position, cut_csv, cut_events
from ckptmgr.lightning.loggers import log_positions
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage

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
    trainer = make_trainer(root, manager, logger=list(loggers), max_epochs=epochs, **options)
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
            logger=pytorch_lightning.loggers.CSVLogger(tmp_path / "logs", name="a"),
            callbacks=[CheckpointManager(tmp_path / "run", every_n_epochs=1)],
        )
        trainer.fit(Small(), plain_loader())
    assert [row["step"] for row in rows(tmp_path / "logs/a/version_0/metrics.csv")] == [str(n) for n in range(12)]


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
