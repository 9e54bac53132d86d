"""Tables that have grown or shrunk since they were saved: rows are cut off or kept as built, and moments go along."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr import Checkpointer, Selection, UsageError


class Net(nn.Module):
    def __init__(self, nwords: int, *, is_tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(nwords, 3)
        self.head = nn.Linear(3, nwords, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(words).mean(0))


def program(nwords: int, *, is_tied: bool = False, optimizer: Any = torch.optim.Adam) -> tuple[Net, Any]:
    torch.manual_seed(nwords)
    net = Net(nwords, is_tied=is_tied)
    return net, optimizer(net.parameters(), lr=0.1)


def train_one(net: Net, optimizer: Any) -> None:
    optimizer.zero_grad()
    net(torch.tensor([0, 1])).square().sum().backward()
    optimizer.step()


def saved(run: Path, nwords: int, **options: Any) -> tuple[Net, Any]:
    net, optimizer = program(nwords, **options)
    with Checkpointer(run, {"model": net, "optimizer": optimizer}, every_n_steps=1) as ckpt:
        ckpt.resume()
        train_one(net, optimizer)
        ckpt.step(1)
    return net, optimizer


def restore(run: Path, net: Net, optimizer: Any, selection: Selection) -> None:
    with Checkpointer(run.parent / "new", {"model": net, "optimizer": optimizer}, every_n_steps=1) as ckpt:
        ckpt.restore(str(run), selection=selection)


GROW = Selection(resize={"model/embed.weight": "grow", "model/head.weight": "grow"})


def test_new_rows_stay_as_the_program_initialised_them_and_their_moments_are_zero(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "ckptmgr")
    before, optimizer_before = saved(tmp_path / "run", 5)
    net, optimizer = program(8)
    built = net.embed.weight.detach().clone()
    restore(tmp_path / "run", net, optimizer, GROW)
    assert torch.equal(net.embed.weight[:5], before.embed.weight)
    assert torch.equal(net.embed.weight[5:], built[5:])
    moments, old = optimizer.state[net.embed.weight], optimizer_before.state[before.embed.weight]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(moments[slot][:5], old[slot])
        assert torch.equal(moments[slot][5:], torch.zeros(3, 3))
    assert "model/embed.weight resized from (5, 3) to (8, 3): new rows stay as the program has initialised them" in (
        caplog.messages
    )
    train_one(net, optimizer)


def test_slicing_takes_the_first_rows_and_their_moments(tmp_path: Path) -> None:
    before, optimizer_before = saved(tmp_path / "run", 8)
    net, optimizer = program(5)
    restore(tmp_path / "run", net, optimizer, Selection(resize={"model/*.weight": "slice"}))
    assert torch.equal(net.embed.weight, before.embed.weight[:5])
    assert torch.equal(net.head.weight, before.head.weight[:5])
    assert torch.equal(
        optimizer.state[net.head.weight]["exp_avg"], optimizer_before.state[before.head.weight]["exp_avg"][:5]
    )
    train_one(net, optimizer)


def test_what_is_said_of_one_name_holds_for_all_names_of_a_tied_tensor(tmp_path: Path) -> None:
    before, _ = saved(tmp_path / "run", 5, is_tied=True)
    net, optimizer = program(8, is_tied=True)
    restore(tmp_path / "run", net, optimizer, Selection(resize={"model/head.weight": "grow"}))
    assert net.head.weight is net.embed.weight
    assert torch.equal(net.embed.weight[:5], before.embed.weight)
    assert optimizer.state[net.embed.weight]["exp_avg"].shape == (8, 3)


def test_state_that_means_nothing_for_a_new_row_begins_anew_and_that_is_said(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "ckptmgr")
    saved(tmp_path / "run", 5, optimizer=torch.optim.Rprop)
    net, optimizer = program(8, optimizer=torch.optim.Rprop)
    restore(tmp_path / "run", net, optimizer, GROW)
    assert net.embed.weight not in optimizer.state
    assert any("its state for model/embed.weight begins anew" in message for message in caplog.messages)
    train_one(net, optimizer)


def test_a_resize_and_a_cast_go_together(tmp_path: Path) -> None:
    before, _ = saved(tmp_path / "run", 5)
    net, _ = program(8)
    net.to(torch.bfloat16)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    restore(tmp_path / "run", net, optimizer, Selection(resize=dict(GROW.resize), dtype="live"))
    assert torch.equal(net.embed.weight[:5], before.embed.weight.to(torch.bfloat16))
    assert optimizer.state[net.embed.weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("resize", "why"),
    [
        ({"model/embed.weight": "slice", "model/head.weight": "slice"}, "the live one has more rows"),
        ({"model/embd.weight": "grow"}, "neither the checkpoint nor the live state has such a path"),
        ({"model/embed.weight": "pad"}, "'slice' takes the first rows"),
        ("grow", "it is a dict"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(tmp_path: Path, resize: Any, why: str) -> None:
    saved(tmp_path / "run", 5)
    net, optimizer = program(8)
    built = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UsageError, match=why):
        restore(tmp_path / "run", net, optimizer, Selection(resize=resize))
    assert all(torch.equal(tensor, built[name]) for name, tensor in net.state_dict().items())


def test_other_dimensions_are_not_resized(tmp_path: Path) -> None:
    saved(tmp_path / "run", 5)
    net, optimizer = program(8)
    net.embed = nn.Embedding(8, 4)
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(UsageError, match="other dimensions differ"):
        restore(tmp_path / "run", net, optimizer, GROW)
