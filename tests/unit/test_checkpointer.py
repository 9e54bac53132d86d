import gc
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ckptmgr import (
    Checkpointer,
    CheckpointNotFoundError,
    EverySteps,
    KeepAll,
    Preempted,
    StateMismatchError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.local import LocalStorage
from ckptmgr.training_run import TrainingRun


class Training:
    """A small training whose trained samples are part of its state."""

    def __init__(self, run_dir: Path, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.extra: dict[str, Any] = {"seen": []}
        self.loader: Any = DataLoader(TensorDataset(torch.randn(24, 2), torch.arange(24)), batch_size=4, shuffle=True)
        state = {"model": self.model, "optimizer": self.optimizer, "extra": self.extra}
        self.ckpt = Checkpointer(run_dir, state, **options)

    def train(self, *, epochs: int = 2, until: int | None = None, fail: str = "", at: int = 0) -> int:
        with self.ckpt as ckpt:
            step = ckpt.resume()
            for x, index in ckpt.batches(self.loader, epochs=epochs):
                if fail == "forward" and step == at:
                    self.model(x)  # moves the statistics of BatchNorm, and RNG
                    raise RuntimeError("boom")
                self.optimizer.zero_grad()
                self.model(x).square().mean().backward()
                self.optimizer.step()
                if fail == "after the optimizer's step" and step == at:
                    raise RuntimeError("boom")
                self.extra["seen"].append(index.tolist())
                step += 1
                if fail == "signal" and step == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                ckpt.step(step, metrics={"loss": 1.0 / step})
                if step == until:
                    break
        return step

    def bits(self) -> dict[str, bytes]:
        tensors = dict(self.model.state_dict())
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors.update({f"{index}/{slot}": value for slot, value in slots.items()})
        return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}


@pytest.fixture
def whole(tmp_path: Path) -> Training:
    training = Training(tmp_path / "whole")
    assert training.train() == 12
    return training


def steps(root: Path) -> list[int]:
    return [id.step for id in Catalog(LocalStorage(root)).on_line]


def reason(root: Path) -> str:
    return Catalog(LocalStorage(root)).latest().reason


@pytest.mark.parametrize("until", [1, 4, 6, 7, 11])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path: Path, whole: Training, until: int) -> None:
    Training(tmp_path / "run", every_n_steps=1).train(until=until)
    torch.manual_seed(99)
    again = Training(tmp_path / "run", every_n_steps=1)
    assert again.train() == 12
    assert again.extra["seen"] == whole.extra["seen"]
    assert again.bits() == whole.bits()


def test_an_exception_in_forward_saves_the_step_before_it(tmp_path: Path, whole: Training) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        Training(tmp_path / "run", every_n_steps=100, save_on_exception=True).train(fail="forward", at=7)
    assert steps(tmp_path / "run") == [7]
    assert reason(tmp_path / "run") == "exception: RuntimeError"
    again = Training(tmp_path / "run")
    again.train()
    assert again.extra["seen"] == whole.extra["seen"]
    assert again.bits() == whole.bits()


def test_an_exception_after_the_optimizer_has_moved_saves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(tmp_path / "run", every_n_steps=5, save_on_exception=True)
    with pytest.raises(RuntimeError, match="boom"):
        training.train(fail="after the optimizer's step", at=7)
    assert steps(tmp_path / "run") == [5]
    assert "nothing is saved" in caplog.text


def test_a_signal_saves_at_the_step_boundary_and_exits_with_75(tmp_path: Path, whole: Training) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        Training(tmp_path / "run", every_n_steps=100).train(fail="signal", at=5)
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps(tmp_path / "run") == [5]
    again = Training(tmp_path / "run")
    again.train()
    assert again.bits() == whole.bits()


def test_a_finished_run_says_that_it_is_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Training(tmp_path / "run").train()
    again = Training(tmp_path / "run")
    assert again.train() == 12
    assert "is finished" in caplog.text
    assert again.train is not None


def test_more_epochs_continue_a_finished_run(tmp_path: Path) -> None:
    Training(tmp_path / "run").train(epochs=2)
    longer = Training(tmp_path / "run")
    assert longer.train(epochs=3) == 18
    straight = Training(tmp_path / "straight")
    straight.train(epochs=3)
    assert longer.bits() == straight.bits()


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ((torch.randn(2), torch.tensor(i)) for i in range(24))


def test_the_end_of_an_epoch_is_noticed_where_the_loader_has_no_length(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", every_n_epochs=1)
    training.loader = DataLoader(Endless(), batch_size=4)
    training.train()
    assert steps(tmp_path / "run") == [6, 12]


def test_a_loss_with_a_gradient_is_a_metric(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}) as ckpt:
        ckpt.resume()
        ckpt.step(1, metrics={"loss": torch.tensor(0.5, requires_grad=True)})
    assert Catalog(LocalStorage(tmp_path / "run")).latest().metrics == {"loss": 0.5}


def test_a_finished_run_without_a_length_says_that_it_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        training = Training(tmp_path / "run")
        training.loader = DataLoader(Endless(), batch_size=4)
        assert training.train() == 12
    assert "is finished" in caplog.text


def test_a_save_before_the_loop_keeps_the_position(tmp_path: Path, whole: Training) -> None:
    Training(tmp_path / "run", every_n_steps=1).train(until=7)
    tagging = Training(tmp_path / "run")
    tagging.ckpt.resume()
    torch.rand(5)  # what the script draws here, it draws again in the next process
    tagging.ckpt.save(tags=["seven"])
    tagging.ckpt.close()
    again = Training(tmp_path / "run", resume="seven")
    assert again.train() == 12
    assert again.extra["seen"] == whole.extra["seen"]
    assert again.bits() == whole.bits()


def test_a_second_loop_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.ckpt.resume()
    training.ckpt.batches(training.loader, epochs=1)
    with pytest.raises(UsageError, match="called twice"):
        training.ckpt.batches(training.loader, epochs=1)


@pytest.mark.parametrize("turns", [3, 4])
def test_a_loop_that_is_left_between_two_steps_is_told_about_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    training = Training(tmp_path / "run", every_n_steps=100)
    with training.ckpt as ckpt:
        ckpt.resume()
        for turn, _ in enumerate(ckpt.batches(training.loader, epochs=1), start=1):
            ckpt.step(turn // 2)
            if turn == turns:
                break
    assert ("batch 3 of epoch 0 counts as trained" in caplog.text) == (turns == 3)


def test_the_end_of_an_epoch_counts_when_the_pending_step_is_done(tmp_path: Path) -> None:
    # 5 batches in an epoch and a step after each second one: the first epoch ends in the middle of step 3.
    training = Training(tmp_path / "run", every_n_epochs=1)
    training.loader = DataLoader(TensorDataset(torch.randn(20, 2), torch.arange(20)), batch_size=4)
    with training.ckpt as ckpt:
        ckpt.resume()
        for turn, _ in enumerate(ckpt.batches(training.loader, epochs=2), start=1):
            ckpt.step(turn // 2)
    assert steps(tmp_path / "run") == [3, 5]


def test_a_metric_belongs_to_the_step_that_it_was_given_for(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}, every_n_steps=1, retention=KeepAll()) as ckpt:
        ckpt.resume()
        ckpt.step(1, metrics={"loss": 1.0})
        ckpt.save(metrics={"val": 2.0})
        ckpt.step(2)
    catalog = Catalog(LocalStorage(tmp_path / "run"))
    assert [catalog.manifest(id).metrics for id in catalog.on_line] == [{"loss": 1.0}, {"loss": 1.0, "val": 2.0}, {}]


def test_the_last_step_is_saved_when_the_loop_ends(tmp_path: Path) -> None:
    Training(tmp_path / "run", every_n_steps=5).train()
    assert steps(tmp_path / "run") == [5, 10, 12]
    assert reason(tmp_path / "run") == "end of training"


def test_restore_goes_back_within_one_process(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", every_n_steps=1, keep_last=20)
    with training.ckpt as ckpt:
        step = ckpt.resume()
        for epoch in range(2):
            for x, index in ckpt.batches(training.loader, epochs=1):
                training.model(x).sum().backward()
                training.optimizer.step()
                training.extra["seen"].append(index.tolist())
                step += 1
                ckpt.step(step)
            if epoch == 0:
                assert ckpt.restore("3") == 3
                step = 3
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert len(training.extra["seen"]) == 6


def test_weights_of_another_run_can_be_restored_without_its_history(tmp_path: Path) -> None:
    other = Training(tmp_path / "other")
    other.train()
    training = Training(tmp_path / "run")
    training.ckpt.resume()
    assert training.ckpt.restore(f"{tmp_path}/other@latest") == 12
    assert training.bits() == other.bits()
    training.ckpt.close()
    assert steps(tmp_path / "run") == []


def test_a_tag_pins_a_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", every_n_steps=1, keep_last=1)
    with training.ckpt as ckpt:
        step = ckpt.resume()
        for _ in ckpt.batches(training.loader, epochs=1):
            step += 1
            ckpt.step(step)
            if step == 2:
                ckpt.save(tags=["before-warmup"])
    assert steps(tmp_path / "run")[0] == 2


def test_a_model_that_does_not_fit_is_left_as_it_is(tmp_path: Path) -> None:
    Training(tmp_path / "run").train()
    other = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    training = Training(tmp_path / "run")
    optimizer = torch.optim.AdamW(other.parameters())
    ckpt = Checkpointer(tmp_path / "run", {"model": other, "optimizer": optimizer, "extra": training.extra})
    with pytest.raises(StateMismatchError, match=r"0\.weight"):
        ckpt.resume()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert not optimizer.state


def test_an_unknown_type_fails_before_the_first_step(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path / "run", {"extra": {"function": print}})
    with pytest.raises(UnsupportedStateError, match="extra/function"):
        ckpt.resume()


def test_an_optimizer_over_parameters_of_no_captured_module_fails_before_the_first_step(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    ckpt = Checkpointer(tmp_path / "run", {"model": model, "optimizer": torch.optim.SGD(other.parameters(), lr=0.1)})
    with pytest.raises(UnsupportedStateError):
        ckpt.resume()


@pytest.mark.parametrize(
    "options",
    [{"every_n_steps": 0}, {"every_n_steps": -5}, {"every_n_epochs": 0}, {"time_interval": -1.0}, {"keep_last": 0},
     {"every_n_steps": 1.5}, {"mode": "best"}, {"monitor": ""}],
    ids=repr,
)  # fmt: skip
def test_an_interval_that_cannot_be_meant_is_refused_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}, **{"monitor": "loss", **options})
    assert not (tmp_path / "run").exists()


def test_misuse_says_what_to_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="state is empty"):
        Checkpointer(tmp_path, {})
    with pytest.raises(UsageError, match="reserved"):
        Checkpointer(tmp_path, {"ckptmgr_rng": {}})
    ckpt = Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)})
    with pytest.raises(UsageError, match="resume"):
        ckpt.step(1)
    ckpt.resume()
    with pytest.raises(UsageError, match="twice"):
        ckpt.resume()
    ckpt.step(5)
    with pytest.raises(UsageError, match="never go back"):
        ckpt.step(4)
    ckpt.close()
    ckpt.close()


def test_ckptmgr_resume_overrides_the_directory_that_the_script_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Training(tmp_path / "run", every_n_steps=1).train(until=3)
    monkeypatch.setenv("CKPTMGR_RUN_DIR", f"{tmp_path}/run")
    with caplog.at_level(logging.INFO, logger="ckptmgr"):
        Training(tmp_path / "elsewhere").train(until=4)
    assert f"resuming {tmp_path}/run from step 3 (epoch 0, 3 batches trained)" in caplog.text
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "metrics",
    [{"loss": "0.5"}, {"loss": None}, {"loss": torch.ones(2)}, {"loss": 10**400}, {1: 0.5}, "loss", [0.5]],
    ids=lambda value: repr(value)[:30],
)
def test_a_metric_that_is_no_number_is_refused_where_it_is_given(tmp_path: Path, metrics: Any) -> None:
    ckpt = Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)})
    ckpt.resume()
    for call in (lambda: ckpt.step(1, metrics=metrics), lambda: ckpt.save(metrics=metrics)):
        with pytest.raises(UsageError, match="metric"):
            call()
    ckpt.close()
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("value", [True, np.float32(2), torch.tensor(3, dtype=torch.bfloat16), 5], ids=repr)
def test_a_metric_may_be_any_kind_of_number(tmp_path: Path, value: Any) -> None:
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}) as ckpt:
        ckpt.resume()
        ckpt.step(1, metrics={"a": value})
        ckpt.save(metrics={"b": value})
    assert Catalog(LocalStorage(tmp_path / "run")).latest().metrics == {"a": float(value), "b": float(value)}


@pytest.mark.parametrize("step", [np.int64(4), torch.tensor(4)], ids=repr)
def test_a_step_may_be_an_integer_of_another_library(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}) as ckpt:
        ckpt.resume()
        ckpt.step(step)
    assert steps(tmp_path / "run") == [4]


@pytest.mark.parametrize(
    "arguments",
    [{"run_dir": None}, {"run_dir": 5}, {"state": [1]}, {"state": {1: {}}}, {"state": {"\ud800": {}}},
     {"resume": 5}, {"triggers": "often"}, {"retention": "all"}],
    ids=repr,
)  # fmt: skip
def test_an_argument_of_a_wrong_kind_is_refused_at_once(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Checkpointer(**{"run_dir": tmp_path / "run", "state": {"model": nn.Linear(1, 1)}, **arguments})


def test_a_state_that_cannot_be_saved_takes_no_run_over(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStateError):
        Checkpointer(tmp_path / "run", {"extra": {"function": print}}).resume()
    assert not (tmp_path / "run").exists()


def test_a_resume_that_does_not_fit_claims_nothing(tmp_path: Path) -> None:
    Training(tmp_path / "run").train()
    with pytest.raises(StateMismatchError):
        Checkpointer(tmp_path / "run", {"model": nn.Linear(1, 1)}).resume()
    assert [path.name for path in (tmp_path / "run/attempts").iterdir()] == ["000001"]


def test_own_triggers_do_not_keep_a_signal_from_saving(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        Training(tmp_path / "run", triggers=EverySteps(100)).train(fail="signal", at=5)
    assert steps(tmp_path / "run") == [5]


def test_a_second_signal_does_not_end_the_save_that_the_first_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingRun.close

    def close(self: TrainingRun, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingRun, "close", close)
    with pytest.raises(Preempted):
        Training(tmp_path / "run", every_n_steps=100).train(fail="signal", at=5)
    assert steps(tmp_path / "run") == [5]


def test_a_signal_after_the_last_step_is_not_forgotten(tmp_path: Path) -> None:
    ckpt = Training(tmp_path / "run", every_n_steps=100).ckpt
    ckpt.resume()
    ckpt.step(1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        ckpt.close()
    assert steps(tmp_path / "run") == [1]
    assert '"outcome":"preempted"' in (tmp_path / "run/attempts/000001/end.json").read_text()


def test_restoring_what_is_not_there_does_not_cost_the_run(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", every_n_steps=1)
    with training.ckpt as ckpt:
        ckpt.resume()
        ckpt.step(1)
        with pytest.raises(CheckpointNotFoundError):
            ckpt.restore("7")
        ckpt.step(2)
    assert steps(tmp_path / "run") == [1, 2]


def test_looking_at_a_run_disturbs_nobody_who_trains_in_it(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", every_n_steps=1)
    with training.ckpt as ckpt:
        ckpt.resume()
        ckpt.step(1)
        ckpt.wait()
        onlooker = Training(tmp_path / "run")
        assert onlooker.ckpt.restore("latest") == 1
        misfit = Checkpointer(tmp_path / "run", {"model": nn.Linear(7, 7)})
        with pytest.raises(StateMismatchError):
            misfit.restore("latest")
        with pytest.raises(StateMismatchError):
            misfit.resume()
        ckpt.step(2)
    assert steps(tmp_path / "run") == [1, 2]
    assert [path.name for path in (tmp_path / "run/attempts").iterdir()] == ["000001"]


def test_the_own_run_by_another_spelling_is_the_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = Training(Path("run"), every_n_steps=1)
    with training.ckpt as ckpt:
        ckpt.resume()
        ckpt.step(1)
        ckpt.step(2)
        assert ckpt.restore(f"{tmp_path}/run@1") == 1
        ckpt.step(2)
    assert [(id.step, id.attempt) for id in Catalog(LocalStorage(tmp_path / "run")).on_line] == [(1, 1), (2, 2)]


def test_a_monitor_without_a_value_is_told_once_with_the_metrics_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Training(tmp_path / "run", every_n_steps=2, monitor="val_los").train()
    assert caplog.text.count("monitor='val_los'") == 1
    assert "'loss'" in caplog.text


def test_a_checkpointer_that_is_forgotten_says_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tmp_path / "run")
    training.ckpt.resume()
    training.ckpt.step(1)
    del training
    gc.collect()
    assert "was not closed" in caplog.text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("x"), "failed"),
        (SystemExit(3), "failed"),
        (SystemExit(0), "preempted"),
        (KeyboardInterrupt(), "preempted"),
    ],
    ids=repr,
)
def test_leaving_the_loop_without_a_save_says_which_steps_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException, outcome: str
) -> None:
    def leave() -> None:
        with Training(tmp_path / "run", every_n_steps=4).ckpt as ckpt:
            ckpt.resume()
            for step in range(1, 7):
                ckpt.step(step)
            raise error

    with pytest.raises(type(error)):
        leave()
    assert "steps 5 to 6 are lost" in caplog.text
    assert f'"outcome":"{outcome}"' in (tmp_path / "run/attempts/000001/end.json").read_text()


def test_fewer_epochs_than_have_begun_train_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Training(tmp_path / "run").train(epochs=3, until=8)
    assert Training(tmp_path / "run").train(epochs=1) == 8
    assert "is finished" in caplog.text
    again = Training(tmp_path / "run")
    assert again.train(epochs=3) == 18
    straight = Training(tmp_path / "straight")
    straight.train(epochs=3)
    assert again.bits() == straight.bits()
