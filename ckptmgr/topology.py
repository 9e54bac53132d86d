"""The ranks of this job. One rank is all that can be saved so far."""

from __future__ import annotations

import os

import torch

from ckptmgr.errors import TopologyError

__all__ = ["refuse_several_ranks"]


def refuse_several_ranks() -> None:
    """Refuse a job of several ranks.

    Each rank has RNG and data of its own, and with FSDP parameters too: one rank's checkpoint would restore the others
    wrongly, without an error. ``nn.DataParallel`` has one process, and is one rank.

    Raises:
        TopologyError: A process group of several ranks is initialised, or a launcher has started several.
    """
    count = _world_size()
    if count > 1:
        raise TopologyError(
            f"this job has {count} ranks, and checkpoints of several ranks cannot be saved yet",
            why="each rank has RNG and data of its own, and only one rank's would be saved",
            next="train with one process; if these processes are jobs of their own, unset RANK and WORLD_SIZE in them",
        )


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    # Launchers set both. A scheduler's WORLD_SIZE alone does not make this process a rank.
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if "RANK" in os.environ and count.isdecimal() else 1
