"""What PyTorch's own means do silently, measured here, and what ckptmgr does in the same place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from launches import launch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from ckptmgr import Checkpointer, StateMismatchError

# Said by torch of every use without a process group.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


class CountingSGD(torch.optim.SGD):
    """Counts how often it was stepped."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


def save(run_dir: Path, state: dict[str, Any]) -> None:
    with Checkpointer(run_dir, state) as ckpt:
        ckpt.resume()
        ckpt.step(1)
        ckpt.save()


def from_program(case: str, folder: Path, *, processes: int) -> dict[str, Any]:
    code, log = launch("peers_program.py", case, str(folder), processes=processes)
    assert code == 0, log
    found: dict[str, Any] = json.loads((folder / f"{case}.json").read_text())
    return found


def test_dcp_gives_every_rank_one_ranks_plain_value_and_ckptmgr_each_its_own(tmp_path: Path) -> None:
    found = from_program("plain_keys", tmp_path, processes=3)
    assert len(set(found["dcp"])) == 1
    assert found["ours"] == [[0.0, "rank 0"], [1.0, "rank 1"], [2.0, "rank 2"]]


def test_ddps_default_adds_up_otherwise_in_its_first_step_so_the_matrix_fixes_its_buckets(tmp_path: Path) -> None:
    found = from_program("ddp_buckets", tmp_path, processes=4)
    assert found["False"] == [True, False]
    assert found["True"] == [True, True]


def test_dcp_keeps_the_prefix_of_data_parallel_and_ckptmgr_takes_it_off(tmp_path: Path) -> None:
    wrapped, bare = nn.DataParallel(nn.Linear(2, 2)), nn.Linear(2, 2)
    assert set(get_model_state_dict(wrapped)) == {"module.weight", "module.bias"}

    save(tmp_path, {"model": wrapped})
    Checkpointer(tmp_path, {"model": bare}).restore("latest")
    assert torch.equal(bare.weight, wrapped.module.weight)


def test_dcp_steps_an_optimizer_to_read_its_state_and_ckptmgr_does_not(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = CountingSGD(model.parameters(), lr=0.1, momentum=0.9)
    save(tmp_path, {"model": model, "optimizer": optimizer})
    assert (optimizer.steps, len(optimizer.state)) == (0, 0)

    get_optimizer_state_dict(model, optimizer)
    assert (optimizer.steps, len(optimizer.state)) == (1, 2)


def test_dcp_casts_to_another_dtype_without_a_word_and_ckptmgr_refuses(tmp_path: Path) -> None:
    exact, rough = nn.Linear(2, 2).double(), nn.Linear(2, 2)
    dcp.save(exact.state_dict(), checkpoint_id=tmp_path / "dcp")
    state = rough.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert state["weight"].dtype == torch.float32
    assert torch.equal(state["weight"], exact.weight.float())

    save(tmp_path / "ours", {"model": exact})
    before = rough.weight.clone()
    with pytest.raises(StateMismatchError, match="float64"):
        Checkpointer(tmp_path / "ours", {"model": rough}).restore("latest")
    assert torch.equal(rough.weight, before)
