"""Digests of live tensors, to find out whether ranks that should hold the same state do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from xxhash import xxh3_128_hexdigest

from ckptmgr.errors import UsageError
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.entry import CapturedEntry

__all__ = [
    "OnDivergence",
    "checked_divergence",
    "compared_digests",
    "joined_digest",
    "replica_digests",
    "tensor_digest",
]

OnDivergence: TypeAlias = Literal["off", "warn", "raise"]
"""What to do when ranks that should hold the same parameters and moments do not."""

_REPLICAS = ("module", "optimizer")
_CHUNK = 1 << 24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checked_divergence(value: Any) -> OnDivergence:
    """Return the mode.

    Raises:
        UsageError: It is none.
    """
    if value not in get_args(OnDivergence):
        raise UsageError(f"on_divergence={value!r}", why="it is 'off', 'warn' or 'raise'")
    mode: OnDivergence = value
    return mode


def replica_digests(entries: Iterable[CapturedEntry], encoders: Iterable[EntryEncoder]) -> dict[str, str]:
    """Digest every parameter and moment of which all ranks should hold the same: ``entry/name`` → digest."""
    return {
        f"{entry.name}/{tensor.name}": tensor_digest(tensor.source)
        for entry, encoder in zip(entries, encoders, strict=True)
        if entry.handler in _REPLICAS and entry.scope == "replicated"
        for tensor in encoder.tensors
        if tensor.global_offset is None and tensor.name not in entry.tensor_scopes
    }


def compared_digests(entries: Iterable[CapturedEntry], encoders: Iterable[EntryEncoder]) -> list[tuple[str, str, str]]:
    """Digest the tensors that are each rank's own only if they differ: entry, name and digest of each."""
    return [
        (entry.name, tensor.name, tensor_digest(tensor.source))
        for entry, encoder in zip(entries, encoders, strict=True)
        for tensor in encoder.tensors
        if entry.tensor_scopes.get(tensor.name) == "compared"
    ]


def joined_digest(digests: dict[str, str]) -> str:
    """Return one digest of many."""
    return xxh3_128_hexdigest(repr(sorted(digests.items())).encode())


def tensor_digest(value: torch.Tensor | np.ndarray[Any, Any]) -> str:
    """Digest the elements of a tensor: on the host XXH3-128 of its bytes, on another device two sums of its bits.

    The sums stay on the device; one of them is weighted by position. They find differences, not forgeries.
    """
    if isinstance(value, np.ndarray):
        return xxh3_128_hexdigest(np.ascontiguousarray(value).tobytes())
    flat = value.detach().contiguous().reshape(-1)
    bits = flat.view(_BITS[flat.dtype.itemsize])
    if not bits.is_cuda:
        return xxh3_128_hexdigest(bits.cpu().numpy().data)
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=bits.device).mul_(0x9E3779B97F4A7C1)
        total += torch.stack((part.sum(), (part * weights).sum()))
    return ":".join(str(number) for number in total.tolist())
