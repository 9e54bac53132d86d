"""What the ranks of one job say: rank 0 tells how things go, the others only what is wrong, and who they are."""

from __future__ import annotations

import logging

__all__ = ["OfRank"]


class OfRank(logging.Filter):
    """Drops what every rank would say alike, and names the rank in what is left.

    Args:
        rank: Another one than 0.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is told; it is changed in place."""
        if record.levelno < logging.WARNING:
            return False
        if not hasattr(record, "rank"):
            record.rank = self._rank
            record.msg = f"rank {self._rank}: {record.msg}"
        return True
