"""A model with other weights for a while: those that a checkpoint holds, where they are not the live ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ckptmgr.state.names import WrapperPrefixes

__all__ = ["weights_of"]


@contextmanager
def weights_of(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a module's parameters and buffers have other values for a while, such as averages that a callback keeps.

    Args:
        module: The live module.
        tensors: Values by name. What is the live memory already, or of another shape, is left.
    """
    prefixes = WrapperPrefixes(module)
    swapped: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for key, live in (*module.named_parameters(), *module.named_buffers()):
            value = tensors.get(prefixes.own_name(key))
            if value is None or value.shape != live.shape or value.data_ptr() == live.data_ptr():
                continue
            swapped.append((live, live.data))
            # The memory changes hands, not its content: nothing is copied, and nothing lost.
            live.data = value.detach().to(live.device, live.dtype)
        yield
    finally:
        for live, before in swapped:
            live.data = before
