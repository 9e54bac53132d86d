"""Restored slots in the form in which the live optimizer would have made them: place, dtype and memory format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["keep_live_tensors", "like_live", "uncast"]

_STEP = "step"


def keep_live_tensors(group: dict[str, Any], live: Mapping[str, Any]) -> None:
    """Give restored options the kind of the live ones.

    Tensors are written in place, for the program or a CUDA graph may hold them: a tensor learning rate. Numbers stay
    numbers.
    """
    for key, before in live.items():
        if key != "params" and key in group:
            group[key] = _of_live_kind(before, group[key])


def _of_live_kind(before: Any, after: Any) -> Any:
    if isinstance(before, torch.Tensor) and isinstance(after, (torch.Tensor, int, float)):
        with torch.no_grad():
            before.copy_(torch.as_tensor(after))
        return before
    if isinstance(before, float) and isinstance(after, torch.Tensor) and after.numel() == 1:
        return after.item()
    if isinstance(before, tuple) and isinstance(after, (list, tuple)) and len(before) == len(after):
        return tuple(_of_live_kind(one, other) for one, other in zip(before, after, strict=True))
    return after


def uncast(saved: Any, loaded: Any) -> Any:
    """Undo torch's casts: it brings all floating state to the parameter's dtype, which rounds the float32 moments of a
    bfloat16 parameter; and it rebuilds anything iterable, which breaks strings.
    """
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(device=loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: loaded[key] if key == _STEP else uncast(item, loaded.get(key)) for key, item in saved.items()}
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)) and len(saved) == len(loaded):
        return type(saved)(uncast(item, other) for item, other in zip(saved, loaded, strict=True))
    return saved


def like_live(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, group: Mapping[str, Any], slots: Any) -> Any:
    """Bring ``step`` to where the live optimizer's kernel wants it, and moments into the parameter's memory format.

    Args:
        optimizer: Only torch's own are known to keep ``step`` so.
        parameter: The live parameter.
        group: Its live group.
        slots: Its restored slots; changed in place.
    """
    if not isinstance(slots, dict):
        return slots
    step = slots.get(_STEP)
    if isinstance(step, torch.Tensor) and type(optimizer).__module__.startswith("torch.optim."):
        is_fused = bool(group.get("fused"))
        on_device = is_fused or bool(group.get("capturable"))
        is_double = torch.get_default_dtype() == torch.float64 and not is_fused
        slots[_STEP] = step.to(
            device=parameter.device if on_device else "cpu",
            dtype=(torch.float64 if is_double else torch.float32) if step.is_floating_point() else step.dtype,
        )
    if type(parameter) in (torch.Tensor, nn.Parameter) and parameter.layout == torch.strided:
        for key, value in slots.items():
            if type(value) is torch.Tensor and value.layout == torch.strided and value.shape == parameter.shape:
                slots[key] = _in_format_of(parameter, value)
    return slots


def _in_format_of(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.stride() == parameter.stride() or value.numel() <= 1:
        return value
    fresh = torch.empty_like(parameter, dtype=value.dtype, device=value.device, memory_format=torch.preserve_format)
    if fresh.stride() == value.stride():
        return value
    with torch.no_grad():
        return fresh.detach().copy_(value)
