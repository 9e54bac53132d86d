"""Intervals, durations and sizes as people write them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptmgr import Checkpointer, CheckpointManager
from ckptmgr.errors import UsageError
from ckptmgr.policy import AnyOf, EveryEpochs, EverySeconds, EverySteps, KeepLast, Moment, Trigger, parse_interval
from ckptmgr.policy.from_keywords import retention_from, trigger_from
from ckptmgr.policy.quantities import parse_duration, parse_nbytes
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage


@pytest.mark.parametrize(
    ("text", "trigger"),
    [
        ("500ba", EverySteps(500)),
        ("500 batches", EverySteps(500)),
        (" 1 Step ", EverySteps(1)),
        ("1ep", EveryEpochs(1)),
        ("2 epochs", EveryEpochs(2)),
        ("10min", EverySeconds(600)),
        ("90s", EverySeconds(90)),
        ("2h", EverySeconds(7200)),
        ("1.5 h", EverySeconds(5400)),
        ("1d", EverySeconds(86400)),
        ("1 week", EverySeconds(7 * 86400)),
    ],
)
def test_an_interval_as_text_is_the_trigger_that_it_says(text: str, trigger: Trigger) -> None:
    assert parse_interval(text) == trigger


@pytest.mark.parametrize(
    "text",
    [
        "",
        "500",
        "ba",
        "0ba",
        "0s",
        "-5min",
        "1.5ep",
        "2.5ba",
        "10m",
        "10 minutes ago",
        "1e3ba",
        "1h30",
        "٣ba",
        500,
        None,
    ],
)
def test_an_interval_that_cannot_be_meant_is_refused_with_examples(text: object) -> None:
    with pytest.raises(UsageError) as refused:
        parse_interval(text)  # type: ignore[arg-type]
    assert repr(text) in refused.value.what
    assert "'500ba'" in str(refused.value.next)


def test_any_of_takes_text_among_triggers() -> None:
    trigger = AnyOf("500ba", EveryEpochs(), "10min")
    assert trigger.triggers == (EverySteps(500), EveryEpochs(1), EverySeconds(600))


def reason(trigger: Trigger, **moment: object) -> str | None:
    return trigger.reason_to_save(Moment(**moment))  # type: ignore[arg-type]


NOTHING = {
    "every_n_steps": None,
    "every_n_epochs": None,
    "time_interval": None,
    "on_signal": False,
    "on_exception": False,
}


def test_every_joins_the_other_intervals_and_replaces_the_default() -> None:
    trigger = trigger_from(**{**NOTHING, "every_n_steps": 7}, every=["5ba", "1h"])  # type: ignore[arg-type]
    assert [step for step in range(1, 15) if reason(trigger, step=step, last_saved_step=step - 1)] == [5, 7, 10, 14]
    assert reason(trigger, step=1, seconds_since_save=3600.0)
    assert reason(trigger, step=1, epoch=0, is_epoch_end=True) is None


@pytest.mark.parametrize("triggers", ["5ba", ["5ba"], [EverySteps(5)], EverySteps(5)])
def test_triggers_may_be_text_or_a_list(triggers: object) -> None:
    trigger = trigger_from(**NOTHING, instead=triggers)  # type: ignore[arg-type]
    assert reason(trigger, step=5, last_saved_step=4) == "every 5 steps"
    assert reason(trigger, step=4, last_saved_step=3) is None


def test_a_checkpointer_saves_at_intervals_given_as_text(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}, every="4ba", keep_last=9) as ckpt:
        ckpt.resume()
        for step in range(1, 13):
            ckpt.step(step)
    assert [id.step for id in Catalog(LocalStorage(tmp_path / "run")).on_line] == [4, 8, 12]


@pytest.mark.parametrize("manager", [Checkpointer, CheckpointManager])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"every": "often"}, "'often' is no interval"),
        ({"every": 500}, "every=500"),
        ({"triggers": "often"}, "'often' is no interval"),
        ({"background": "no"}, "background='no'"),
        ({"save_on_signal": "no"}, "save_on_signal='no'"),
        ({"save_on_exception": 1}, "save_on_exception=1"),
        ({"save_top_k": 3}, "save_top_k=3 without monitor"),
        ({"save_top_k": -2, "monitor": "loss"}, "save_top_k=-2"),
        ({"save_top_k": True, "monitor": "loss"}, "save_top_k=True"),
        ({"save_top_k": "3", "monitor": "loss"}, "save_top_k='3'"),
        ({"mode": "max"}, "mode='max' without monitor"),
        ({"mode": "maximum"}, "mode='maximum'"),
        ({"retention": KeepLast}, "KeepLast"),
    ],
)
def test_both_managers_refuse_what_cannot_be_meant_before_anything_is_written(
    tmp_path: Path, manager: type, keywords: dict[str, object], message: str
) -> None:
    state = [{"model": torch.nn.Linear(1, 1)}] if manager is Checkpointer else []
    with pytest.raises(UsageError) as refused:
        manager(tmp_path / "run", *state, **keywords)
    assert message in refused.value.what
    assert not (tmp_path / "run").exists()


def test_what_is_tagged_stays_also_under_a_policy_of_the_user() -> None:
    from ckptmgr.policy import CheckpointFacts, plan

    saved = [
        CheckpointFacts(id=str(step), step=step, tags=frozenset({"paper"} if step == 1 else ())) for step in (1, 2, 3)
    ]
    policy = retention_from(
        keep_last=3, save_top_k=1, keep_every_n_steps=None, monitor=None, mode="min", instead=[KeepLast(1)]
    )
    assert plan(policy, saved).keep == {"1": ("tagged paper",), "3": ("newest", "last 1")}


@pytest.mark.parametrize(
    ("value", "seconds"), [("7d", 604800), ("36 h", 129600), ("2W", 1209600), (90, 90), (timedelta(minutes=1), 60)]
)
def test_a_duration_may_be_text_seconds_or_a_timedelta(value: object, seconds: float) -> None:
    assert parse_duration(value, of="x") == seconds


@pytest.mark.parametrize("value", ["7", "d", "7 days ago", "-1d", "0d", "9" * 400 + "d", 0, True, None])
def test_a_duration_that_cannot_be_meant_is_refused(value: object) -> None:
    with pytest.raises(UsageError):
        parse_duration(value, of="x")


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [("500GB", 500 * 10**9), ("1.5TiB", 3 << 39), ("12", 12), ("1 kb", 1000), ("1KiB", 1024), (7, 7), ("3 B", 3)],
)
def test_a_size_may_be_text_or_bytes(value: object, nbytes: int) -> None:
    assert parse_nbytes(value, of="x") == nbytes


@pytest.mark.parametrize("value", ["", "GB", "5XB", "-5GB", "0GB", 0, 1.5, True, None, "5 GB free", "9" * 400 + "GB"])
def test_a_size_that_cannot_be_meant_is_refused(value: object) -> None:
    with pytest.raises(UsageError):
        parse_nbytes(value, of="x")
