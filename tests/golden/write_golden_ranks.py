"""Write the golden run of version 2: two ranks, some parameters sharded. Run once; its files are then never touched.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/golden/write_golden_ranks.py tests/golden/v2
"""

import os
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
from golden_state import STEP, golden_state
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from write_golden import Start

from ckptmgr import claim
from ckptmgr.policy.retention import KeepAll
from ckptmgr.state.capture import capture_state
from ckptmgr.topology.join import join_ranks
from ckptmgr.training_run import Monitor, TrainingRun

# By rows and by columns; 4 x 3 over 2 ranks is uneven in its columns.
SHARDED = {"first.weight": 1, "last.weight": 0, "last.bias": 0}


def shard(state: dict[str, Any], mesh: DeviceMesh) -> None:
    """Replace parameters and their moments by sharded ones."""
    model, optimizer = state["model"], state["optimizer"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        dim = SHARDED.get(names[parameter])
        if dim is None:
            continue
        sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(dim)]))
        slots = optimizer.state.pop(parameter)
        optimizer.state[sharded] = {
            name: value if name == "step" else distribute_tensor(value, mesh, [Shard(dim)])
            for name, value in slots.items()
        }
        optimizer.param_groups[0]["params"][index] = sharded
        owner, _, attribute = names[parameter].rpartition(".")
        setattr(model.get_submodule(owner), attribute, sharded)
    model.tied.weight = model.last.weight


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    state = golden_state()
    shard(state, init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    ranks = join_ranks()
    claim.describe_start = lambda **_: Start()  # type: ignore[assignment, return-value]
    socket.gethostname, os.getpid = (lambda: "golden"), (lambda: 1)
    torch.manual_seed(dist.get_rank())
    run = TrainingRun.open(folder, retention=KeepAll(), monitor=Monitor("loss"), background=False, ranks=ranks)
    run.accept()
    entries = capture_state({**state, "own": {"rank": dist.get_rank()}})
    run.save(entries, step=STEP - 1, reason="golden", metrics={"loss": 0.25})
    last = run.save(entries, step=STEP, reason="golden", epoch=1, metrics={"loss": 0.5, "bad": float("nan")})
    run.annotate(last, metrics={"loss": 0.125}, tags=["pinned"])
    run.close("finished", step=STEP)
    ranks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
