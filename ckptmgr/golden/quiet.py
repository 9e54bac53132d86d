"""A look at what a model predicts that leaves no trace in the training: not in its state, and not in its randomness."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptmgr.state.rng import preserved_rng

__all__ = ["quiet_evaluation"]

_SEED = 20_260


@contextmanager
def quiet_evaluation(*objects: Any) -> Iterator[None]:
    """Hold modules in eval mode, without gradients and autocast, with random numbers that are the same each time.

    Modes and buffers of every module, and all global random number generators, are afterwards what they were. Modes are
    set on the modules themselves: a ``train`` or ``eval`` that a class has overridden is not called. What a module
    keeps elsewhere (a cache in an attribute) is its own business.

    Args:
        objects: Modules; anything else is left alone.
    """
    modules = [value for value in objects if isinstance(value, nn.Module)]
    with ExitStack() as stack:
        for part in {part: None for module in modules for part in module.modules()}:
            stack.callback(_put_back, part, part.training, dict(part._buffers), _copies(part))
        stack.enter_context(preserved_rng())
        # Not inference mode: what a module caches under it could not be trained with afterwards.
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(parameter.device.type for module in modules for parameter in module.parameters())}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for part in {part: None for module in modules for part in module.modules()}:
            # Not eval(): an overridden one may do what training cannot go on with, such as LoRA's merge of its weights.
            part.training = False
        _seed()
        yield


def _copies(part: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().clone() for name, buffer in part._buffers.items() if buffer is not None}


def _put_back(
    part: nn.Module, mode: bool, buffers: dict[str, torch.Tensor | None], copies: dict[str, torch.Tensor]
) -> None:
    # Parts may be in different modes, so each gets its own back.
    part.training = mode
    part._buffers.clear()
    part._buffers.update(buffers)
    for name, copy in copies.items():
        buffer = buffers[name]
        assert buffer is not None
        # Not in a way that autograd notes: a backward may still need the buffer.
        buffer.data.copy_(copy)


def _seed() -> None:
    random.seed(_SEED)
    np.random.seed(_SEED)
    # Not torch.manual_seed: where CUDA is not in use yet, it would seed what the training begins with later.
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(_SEED)
