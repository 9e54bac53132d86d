"""The state as it was when the last step ended, kept cheaply, for a save after an exception.

Between two step boundaries only the optimizer's step changes parameters and optimizer state, so those are kept by
reference. Everything else (buffers, which forward changes, RNG, counters, schedulers, data position) is copied at each
boundary. Once an optimizer's step has begun, parameters may be half updated: from then until the next boundary nothing
can be saved, and nothing is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ckptmgr.state.capture import CapturedEntry

__all__ = ["BoundaryCopy"]


class BoundaryCopy:
    """Holds the state of the last step boundary.

    Args:
        optimizers: Their steps are watched.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._entries: list[CapturedEntry] | None = None
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._has_begun = False
        self._hooks = []
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._on_step))

    def keep(self, entries: Sequence[CapturedEntry]) -> None:
        """Remember the state of this boundary. Called when a step has ended, before the next one begins."""
        self._versions = []
        self._entries = [replace(entry, tree=self._copied(entry.tree, entry.handler)) for entry in entries]
        self._has_begun = False

    def entries(self) -> list[CapturedEntry] | None:
        """Return the state of the last boundary; None if it can no longer be had."""
        if self._entries is None or self._has_begun:
            return None
        # A version that moved proves a change (one that did not proves nothing, hence the hook).
        if any(tensor._version != version for tensor, version in self._versions):
            return None
        return self._entries

    def close(self) -> None:
        """Stop watching the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._entries = None

    def _on_step(self, *_: Any) -> None:
        self._has_begun = True

    def _copied(self, value: Any, handler: str) -> Any:
        if isinstance(value, torch.Tensor):
            if isinstance(value, torch.nn.Parameter) or (handler == "optimizer" and value.ndim > 0):
                self._versions.append((value, value._version))
                return value
            return value.detach().clone()
        if type(value) is dict:
            return {key: self._copied(item, handler) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copied(item, handler) for item in value)
        return copy.deepcopy(value)
