"""A whole run, saved, fenced, retained, damaged and resumed, on every storage."""

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import S3Server
from torch import nn

from ckptmgr import Checkpointer, Fenced
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.training_run import load_checkpoint


@dataclass
class Place:
    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def storage(self) -> Storage:
        return open_storage(self.url, storage_options=self.options)


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        return Place(str(tmp_path / "run"))
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}/run")
    server: S3Server = request.getfixturevalue("s3_server")
    return Place(server.new_root(), server.storage_options)


def build_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def train(place: Place, *, until: int) -> dict[str, torch.Tensor]:
    state = build_state()
    model, optimizer = state["model"], state["optimizer"]
    with Checkpointer(place.url, state, every_n_steps=2, keep_last=2, storage_options=place.options) as ckpt:
        for step in range(ckpt.resume() + 1, until + 1):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            ckpt.step(step, metrics={"loss": 1 / step})
    return dict(model.state_dict())


def test_a_run_is_saved_retained_and_resumed_bit_by_bit(place: Place, tmp_path: Path) -> None:
    whole = train(Place(str(tmp_path / "whole")), until=8)
    train(place, until=5)
    catalog = Catalog(place.storage())
    assert [id.step for id in catalog.on_line] == [4, 5]
    assert catalog.torn == []
    resumed = train(place, until=8)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    catalog = Catalog(place.storage())
    assert [verify_checkpoint(catalog, id) for id in catalog.on_line] == [[], []]


def test_a_process_that_was_taken_over_is_told(place: Place) -> None:
    options = {"storage_options": place.options, "background": False}
    one = Checkpointer(place.url, build_state(), every_n_steps=1, **options)
    one.resume()
    one.step(1)
    train(place, until=3)
    with pytest.raises(Fenced, match="took it over"):
        one.step(2)
    with pytest.raises(Fenced):
        one.close()
    assert load_checkpoint(place.url, storage_options=place.options).manifest.step == 3


def test_a_checkpoint_that_lost_a_file_is_stepped_over(place: Place) -> None:
    train(place, until=6)
    storage = place.storage()
    newest = Catalog(storage).latest()
    storage.delete(newest.files[0].path)
    assert Catalog(storage).latest().step < newest.step
    train(place, until=7)
    assert Catalog(storage).latest().step == 7


def test_the_command_line_reads_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(s3_server.new_root(), s3_server.storage_options)
    train(place, until=3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", place.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", place.options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    command = [sys.executable, "-m", "ckptmgr", "ls", place.url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [checkpoint["step"] for checkpoint in json.loads(done.stdout)["checkpoints"]] == [2, 3]
