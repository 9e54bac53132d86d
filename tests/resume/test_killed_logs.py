"""Logs of a training that is killed: the same as if it had never been, in one folder, under one id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from forge import Ended, Forge

from ckptmgr.launch.logger_record import read_loggers
from ckptmgr.storage.local import LocalStorage


class Trainings:
    """A training that was never interrupted, and one that was killed twice."""

    def __init__(self, forge: Forge, folder: Path) -> None:
        self.forge, self.folder = forge, folder
        self.logs: list[str] = []
        assert self.run("straight").exit_code == 0
        for kill_at in (4, 8, None):
            ended = self.run("killed", kill_at=kill_at)
            assert ended.exit_code == (-9 if kill_at else 0), ended.log

    def run(self, name: str, *, kill_at: int | None = None, resume: str = "auto", lr: float = 0.01) -> Ended:
        # Two seconds for each start.
        wandb = name == "killed"
        job = {"folder": str(self.folder / name), "kill_at": kill_at, "resume": resume, "lr": lr, "wandb": wandb}
        ended = self.forge.run("logger_script", job, log=self.folder / f"{name}-{len(self.logs)}.log")
        self.logs.append(ended.log)
        return ended


@pytest.fixture(scope="module")
def trainings(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(forge, tmp_path_factory.mktemp("loggers"))


def events(folder: Path) -> Mapping[str, Any]:
    """Return what TensorBoard shows: tag → steps and values, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_csv_rows_are_those_of_the_training_that_was_never_interrupted(trainings: Trainings) -> None:
    straight, killed = (trainings.folder / name / "csv" for name in ("straight", "killed"))
    assert (killed / "version_0/metrics.csv").read_bytes() == (straight / "version_0/metrics.csv").read_bytes()
    assert [path.name for path in killed.iterdir()] == ["version_0"]
    assert (killed / "version_0/metrics.dropped-attempt-000002.csv").exists()


def test_tensorboard_shows_what_it_shows_of_the_training_that_was_never_interrupted(trainings: Trainings) -> None:
    straight, killed = (trainings.folder / name / "tb" for name in ("straight", "killed"))
    shown = events(killed / "version_0")
    assert shown == events(straight / "version_0")
    steps = {tag: [step for step, _ in points] for tag, points in shown.items() if tag != "epoch"}
    assert all(len(set(of_tag)) == len(of_tag) for of_tag in steps.values())
    assert {"loss_step", "loss_epoch", "val", "late", "backwards", "lr-AdamW", "hp_metric"} <= shown.keys()
    assert [path.name for path in killed.iterdir()] == ["version_0"]


def test_wandb_goes_on_with_the_same_run(trainings: Trainings) -> None:
    names = [path.name for path in (trainings.folder / "killed/wandb").glob("offline-run-*")]
    assert len(names) == 3
    assert len({name.rpartition("-")[2] for name in names}) == 1


def test_mlflow_goes_on_with_the_same_run(trainings: Trainings) -> None:
    metrics = list((trainings.folder / "killed/mlflow").glob("*/*/metrics/val"))
    assert len(metrics) == 1
    points = {tuple(line.split()[1:]) for line in metrics[0].read_text().splitlines()}
    (straight,) = (trainings.folder / "straight/mlflow").glob("*/*/metrics/val")
    # MLflow takes nothing back: a point that was logged after the checkpoint is there twice.
    assert points == {tuple(line.split()[1:]) for line in straight.read_text().splitlines()}


def test_each_attempt_records_its_logs(trainings: Trainings) -> None:
    storage = LocalStorage(trainings.folder / "killed/run")
    first, *others = ([(r.kind, r.version) for r in read_loggers(storage, attempt)] for attempt in (1, 2, 3))
    assert [kind for kind, _ in first] == ["csv", "tensorboard", "mlflow", "wandb"]
    assert others == [first, first]


def test_going_back_with_another_learning_rate_goes_back_in_the_logs(trainings: Trainings) -> None:
    # After the other tests of this module: it changes their logs.
    trainings.run("back")
    before = events(trainings.folder / "back/tb/version_0")
    ended = trainings.run("back", resume="18", lr=0.5)
    assert ended.exit_code == 0, ended.log
    assert "keeps the first values of ['lr']" in ended.log
    after = events(trainings.folder / "back/tb/version_0")
    assert {tag: [step for step, _ in points] for tag, points in after.items()} == {
        tag: [step for step, _ in points] for tag, points in before.items()
    }
    assert len(list((trainings.folder / "back").glob("*/version_*"))) == 2
    assert "lr: 0.5" in (trainings.folder / "back/csv/version_0/hparams.yaml").read_text()
