"""The configurations of this project: each composes, each that trains survives a kill, the reference is complete."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import ckptmgr
from ckptmgr import Checkpointer, CheckpointManager
from ckptmgr.cli.main import run
from ckptmgr.cli.run import command
from ckptmgr.config.compose import compose
from ckptmgr.experiment.slots import DEFAULTS
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.build import build
from ckptmgr.policy import budget, intervals, retention, triggers

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
INCLUDES = ["preemptible", "long_run", "default"]
POLICIES = (budget, intervals, retention, triggers)
REFERENCE = (ROOT / "configs" / "default.yaml").read_text()

# Overrides that make the training last seconds, and enough steps for it to be killed in mid-epoch.
SHORT = {
    "digits": [
        *("trainer.max_epochs=4", "trainer.log_every_n_steps=50"),
        *("+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false"),
    ],
    "chargpt": [
        *("corpus.max_chars=20000", "corpus.block=16", "model.width=16", "model.layers=1", "model.heads=2"),
        *("loop.epochs=3", "loaders.train.batch_size=16", "loop.val_every=50"),
    ],
}
KILL_AFTER = {"digits": 50, "chargpt": 50}  # of 180 and 213 steps


# What they say


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_composes(path: Path) -> None:
    composition = compose(path)
    assert str(path) in [str(Path(file).resolve()) for file in composition.files]
    assert composition.notes == ()


def test_there_is_nothing_else_among_the_configurations() -> None:
    assert {path.stem for path in CONFIGS} == {*SHORT, *INCLUDES}


@pytest.mark.parametrize("name", SHORT)
def test_a_dry_run_says_what_would_be_built(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(["run", f"configs/{name}.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"examples.{name}." in printed.split("# would build")[1]
    assert set(yaml.safe_load(printed)) <= {*DEFAULTS, "corpus"}


@pytest.mark.parametrize("name", INCLUDES)
@pytest.mark.parametrize("face", [CheckpointManager, Checkpointer], ids=lambda face: face.__name__)
def test_an_include_fits_a_trainer_and_a_loop(name: str, face: type, tmp_path: Path) -> None:
    including = tmp_path / "mine.yaml"
    including.write_text(f"includes: [{ROOT / 'configs' / name}.yaml]\nseed: 1\n")
    node = compose(including).config.get("checkpoint") or {}
    node = {"_target_": f"ckptmgr.{face.__name__}", **(yaml.safe_load(_as_yaml(node)) or {})}
    extra = {"run_dir": str(tmp_path / "run")} | ({"state": {"a": {}}} if face is Checkpointer else {})
    built = build(node, key="checkpoint", allow=AllowList.gather(cwd=tmp_path), extra=extra)
    assert isinstance(built, face)


def test_every_policy_of_ours_may_be_named(tmp_path: Path) -> None:
    allow = AllowList.gather(cwd=tmp_path)
    policies = [name for name in ckptmgr.__all__ if inspect.getmodule(getattr(ckptmgr, name)) in POLICIES]
    assert len(policies) >= 15
    assert [name for name in policies if allow.source_of(f"ckptmgr.{name}") is None] == []


def _as_yaml(node: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(node)


# The reference of all keys

SET_BY_THE_SLOTS = {"run_dir", "state", "resume", "on_changed_options"}


def arguments_of(face: type) -> dict[str, Any]:
    """Return the arguments that a configuration may give, with their defaults."""
    # Declared and not by `inspect.signature(face)`: a manager's __new__ takes anything.
    parameters = inspect.signature(face.__init__).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in {"self", *SET_BY_THE_SLOTS} and parameter.kind is not parameter.VAR_KEYWORD
    }


def commented_out(about: str) -> str:
    """Return the block of the reference that is about something, without its comment marks."""
    (block,) = re.findall(rf"^# .*\b{about}\b.*:\n((?:^#   .*\n)+)", REFERENCE, re.M)
    return re.sub(r"^#   ", "", block, flags=re.M)


def test_the_reference_has_every_slot_with_its_default() -> None:
    assert yaml.safe_load(REFERENCE) == dict(DEFAULTS)


@pytest.mark.parametrize("face", [CheckpointManager, Checkpointer], ids=lambda face: face.__name__)
def test_the_reference_has_every_argument_with_its_default(face: type) -> None:
    assert yaml.safe_load(commented_out(f"ckptmgr.{face.__name__}")) == arguments_of(face)


def test_the_reference_has_every_option_of_the_command() -> None:
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert {line.split()[0] for line in commented_out("ckptmgr run").splitlines()} == options


def test_the_reference_says_of_every_key_what_it_means() -> None:
    blocks = [commented_out("ckptmgr.CheckpointManager"), commented_out("ckptmgr.Checkpointer")]
    keys = [line for line in REFERENCE.splitlines() if re.match(r"\w+:", line)]
    keys += [line for block in blocks for line in block.splitlines()]
    assert len(keys) == len(DEFAULTS) + len(arguments_of(CheckpointManager)) + len(arguments_of(Checkpointer))
    assert [line for line in keys if not re.match(r"\w+: \S+ # \S.{10,}", line)] == []


# Training, killed in mid-epoch


def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ckptmgr", *words], cwd=ROOT, env=environment, stdout=output, stderr=output
        )


def last_checkpoint(run_dir: Path) -> tuple[str, dict[str, bytes]]:
    newest = max((run_dir / "checkpoints").iterdir())
    assert (newest / "manifest.json").exists()
    files = sorted(newest.glob("*.safetensors"))
    return newest.name.split("-")[0], {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", SHORT)
def test_a_killed_training_ends_bit_equal_to_one_that_was_not(name: str, tmp_path: Path) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    config = f"configs/{name}.yaml"
    uninterrupted = start("run", config, f"run_dir={whole}", *SHORT[name], log=log)
    doomed = start("run", config, f"run_dir={killed}", *SHORT[name], log=tmp_path / "doomed.log")
    try:
        while not any(killed.glob(f"checkpoints/{KILL_AFTER[name]:010d}-*/manifest.json")):
            assert doomed.poll() is None, (tmp_path / "doomed.log").read_text()
            time.sleep(0.002)
        doomed.kill()
        assert doomed.wait() == -signal.SIGKILL
        assert start("resume", str(killed), log=log).wait() == 0, log.read_text()
        assert uninterrupted.wait() == 0, log.read_text()
    finally:
        for process in (uninterrupted, doomed):
            process.kill()
            process.wait()
    assert len(list((killed / "attempts").iterdir())) == 2
    step, state = last_checkpoint(killed)
    assert step > f"{KILL_AFTER[name]:010d}"
    assert (step, state) == last_checkpoint(whole)
    assert {"model.safetensors", "optimizer.safetensors"} <= set(state)
