"""What a training run leaves behind, and where two runs differ first, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from xxhash import xxh3_64_hexdigest

__all__ = ["digest_of", "first_difference", "read_result", "write_result"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def digest_of(module: nn.Module) -> str:
    """Return a digest of every parameter and buffer, to find the step at which two runs part."""
    return xxh3_64_hexdigest(b"".join(t.detach().numpy().tobytes() for t in module.state_dict().values()))


def write_result(path: str, result: Mapping[str, Any]) -> None:
    """Leave the final state for the test. Its existence says that the training came to its end."""
    torch.save(dict(result), path)


def read_result(path: Path) -> dict[str, Any]:
    """Read what `write_result` left."""
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


def first_difference(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str | None:
    """Say where two results differ first: the turn of the trace, then the value of the final state; None if nowhere."""
    rows, other = expected["trace"], actual["trace"]
    for turn, (row, found) in enumerate(zip(rows, other, strict=False), start=1):
        for key in row:
            if row[key] != found[key]:
                return f"turn {turn} of {len(rows)}: {key} is {found[key]} instead of {row[key]}"
    if len(rows) != len(other):
        return f"{len(other)} turns were trained instead of {len(rows)}"
    return _difference(dict(expected), dict(actual), "")


def _difference(expected: Any, actual: Any, path: str) -> str | None:
    if type(expected) is not type(actual):
        return f"{path}: {type(actual).__name__} instead of {type(expected).__name__}"
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(expected, actual, path)
    if isinstance(expected, np.ndarray):
        return _tensor_difference(torch.from_numpy(expected), torch.from_numpy(actual), path)
    if isinstance(expected, Mapping):
        if expected.keys() != actual.keys():
            return f"{path}: the keys {sorted(map(str, expected.keys() ^ actual.keys()))} are only on one side"
        pairs = [(f"{path}/{key}", expected[key], actual[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            return f"{path}: {len(actual)} items instead of {len(expected)}"
        pairs = [(f"{path}/{i}", a, b) for i, (a, b) in enumerate(zip(expected, actual, strict=True))]
    elif isinstance(expected, float):
        return None if expected.hex() == actual.hex() else f"{path}: {actual!r} instead of {expected!r}"
    else:
        return None if expected == actual else f"{path}: {actual!r} instead of {expected!r}"
    return next((found for where, a, b in pairs if (found := _difference(a, b, where))), None)


def _tensor_difference(expected: torch.Tensor, actual: torch.Tensor, path: str) -> str | None:
    if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        return f"{path}: {actual.dtype}{list(actual.shape)} instead of {expected.dtype}{list(expected.shape)}"
    integers = _INTEGERS[expected.element_size()]
    a, b = (t.detach().contiguous().reshape(-1).view(integers) for t in (expected, actual))
    wrong = (a != b).nonzero().reshape(-1).tolist()
    if not wrong:
        return None
    one, two = expected.reshape(-1)[wrong[0]].item(), actual.reshape(-1)[wrong[0]].item()
    return f"{path}: {len(wrong)} of {a.numel()} elements differ, first at {wrong[0]}: {two!r} instead of {one!r}"
