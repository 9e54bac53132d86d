"""Tensors with more or fewer rows than the live ones: cut off, or filled up, where the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptmgr.errors import UsageError
from ckptmgr.state.selection import ResizePolicy

__all__ = ["Resizer", "resize_slots"]

# What an optimizer has of a row that it has never seen: zeros, in these.
_ZERO_AT_FIRST = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg",
}  # fmt: skip


class Resizer:
    """Resizes saved tensors; names of one tensor stay names of one tensor."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, tuple[int, ...], str], torch.Tensor] = {}
        # Keeps them alive, or an id could come to mean another one.
        self._seen: list[Any] = []

    def resize(self, path: str, saved: Any, live: Any, policy: ResizePolicy) -> Any:
        """Return a saved tensor with as many rows as the live one; itself if it has them.

        Args:
            path: Of both, for messages.
            saved: Of the checkpoint. Rows are its first dimension.
            live: What it is for: rows that the checkpoint has not are taken from it.
            policy: ``slice`` takes the first rows, ``grow`` keeps the last ones of the live tensor.

        Raises:
            UsageError: The policy is not for these shapes, or one of them is no plain tensor.
        """
        if tuple(saved.shape) == tuple(live.shape):
            return saved
        is_plain = all(type(it) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for it in (saved, live))
        shapes = f"{tuple(saved.shape)} in the checkpoint, {tuple(live.shape)} now"
        if not is_plain or saved.layout != torch.strided or live.layout != torch.strided:
            raise UsageError(
                f"{path!r} cannot be resized: {shapes}",
                why="it is sharded, or of a kind that has no rows of its own",
                next="restore it into an unsharded model, save that, and go on from there",
            )
        if saved.ndim != live.ndim or saved.ndim == 0 or saved.shape[1:] != live.shape[1:]:
            raise UsageError(
                f"{path!r} cannot be resized: {shapes}",
                why="it is about the number of rows, and other dimensions differ",
                next=f"leave it out: exclude={path!r}",
            )
        if (live.shape[0] < saved.shape[0]) != (policy == "slice"):
            other = "grow" if policy == "slice" else "slice"
            raise UsageError(
                f"{path!r} cannot be resized by {policy!r}: {shapes}",
                why=f"the live one has {'more' if policy == 'slice' else 'fewer'} rows",
                next=f"resize={{{path!r}: {other!r}}}",
            )
        key = (id(saved), tuple(live.shape), policy)
        if key not in self._done:
            self._seen.append(saved)
            self._done[key] = _resized(saved.detach(), live.detach())
        return self._done[key]


def resize_slots(
    slots: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[dict[str, Any] | None, str]:
    """Resize what an optimizer keeps for a parameter along with it.

    Args:
        slots: By name.
        before: Shape of the parameter in the checkpoint.
        after: Shape of the live one.

    Returns:
        The slots, rows that are new being zero; None where they cannot be resized, and the parameter begins anew. And
        why that is.
    """
    resized: dict[str, Any] = {}
    for key, item in slots.items():
        if not isinstance(item, torch.Tensor) or item.ndim == 0 or item.numel() == 1:
            resized[key] = item
        elif tuple(item.shape) != before:
            return None, f"{key!r} has another shape than the parameter"
        elif after[0] > before[0] and key not in _ZERO_AT_FIRST:
            return None, f"nobody knows what {key!r} is for a new row"
        else:
            resized[key] = _resized(item, item.new_zeros(after))
    return resized, ""


def _resized(saved: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    rows = live.shape[0]
    if rows <= saved.shape[0]:
        return saved[:rows].clone()
    more = live[saved.shape[0] :].to(saved.device, saved.dtype)
    return torch.cat([saved, more])
