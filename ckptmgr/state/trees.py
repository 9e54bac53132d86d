"""Walking a captured tree: copies of it, and writing tensors in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ckptmgr.state.sharding import is_sharded, local_of, part_for

__all__ = ["copied_tree", "copy_into", "mapped_tree", "same_structure_copy"]


def mapped_tree(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Rebuild the containers of a tree, with every leaf replaced."""
    kind = type(tree)
    if isinstance(tree, dict):
        if kind is dict:
            return {key: mapped_tree(item, leaf) for key, item in tree.items()}
        rebuilt = copy.copy(tree)
        for key, item in tree.items():
            # Not update(): a Counter would add to what it has.
            rebuilt[key] = mapped_tree(item, leaf)
        return rebuilt
    if kind in (list, tuple):
        return kind(mapped_tree(item, leaf) for item in tree)
    return leaf(tree)


def same_structure_copy(tree: Any) -> Any:
    """Copy the containers and share the leaves: some ``load_state_dict`` take what they are given apart."""
    return mapped_tree(tree, lambda item: item)


def copied_tree(tree: Any) -> Any:
    """Copy all of a tree to host memory, with tensors that are one tensor staying one."""
    memo: dict[int, torch.Tensor] = {}

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in memo:
                memo[id(item)] = _copied(item)
            return memo[id(item)]
        return copy.deepcopy(item)

    return mapped_tree(tree, leaf)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if is_sharded(tensor):
        return tensor.detach().clone()
    if tensor.layout != torch.strided:
        return tensor.detach().cpu().clone()
    return tensor.detach().to("cpu", copy=True)


def copy_into(live: torch.Tensor | np.ndarray[Any, Any], saved: Any) -> None:
    """Write a saved tensor or array of the same shape and dtype into a live one.

    Elements of an expanded view share memory; torch refuses to write them all, so each is written once.
    """
    if isinstance(live, np.ndarray):
        np.copyto(live, saved)
        return
    with torch.no_grad():
        if is_sharded(live):
            live, saved = local_of(live.detach()), part_for(live, saved)
        if live.layout == torch.strided:
            for dim, stride in enumerate(live.stride()):
                if stride == 0 and live.shape[dim] > 1:
                    live, saved = live.narrow(dim, 0, 1), saved.narrow(dim, 0, 1)
        live.copy_(saved)
