"""Tensors of which each rank holds a part: where the part lies in the whole, and how a part gets back into place.

Such a tensor is a ``DTensor`` (FSDP2, tensor parallel). In a checkpoint it is the sum of its shards, each with its
place in the whole, so any other way of sharding, or none, can be restored from it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckptmgr.errors import UnsupportedStateError

__all__ = [
    "Box",
    "LiveShards",
    "SavedPart",
    "Shard",
    "as_live",
    "is_sharded",
    "local_of",
    "mesh_sizes",
    "part_for",
    "shard_of",
]


def is_sharded(value: object) -> bool:
    """Say whether a value is a DTensor. Nothing is imported for it: what nobody imported has no instances."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor, a range in each dimension.

    Attributes:
        offset: Where it begins, in elements by dimension.
        shape: Its size, in elements by dimension.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def slices_in(self, other: Box) -> tuple[slice, ...]:
        """Return where this box lies within another one that holds it."""
        return tuple(slice(o - p, o - p + n) for o, n, p in zip(self.offset, self.shape, other.offset, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """Return what both have in common; None if that is nothing."""
        begin = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        end = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(e <= b for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a sharded tensor.

    Attributes:
        local: Its elements, in the memory of the live tensor.
        box: Where they lie in the whole.
        whole: Shape of the whole.
    """

    local: torch.Tensor
    box: Box
    whole: tuple[int, ...]


def local_of(tensor: Any) -> torch.Tensor:
    """Return the tensor that holds this rank's elements: of a DTensor its part, else the tensor itself."""
    local: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def shard_of(tensor: Any, where: str = "a tensor") -> Shard:
    """Return this rank's part of a DTensor, and its place, as PyTorch's checkpoint planner tells it.

    Args:
        tensor: A DTensor.
        where: Its path, for messages.

    Raises:
        UnsupportedStateError: It holds partial sums, or its part is no range of the whole.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedStateError(
            f"{where} is a DTensor that cannot be stored",
            why=f"its placements are {tensor.placements}: each rank holds a partial sum, and not a part",
            next="call .redistribute() to Shard or Replicate first",
        )
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({"tensor": tensor.detach()}, None, False)
    items = planner.create_local_plan().items
    local, whole = tensor.to_local().detach(), tuple(tensor.shape)
    if not items:
        # This rank takes no part in its mesh.
        return Shard(local.new_empty(0), Box((0,) * len(whole), (0,) * len(whole)), whole)
    chunk = items[0].tensor_data.chunk if items[0].tensor_data is not None else None
    if len(items) != 1 or chunk is None or tuple(chunk.sizes) != tuple(local.shape):
        raise UnsupportedStateError(
            f"{where} is a DTensor that cannot be stored",
            why=f"with {tensor.placements}, this rank's part is not one range of the whole",
            next="report this with the placements, the mesh and the shape",
        )
    return Shard(local, Box(tuple(chunk.offsets), tuple(chunk.sizes)), whole)


def mesh_sizes(values: Any) -> dict[str, int]:
    """Return name → size of the mesh dimensions of DTensors; those without names are called ``dim0``, ``dim1``."""
    sizes: dict[str, int] = {}
    for value in values:
        mesh = value.device_mesh
        names = mesh.mesh_dim_names or [f"dim{i}" for i in range(mesh.ndim)]
        sizes |= {name: mesh.size(i) for i, name in enumerate(names) if name not in sizes}
    return sizes


class SavedPart:
    """What a checkpoint holds for this rank of a live DTensor; to handlers it looks like the whole.

    Args:
        local: This rank's elements, on the CPU.
        like: The live DTensor whose mesh and placements it follows.
    """

    def __init__(self, local: torch.Tensor, like: Any) -> None:
        self.local = local
        self.like = like
        self.shape = like.shape
        self.layout = torch.strided
        self.ndim = len(like.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.local.dtype

    def to(self, dtype: torch.dtype) -> SavedPart:
        """Return it with another dtype."""
        return SavedPart(self.local.to(dtype), self.like)

    def numel(self) -> int:
        """Return the number of elements of the whole."""
        return int(self.shape.numel())

    def live(self) -> Any:
        """Return a new DTensor with these elements, on the device of the live one."""
        return _distributed(self.local, self.like)


def as_live(saved: Any, like: Any) -> Any:
    """Return a saved value in the form in which a live object on the ranks of ``like`` keeps it.

    Args:
        saved: A part, a whole tensor, or anything else, which stays as it is.
        like: The DTensor that it belongs to: a parameter.

    A whole tensor of the shape of ``like`` is sharded as that is. One of another shape that is no scalar (a factored
    moment) is the same on all ranks of the mesh.
    """
    if isinstance(saved, SavedPart):
        return saved.live()
    if not isinstance(saved, torch.Tensor) or is_sharded(saved) or not is_sharded(like) or saved.ndim == 0:
        return saved
    if saved.shape == like.shape:
        return _distributed(part_for(like, saved).contiguous(), like)
    from torch.distributed.tensor import DTensor, Replicate

    device = like.to_local().device
    return DTensor.from_local(
        saved.to(device), like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False
    )


def part_for(live: Any, saved: Any) -> torch.Tensor:
    """Return the elements that this rank has of a live DTensor, out of a saved part or whole."""
    if isinstance(saved, SavedPart):
        return saved.local
    if is_sharded(saved):
        return local_of(saved)
    whole: torch.Tensor = saved
    return whole[shard_of(live).box.slices_in(Box((0,) * whole.ndim, tuple(whole.shape)))]


def _distributed(local: torch.Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.to(like.to_local().device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


class LiveShards:
    """The sharded parameters of the live modules by name, so that a reader takes only this rank's parts.

    Args:
        tensors: ``<entry>/<name>`` → DTensor: parameters and buffers.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)

    def wanted(self, entry: str, name: str, shape: tuple[int, ...]) -> Any:
        """Return the live DTensor that a saved tensor of this shape is for, or belongs to; None if there is none.

        A module's tensor is called as the live one, an optimizer's ``<module entry>/<parameter>/<slot>``.
        """
        for key in (f"{entry}/{name}", name.rpartition("/")[0]):
            found = self._tensors.get(key)
            if found is not None and tuple(found.shape) == tuple(shape):
                return found
        return None
