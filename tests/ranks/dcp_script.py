"""One rank of a job that saves and loads through DCP. ``torchrun … dcp_script.py CASE PLACE``."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ckptmgr import Checkpointer
from ckptmgr.storage import open_storage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.topology import CheckpointReader, CheckpointWriter, LoadPlanner, SavePlanner


def build(seed: int) -> nn.Module:
    """Return a model whose sizes no number of ranks divides."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def sharded(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def state_of(model: nn.Module, *, is_trained: bool) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if is_trained:
        for number in range(2):
            optimizer.zero_grad()
            model(torch.full((4, 6), 1.0 + number)).square().mean().backward()
            optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    progress = {"step": 2 if is_trained else 0, "best": float("nan") if is_trained else 0.0, "window": (1, 2)}
    return {"model": model_state, "optimizer": optimizer_state, "progress": progress}


def tensors_of(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of a state, whole."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        return {path: whole.detach().clone()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {name: tensor for key, item in items for name, tensor in tensors_of(item, f"{path}/{key}").items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def save(place: Path, step: int, state: dict[str, Any], **options: Any) -> None:
    planner = options.pop("planner", None) or SavePlanner()
    dcp.save(state, storage_writer=CheckpointWriter(place, step=step, **options), planner=planner)


def load(reference: object, state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, storage_reader=CheckpointReader(str(reference)), planner=LoadPlanner())
    return state


def failure(call: Any) -> dict[str, Any]:
    """Return the classes and texts of the errors of all ranks."""
    try:
        call()
    except CheckpointException as error:
        classes = {rank: type(failed).__name__ for rank, (failed, _) in error.failures.items()}
        return {"classes": classes, "text": str(error)}
    return {}


def fsdp(place: Path) -> dict[str, Any]:
    """Two ranks of FSDP2: take over from one process, save; then everything that can go wrong."""
    rank = dist.get_rank()
    state = load(place / "plain@latest", state_of(sharded(build(1)), is_trained=False))
    whole = tensors_of(state)
    progress = dict(state["progress"])
    save(place / "fsdp", 2, state, metrics={"loss": 0.5}, tags=["kept"])
    found: dict[str, Any] = {"progress": repr(progress)}

    group = dist.new_group(backend="gloo")
    writer = CheckpointWriter(place / "fsdp", step=3)
    dcp.async_save(state, storage_writer=writer, planner=SavePlanner(), process_group=group).result()
    found["async"] = writer.checkpoint_id.rpartition("@")[2]

    storage = open_storage(str(place / "full"))
    # On rank 1 its first file fails half-way, with the error of a full disk.
    faulty = FaultyStorage(storage, fail_at=2) if rank == 1 else storage
    found["full disk"] = failure(lambda: save(place / "full", 4, state, storage=faulty))
    save(place / "full", 5, state)
    found["pickled"] = failure(lambda: save(place / "none", 1, state, planner=dcp.DefaultSavePlanner()))
    own = {"mine": {"rank": rank}, "model": state["model"]}
    found["own values"] = failure(lambda: save(place / "none", 1, own))
    save(place / "own", 1, {"buffers": {"seen": torch.tensor([rank + 7.0]), "same": torch.ones(2)}})
    seen = load(place / "own", {"buffers": {"seen": torch.zeros(1), "same": torch.zeros(2)}})
    found["own tensor"] = seen["buffers"]["seen"].item()

    live = state_of(sharded(build(3)), is_trained=False)
    before = tensors_of(live)
    if rank == 0:
        [shards] = (place / "fsdp").glob("checkpoints/0000000002-*/model-rank-00001.safetensors")
        data = bytearray(shards.read_bytes())
        data[-1] ^= 1
        shards.write_bytes(data)
    dist.barrier()
    found["flipped"] = failure(lambda: load(place / "fsdp@2", live))
    found["untouched"] = same(before, tensors_of(live)) and live["progress"]["step"] == 0
    dist.barrier()
    if rank == 0:
        data[-1] ^= 1
        shards.write_bytes(data)
    dist.barrier()

    model = sharded(build(4))
    with Checkpointer(str(place / "managed"), {"model": model}, every_n_steps=1) as checkpointer:
        checkpointer.resume()
        checkpointer.step(1)
    fresh = {"model": sharded(build(5)).state_dict()}
    found["from a Checkpointer"] = same(
        tensors_of(load(place / "managed", fresh)["model"]), tensors_of(model.state_dict())
    )
    found["same as plain"] = same(whole, torch.load(place / "plain.pt"))
    return found


def fsdp_tp(place: Path) -> dict[str, Any]:
    """Four ranks of FSDP2 and tensor parallel: take over from two, save."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(build(6), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    state = load(place / "fsdp@kept", state_of(sharded(model, mesh["dp"]), is_trained=False))
    save(place / "tp", 2, state)
    return {"same as plain": same(tensors_of(state), torch.load(place / "plain.pt"))}


def ddp(place: Path) -> dict[str, Any]:
    """Two ranks of DDP: take over from four sharded ones, save."""
    state = load(place / "tp", state_of(DistributedDataParallel(build(dist.get_rank())), is_trained=False))
    save(place / "ddp", 2, state)
    return {"same as plain": same(tensors_of(state), torch.load(place / "plain.pt"))}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    case, place = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    result = {"fsdp": fsdp, "fsdp_tp": fsdp_tp, "ddp": ddp}[case](place)
    (place / f"{case}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
