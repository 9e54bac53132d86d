"""What a checkpoint keeps of hyper-parameters: no secret that a configuration read from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning_samples import Model, make_trainer, plain_loader

from ckptmgr.lightning import CheckpointManager
from ckptmgr.lightning.hyper_parameters import keep_plain_hyper_parameters
from ckptmgr.loading import load_checkpoint

SECRET = "hunter2hunter2hunter2"


class WithService(Model):
    def __init__(self, width: int, login: Any = None, api_key: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_secret_that_a_module_was_given_reaches_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", SECRET)
    model = WithService(3, login={"url": f"https://me:{SECRET}@service"}, api_key="not-in-the-environment")
    make_trainer(tmp_path, CheckpointManager(tmp_path / "run"), max_epochs=1).fit(model, plain_loader())
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    kept = load_checkpoint(f"{tmp_path}/run").entries["trainer"].tree["lightning"]["hyper_parameters"]
    assert dict(kept) == {"width": 3}
    assert "that are secrets are not saved: login, api_key" in caplog.text
    loaded = WithService.load_from_checkpoint(f"ckptmgr://{tmp_path}/run", login="mine", weights_only=True)
    assert dict(loaded.hparams) == {"width": 3, "login": "mine", "api_key": None}


def test_what_is_plain_and_no_secret_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", SECRET)
    given = {"pad_token": "<pad>", "api_key": None, "sizes": [1, 2], "inner": {"token": ""}}
    checkpoint = {"hyper_parameters": given}
    keep_plain_hyper_parameters(checkpoint, lambda value: True)
    assert checkpoint["hyper_parameters"] is given
