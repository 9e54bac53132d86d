"""What other ways of saving do on several ranks, and ckptmgr in the same place.

Usage: torchrun --nproc-per-node N peers_program.py CASE FOLDER; rank 0 writes FOLDER/CASE.json.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model import Model, Sequences, build_optimizer, loss_of
from topologies import digest, full_state, start_processes
from torch.nn.parallel import DistributedDataParallel

import ckptmgr


def plain_keys(folder: Path) -> dict[str, Any]:
    """Each rank saves a number of its own under the same key; return what each gets back."""
    rank = dist.get_rank()
    with warnings.catch_warnings():
        # About ranks that save the same: what this shows.
        warnings.simplefilter("ignore")
        dcp.save({"seen": torch.tensor([float(rank)])}, checkpoint_id=folder / "dcp")
        state = {"seen": torch.tensor([-1.0])}
        dcp.load(state, checkpoint_id=folder / "dcp")

    counts = {"seen": torch.tensor([float(rank)]), "where": f"rank {rank}"}
    with ckptmgr.Checkpointer(folder / "ours", {"counts": counts}) as ckpt:
        ckpt.resume()
        ckpt.step(1)
        ckpt.save()
    again = {"seen": torch.tensor([-1.0]), "where": ""}
    with ckptmgr.Checkpointer(folder / "ours", {"counts": again}) as ckpt:
        ckpt.resume()
    return {"dcp": _of_all(state["seen"].item()), "ours": _of_all([again["seen"].item(), again["where"]])}


def ddp_buckets(folder: Path) -> dict[str, Any]:
    """Train a second step, and the same one again with a new DDP around a model of the same state.

    Returns:
        For DDP's default and for `find_unused_parameters`, whether both have the same bits before and after.
    """
    found = {}
    words = torch.stack([Sequences()[number][1] for number in range(dist.get_rank(), 16, 4)])
    for option in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Model(), find_unused_parameters=option)
        optimizer, _ = build_optimizer(model)
        _step(model, optimizer, words)
        other = DistributedDataParallel(copy.deepcopy(model.module), find_unused_parameters=option)
        other_optimizer, _ = build_optimizer(other)
        # Of the parameters in their order, which are the same.
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = _same(model, optimizer, other, other_optimizer)
        _step(model, optimizer, words)
        _step(other, other_optimizer, words)
        found[str(option)] = [before, _same(model, optimizer, other, other_optimizer)]
    return found


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, words: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, words).backward()
    optimizer.step()


def _same(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, other: torch.nn.Module, others: torch.optim.Optimizer
) -> bool:
    return digest(full_state(model, optimizer)) == digest(full_state(other, others))


def _of_all(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    cases = {"plain_keys": (plain_keys, 3), "ddp_buckets": (ddp_buckets, 4)}
    start_processes(cases[case][1])
    found = cases[case][0](folder)
    if dist.get_rank() == 0:
        (folder / f"{case}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
