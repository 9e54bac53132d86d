"""What a configuration may say: every wrong shape is told by its key, before anything is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr.config.yaml_source import parse_config
from ckptmgr.errors import ConfigError, NotAllowedError
from ckptmgr.experiment.construct import Construction, Part
from ckptmgr.experiment.plan import Plan, apply_to_slots, make_plan
from ckptmgr.experiment.slots import DEFAULTS
from ckptmgr.experiment.start import choose_run_dir
from ckptmgr.instantiate.allow_list import AllowList

GOOD = """
lr: 0.1
trainer: {max_epochs: 2}
model: {_target_: nowhere.to_be_found.Model, lr: "${lr}"}
"""


def plan_of(text: str, tmp_path: Path, *overrides: str, allow: tuple[str, ...] = ("nowhere.*",)) -> Plan:
    config = apply_to_slots(parse_config(text, where="a.yaml"), overrides)
    return make_plan(config, where="a.yaml", allow=AllowList.gather(cwd=tmp_path, extra=allow))


def test_a_plan_names_what_would_be_built_and_imports_nothing(tmp_path: Path) -> None:
    before = set(sys.modules)
    plan = plan_of(GOOD, tmp_path)
    assert [(target.key, target.name) for target in plan.targets] == [("model", "nowhere.to_be_found.Model")]
    assert plan.tree["model"]["lr"] == 0.1
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in ("nowhere", "lightning")}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+trainr={}", "'trainr'"),
        ("+loop={_target_: nowhere.train}", "'trainer' and 'loop'"),
        ("trainer=null", "'trainer' nor 'loop'"),
        ("trainer=[1]", "trainer is a mapping"),
        ("model=nowhere.Model", "model"),
        ("~model._target_", "'model'"),
        ("+seed=x", "'seed'"),
        ("seed=1.5", "'seed'"),
        ("seed=-1", "'seed'"),
        ("seed=true", "'seed'"),
        ("name=a/b", "'name'"),
        ("name=.hidden", "'name'"),
        ("run_dir=[1]", "'run_dir'"),
        ("run_dir=3", "'run_dir'"),
        ("callbacks=7", "'callbacks'"),
        ("callbacks={_target_: nowhere.Callback}", "'callbacks'"),
        ("callbacks={early: 7}", "'callbacks.early'"),
        ("callbacks=[{patience: 3}]", "'callbacks.0'"),
        ("loggers={csv: {save_dir: x}}", "'loggers.csv'"),
        ("loaders={training: {_target_: nowhere.L}}", "'loaders.training'"),
        ("state={scaler: {_target_: nowhere.S}}", "'state'"),
        ("scheduler={_target_: nowhere.S}", "'scheduler'"),
        ("checkpoint=5", "'checkpoint'"),
    ],
)
def test_a_wrong_shape_is_told_by_its_key(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(GOOD, tmp_path, override)
    assert named in str(caught.value)


def test_data_and_loaders_exclude_each_other(tmp_path: Path) -> None:
    text = GOOD + "data: {_target_: nowhere.D}\nloaders: {train: {_target_: nowhere.L}}\n"
    with pytest.raises(ConfigError, match="'loaders'"):
        plan_of(text, tmp_path)


def test_lightning_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'model'"):
        plan_of("trainer: {max_epochs: 1}\n", tmp_path)


def test_a_loop_has_no_callbacks(tmp_path: Path) -> None:
    text = "loop: {_target_: nowhere.train}\nmodel: {_target_: nowhere.M}\ncallbacks: {a: {_target_: nowhere.C}}\n"
    with pytest.raises(ConfigError, match="'callbacks'"):
        plan_of(text, tmp_path)


def test_every_slot_may_be_set_by_an_override_though_the_file_does_not_name_it(tmp_path: Path) -> None:
    plan = plan_of(GOOD, tmp_path, "seed=3", "name=better", "callbacks={a: {_target_: nowhere.C}}")
    assert (plan.tree["seed"], plan.tree["name"]) == (3, "better")
    assert "seed: 3" in plan.stored.config
    assert "optimizer" not in plan.stored.config, "a slot that is not used is not stored"


def test_an_override_leaves_the_slots_in_the_order_of_the_file() -> None:
    config = parse_config("model: {a: 1}\ntrainer: {b: 2}\ndata: {c: 3}\n", where="a.yaml")
    assert list(apply_to_slots(config, ["+trainer.d=4", "+model.e=5"])) == ["model", "trainer", "data"]


def test_an_optimizer_may_be_partial_as_hydra_s_users_write_it(tmp_path: Path) -> None:
    tree = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}
    part = Part("optimizer", torch.optim.Optimizer, "an optimizer", tree, n_args=1)
    made = Construction(plan_of(GOOD, tmp_path), [part]).one("optimizer", torch.nn.Linear(1, 1).parameters())
    assert isinstance(made, torch.optim.SGD)


def test_what_nobody_allowed_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    hidden = "callbacks={a: {_target_: nowhere.C, inner: [{deep: {_target_: os.system, command: 'true'}}]}}"
    with pytest.raises(NotAllowedError, match=r"callbacks\.a\.inner\.0\.deep"):
        plan_of(GOOD, tmp_path, hidden)
    with pytest.raises(NotAllowedError, match="model"):
        plan_of(GOOD, tmp_path, allow=())


def test_a_top_level_key_that_something_refers_to_is_a_variable(tmp_path: Path) -> None:
    assert plan_of(GOOD, tmp_path).tree["lr"] == 0.1
    with pytest.raises(ConfigError, match="'lr'"):
        plan_of(GOOD, tmp_path, "model.lr=0.5")


def test_the_place_of_a_run_is_no_change_of_its_configuration(tmp_path: Path) -> None:
    older = plan_of(GOOD, tmp_path, "run_dir=a").config
    newer = plan_of(GOOD, tmp_path, "run_dir=b", "lr=0.2")
    assert [str(change) for change in newer.changes_since(older)] == ["lr: 0.1 -> 0.2"]


def test_a_secret_is_neither_stored_nor_a_change(tmp_path: Path) -> None:
    text = GOOD + "loggers: {wandb: {_target_: nowhere.W, api_key: abcdefgh12345678}}\n"
    plan = plan_of(text, tmp_path)
    assert "abcdefgh12345678" not in plan.stored.config + plan.stored.resolved
    assert plan.stored.redacted == ("loggers.wandb.api_key",)
    assert plan.changes_since(parse_config(plan.stored.config, where="stored")) == []
    with pytest.raises(ConfigError, match=r"loggers\.wandb\.api_key"):
        plan_of(plan.stored.config, tmp_path)
    again = plan_of(plan.stored.config, tmp_path, "loggers.wandb.api_key=abcdefgh12345678")
    assert again.tree["loggers"]["wandb"]["api_key"] == "abcdefgh12345678"


def test_without_a_place_each_start_is_a_fresh_run_named_after_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    plan = plan_of(GOOD, tmp_path)
    places = {choose_run_dir(plan, source="configs/spirals.yaml") for _ in range(2)}
    assert len(places) == 2
    assert all(place.startswith("runs/spirals-") for place in places)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert choose_run_dir(plan, source="configs/spirals.yaml") == "runs/spirals-slurm-77"
    assert choose_run_dir(plan_of(GOOD, tmp_path, "run_dir=s3://b/x"), source="a.yaml") == "s3://b/x"


def test_the_slots_are_these() -> None:
    known: dict[str, Any] = dict(DEFAULTS)
    assert set(known.values()) == {None}
    assert {"trainer", "loop", "model", "checkpoint"} <= known.keys()
