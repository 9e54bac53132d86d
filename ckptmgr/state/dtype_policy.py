"""Floating-point tensors whose dtype differs between a checkpoint and the live objects: cast, or take it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckptmgr.errors import UsageError
from ckptmgr.state.names import module_names
from ckptmgr.state.tensors import DTYPES, dtype_name

__all__ = [
    "Caster",
    "are_floats",
    "cast_slots",
    "floats_named",
    "name_of",
    "own_tensors",
    "refuse_to_retype",
    "take_dtypes",
]


class Caster:
    """Casts saved tensors; names of one tensor stay names of one tensor."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, torch.dtype], Any] = {}
        # Keeps them alive, or an id could come to mean another one.
        self._seen: list[Any] = []

    def cast(self, item: Any, dtype: torch.dtype) -> Any:
        """Return a tensor, or a part of one, in another dtype."""
        key = (id(item), dtype)
        if key not in self._done:
            self._seen.append(item)
            self._done[key] = item.to(dtype)
        return self._done[key]


def are_floats(saved: Any, live: Any) -> bool:
    """Say whether two leaves are floating-point tensors, whole or in parts, of different dtypes."""
    dtypes = (getattr(saved, "dtype", None), getattr(live, "dtype", None))
    return dtypes[0] != dtypes[1] and all(isinstance(it, torch.dtype) and it.is_floating_point for it in dtypes)


def floats_named(saved: str, live: str) -> bool:
    """Say whether two words of dtypes are of different floating-point ones."""
    return saved != live and all(name in DTYPES and DTYPES[name].is_floating_point for name in (saved, live))


def cast_slots(slots: Any, saved: str, live: str, caster: Caster) -> Any:
    """Cast what an optimizer keeps for a parameter along with it.

    Args:
        slots: By name.
        saved: The dtype of the parameter in the checkpoint. What has another one has it on purpose, as moments in
            float32 of a parameter in bfloat16.
        live: The dtype of the live parameter.
        caster: Of this restore.
    """
    if not isinstance(slots, Mapping):
        return slots
    return {
        key: caster.cast(item, DTYPES[live])
        # The optimizer's kernel decides about ``step``.
        if key != "step" and getattr(item, "dtype", None) == DTYPES[saved]
        else item
        for key, item in slots.items()
    }


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module by all of their own names."""
    return {
        own + name: tensor
        for part, _, own in module_names(module)
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }


def refuse_to_retype(entry: str, module: nn.Module, names: list[str]) -> None:
    """Refuse to give tensors another dtype where something beside the module relies on it.

    Raises:
        UsageError: The module is wrapped for several ranks, or holds parts of tensors.
    """
    tensors = own_tensors(module)
    kinds = {type(tensors[name]).__name__ for name in names} - {"Tensor", "Parameter", "Buffer"}
    if any(isinstance(part, DistributedDataParallel) for part in module.modules()):
        kinds.add("DistributedDataParallel")
    if kinds:
        raise UsageError(
            f"{entry!r} cannot take the dtype of the checkpoint for {len(names)} tensors, such as {names[0]!r}",
            why=f"{', '.join(sorted(kinds))} was built around the dtype that they have",
            next="restore before the module is wrapped, build it in the checkpoint's dtype, or use dtype='live'",
        )


def take_dtypes(wanted: list[tuple[torch.Tensor, torch.dtype]]) -> Callable[[], None]:
    """Give live tensors another dtype in place: they stay the same objects, so optimizers still hold them.

    Returns:
        What undoes it, bit by bit.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def undo() -> None:
        for target, data in before:
            target.data = data

    try:
        # Once for each tensor, whatever its number of names.
        for tensor, dtype in {id(tensor): (tensor, dtype) for tensor, dtype in wanted}.values():
            for target in (tensor, tensor.grad):
                if target is not None:
                    before.append((target, target.data))
                    target.data = target.data.to(dtype)
    except BaseException:
        undo()
        raise
    return undo


def name_of(item: Any) -> str:
    """Return torch's word for the dtype of a leaf."""
    return dtype_name(item.dtype)
