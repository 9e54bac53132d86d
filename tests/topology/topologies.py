"""The topologies of the matrix: how many processes, how the model is wrapped, and its state when it is put together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from model import Block, Model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["TOPOLOGIES", "Topology", "Wrapped", "digest", "full_state", "inner", "shard", "start_processes", "wrap"]

# Gloo's: how long a rank waits for the others. A cell that hangs must not take the other cells' time.
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Topology:
    """One row and one column of the matrix.

    Attributes:
        name: In commands and files.
        title: In the table.
        processes: How many.
        wrapper: What is put around the model.
    """

    name: str
    title: str
    processes: int
    wrapper: Literal["none", "dp", "ddp", "fsdp", "fsdp+tp"]


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("one", "1 process", 1, "none"),
        Topology("dp", "DataParallel", 1, "dp"),
        Topology("ddp2", "DDP 2", 2, "ddp"),
        Topology("ddp4", "DDP 4", 4, "ddp"),
        Topology("fsdp2", "FSDP2 2", 2, "fsdp"),
        Topology("fsdp4", "FSDP2 4", 4, "fsdp"),
        Topology("fsdp2tp2", "FSDP2 2, TP 2", 4, "fsdp+tp"),
    )
}


@dataclass(frozen=True)
class Wrapped:
    """A model that is ready to train.

    Attributes:
        model: As the training loop calls it.
        data_rank: Which part of each batch this process takes. Ranks of one tensor parallel group take the same.
        data_world_size: How many parts there are.
    """

    model: nn.Module
    data_rank: int = 0
    data_world_size: int = 1


def start_processes(count: int) -> None:
    """Join the other processes, if there are any."""
    if count > 1:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        assert dist.get_world_size() == count


def wrap(topology: Topology, model: Model) -> Wrapped:
    """Wrap a model that is the same on every rank."""
    if topology.wrapper == "none":
        return Wrapped(model)
    if topology.wrapper == "dp":
        return Wrapped(DataParallel(model))
    rank, count = dist.get_rank(), topology.processes
    if topology.wrapper == "ddp":
        # DDP's default is to lay out its buckets anew after the first step. A ring of three or more ranks adds up each
        # element in an order that depends on its place: a resume would add otherwise than the run did, from the same
        # state. This option keeps the first layout.
        return Wrapped(DistributedDataParallel(model, find_unused_parameters=True), rank, count)
    if topology.wrapper == "fsdp":
        shard(model, init_device_mesh("cpu", (count,), mesh_dim_names=("dp",)))
        return Wrapped(model, rank, count)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shard(model, mesh["dp"], mesh["tp"])
    return Wrapped(model, mesh["dp"].get_local_rank(), 2)


def shard(model: Model, data: DeviceMesh, tensor: DeviceMesh | None = None) -> None:
    """Shard a model in place.

    Args:
        model: It is the same on every rank.
        data: The ranks that FSDP2 shards over.
        tensor: The ranks that tensor parallelism splits the blocks over.
    """
    for block in model.blocks:
        if tensor is not None:
            parallelize_module(block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=data)
    # What is left, the embedding and the head with their one weight, is a group: in one group they stay tied.
    fully_shard(model, mesh=data)


def inner(model: nn.Module) -> Model:
    """Return the model without what is around it."""
    found = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    assert isinstance(found, Model)
    assert all(isinstance(block, Block) for block in found.blocks)
    return found


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return every parameter, buffer and moment, whole, by its name in the bare model. To be called on every rank.

    It knows nothing of ckptmgr, which it is to judge.
    """
    return {name: _whole(tensor) for name, tensor in _tensors(inner(model), optimizer)}


def _tensors(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
        yield name, parameter
    yield from model.named_buffers()
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            yield f"{names[id(parameter)]}/{slot}", value


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    # Training goes on in place: a copy, or it would change with it.
    return whole.detach().clone()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return what tells two states apart: names and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
