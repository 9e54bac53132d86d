"""Metrics that arrive after the commit: a validation that runs later than the save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ckptmgr import Checkpointer, CheckpointNotFoundError, OnImprovement, UsageError
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage


def checkpointer(root: Path, **options: object) -> Checkpointer:
    return Checkpointer(root, {"model": nn.Linear(1, 1)}, every="1ba", monitor="val", mode="max", **options)  # type: ignore[arg-type]


def steps(root: Path) -> list[int]:
    return [id.step for id in Catalog(LocalStorage(root)).on_line]


def test_a_checkpoint_that_only_a_late_metric_makes_the_best_survives_retention(tmp_path: Path) -> None:
    with checkpointer(tmp_path, keep_last=1) as ckpt:
        ckpt.resume()
        for step in range(1, 7):
            ckpt.step(step)
            # The validation of the step before ends only now, when its checkpoint is no longer the newest.
            if step > 1:
                ckpt.add_metrics({"val": {2: 0.9}.get(step - 1, 0.1)}, step=step - 1)
    assert steps(tmp_path) == [2, 6]
    catalog = Catalog(LocalStorage(tmp_path))
    assert catalog.best().step == 2
    assert catalog.facts(catalog.best().id).metrics == {"val": 0.9}


def test_what_a_late_metric_makes_worse_than_another_goes_one_save_later(tmp_path: Path) -> None:
    with checkpointer(tmp_path, keep_last=1) as ckpt:
        ckpt.resume()
        ckpt.step(1)
        ckpt.add_metrics({"val": 0.5})
        ckpt.step(2)
        ckpt.add_metrics({"val": 0.7})
        ckpt.step(3)
        ckpt.wait()
        assert steps(tmp_path) == [1, 2, 3]  # decided at this save, deleted at the next
        ckpt.step(4)
        ckpt.wait()
        assert steps(tmp_path) == [2, 3, 4]


def test_a_late_metric_of_one_element_tensors_counts_and_the_later_value_wins(tmp_path: Path) -> None:
    with checkpointer(tmp_path, keep_last=9) as ckpt:
        ckpt.resume()
        ckpt.step(1, metrics={"val": 0.1})
        ckpt.add_metrics({"val": torch.tensor(0.25)})
        ckpt.add_metrics({})
    catalog = Catalog(LocalStorage(tmp_path))
    assert catalog.facts(catalog.latest().id).metrics == {"val": 0.25}


@pytest.mark.parametrize("step", [2, "2", -1])
def test_a_step_that_was_never_saved_or_is_gone_takes_no_metrics(tmp_path: Path, step: object) -> None:
    with checkpointer(tmp_path, keep_last=1) as ckpt:
        ckpt.resume()
        for number in (1, 2, 3, 4):
            ckpt.step(number)
        with pytest.raises(UsageError) as refused:
            ckpt.add_metrics({"val": 1.0}, step=step)  # type: ignore[arg-type]
    assert f"step {step!r}" in refused.value.what
    assert "3, 4" in str(refused.value.why)


def test_before_the_first_save_there_is_nothing_to_add_metrics_to(tmp_path: Path) -> None:
    with checkpointer(tmp_path) as ckpt:
        with pytest.raises(UsageError, match="not open"):
            ckpt.add_metrics({"val": 1.0})
        ckpt.resume()
        with pytest.raises(UsageError, match="nothing was saved yet"):
            ckpt.add_metrics({"val": 1.0})
        with pytest.raises(UsageError, match="'val' is no number"):
            ckpt.add_metrics({"val": "good"})  # type: ignore[dict-item]


def test_an_improvement_is_judged_by_late_metrics_too(tmp_path: Path) -> None:
    options = {"triggers": OnImprovement("val", "max"), "keep_last": 9}
    with Checkpointer(tmp_path, {"model": nn.Linear(1, 1)}, **options) as ckpt:  # type: ignore[arg-type]
        ckpt.resume()
        ckpt.step(1, metrics={"val": 0.1})
        ckpt.add_metrics({"val": 0.8})
        ckpt.step(2, metrics={"val": 0.5})
        ckpt.wait()
        assert steps(tmp_path) == [1]
        ckpt.step(3, metrics={"val": 0.9})
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize(("resume", "meant"), [("aut", "auto"), ("Must", "must"), ("nevr", "never")])
def test_a_slip_of_resume_is_answered_with_the_word_that_was_meant(tmp_path: Path, resume: str, meant: str) -> None:
    with checkpointer(tmp_path) as ckpt:
        ckpt.resume()
        ckpt.step(1)
    with pytest.raises(CheckpointNotFoundError, match=f"did you mean resume='{meant}'"):
        checkpointer(tmp_path, resume=resume).resume()
    with pytest.raises(CheckpointNotFoundError) as other:
        checkpointer(tmp_path, resume="paper").resume()
    assert "did you mean" not in str(other.value)
