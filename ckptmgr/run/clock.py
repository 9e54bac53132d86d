"""The time of day, for records that people read. Only `KeepWithin`, where a user chose it, decides by it."""

from __future__ import annotations

import datetime

__all__ = ["utc_now"]


def utc_now() -> str:
    """Return the present time in UTC as RFC 3339 text, to the millisecond."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
