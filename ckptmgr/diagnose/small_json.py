"""JSON of unknown origin, parsed within bounds."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["bounded_json"]

_MAX_NBYTES = 32 << 20
_MAX_CONTAINERS = 1_000_000
_MAX_ITEMS = 2_000_000


def bounded_json(data: bytes) -> Any:
    """Return the value.

    Raises:
        ValueError: It is no JSON, or more than a hostile file should be allowed to have built.
    """
    if len(data) > _MAX_NBYTES or data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ValueError("it is too large to look into")
    if data.count(b",") > _MAX_ITEMS:
        raise ValueError("it has too many items to look into")
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=str)
    except RecursionError as cause:
        raise ValueError("it is nested too deep") from cause
