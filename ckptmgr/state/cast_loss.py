"""What a cast to another floating-point dtype has done to the values: rounded, turned infinite, or turned zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CastLoss", "losses_in_words", "measure_losses"]

_CHUNK = 1 << 20
# Each value of a smaller dtype is one of these too.
_HOLDS_ALL = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class CastLoss:
    """How far the values of a tensor are from what they were.

    Attributes:
        relative: Largest change of a value, as a part of it; of values that became neither infinite nor zero.
        noverflown: Finite values that became infinite, or no number.
        nvanished: Values other than zero that became zero.
    """

    relative: float = 0.0
    noverflown: int = 0
    nvanished: int = 0

    def __bool__(self) -> bool:
        return self != CastLoss()


def measure_losses(casts: Iterable[tuple[str, Any, Any]]) -> dict[str, CastLoss]:
    """Return what casts have lost, by path; those that lost nothing are left out.

    Args:
        casts: Path, values before and values after; whole tensors, or this rank's part of them.
    """
    losses: dict[str, CastLoss] = {}
    for path, before, after in casts:
        one, other = losses.get(path, CastLoss()), _loss(_local(before), _local(after))
        losses[path] = CastLoss(
            max(one.relative, other.relative),
            one.noverflown + other.noverflown,
            one.nvanished + other.nvanished,
        )
    return {path: loss for path, loss in losses.items() if loss}


def losses_in_words(losses: Mapping[str, CastLoss]) -> str:
    """Return a phrase about what was lost, with the path that lost the most of each kind; empty for no loss."""
    said = []
    if relative := _worst(losses, lambda loss: loss.relative):
        said.append(f"values were rounded by up to {losses[relative].relative:.2g} of themselves (in {relative})")
    for words, count in (
        ("became infinite or no number", lambda loss: loss.noverflown),
        ("became zero", lambda loss: loss.nvanished),
    ):
        if path := _worst(losses, count):
            said.append(f"{sum(map(count, losses.values()))} values {words} (most in {path})")
    return ", ".join(said)


def _worst(losses: Mapping[str, CastLoss], amount: Callable[[CastLoss], float]) -> str | None:
    path = max(losses, key=lambda path: amount(losses[path]), default=None)
    return path if path is not None and amount(losses[path]) else None


def _local(item: Any) -> torch.Tensor:
    local: torch.Tensor = getattr(item, "local", item)
    return local.detach()


def _loss(before: torch.Tensor, after: torch.Tensor) -> CastLoss:
    if after.dtype in _HOLDS_ALL and after.itemsize > before.itemsize:
        return CastLoss()
    relative, noverflown, nvanished = 0.0, 0, 0
    # In pieces: in float64 a whole tensor would need several times its memory.
    pieces = zip(torch.split(before.reshape(-1), _CHUNK), torch.split(after.reshape(-1), _CHUNK), strict=True)
    for was, now in ((one.double(), other.double()) for one, other in pieces):
        is_overflown = was.isfinite() & ~now.isfinite()
        is_vanished = (was != 0) & (now == 0)
        noverflown += int(is_overflown.sum())
        nvanished += int(is_vanished.sum())
        is_rounded = was.isfinite() & (was != now) & ~is_overflown & ~is_vanished
        if is_rounded.any():
            kept = was[is_rounded]
            relative = max(relative, float(((now[is_rounded] - kept) / kept).abs().max()))
    return CastLoss(relative, noverflown, nvanished)
