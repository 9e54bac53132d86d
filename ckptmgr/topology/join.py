"""Finding the other ranks of this job, through the process group that the program has initialised."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch

from ckptmgr.errors import TopologyError
from ckptmgr.ranks.group import DEFAULT_TIMEOUT_S, Ranks

__all__ = ["join_ranks"]


def join_ranks(*, timeout_s: float = DEFAULT_TIMEOUT_S) -> Ranks:
    """Connect this process with the other ranks of its job. Called on every rank, at the same place.

    One small broadcast goes through the default process group; from then on the group is left to the training.

    Args:
        timeout_s: How long a rank may be waited for, now and later.

    Returns:
        The ranks; this process alone if there is no process group, or one of a single rank.

    Raises:
        TopologyError: A launcher has started several ranks and no process group is initialised, or a rank did not come.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        _refuse_unconnected(os.environ)
        return Ranks.alone()
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if world_size == 1:
        return Ranks.alone()

    def broadcast(place: dict[str, Any] | None) -> dict[str, Any]:
        box: list[Any] = [place]
        distributed.broadcast_object_list(box, src=0)
        received: dict[str, Any] = box[0]
        return received

    return Ranks.meet(rank, world_size, host=_host_of_rank_0(os.environ), broadcast=broadcast, timeout_s=timeout_s)


def _refuse_unconnected(environ: Mapping[str, str]) -> None:
    # Launchers set both. A scheduler's WORLD_SIZE alone does not make this process a rank.
    count = environ.get("WORLD_SIZE", "")
    if "RANK" in environ and count.isdecimal() and int(count) > 1:
        raise TopologyError(
            f"this job has {count} ranks, and torch.distributed is not initialised",
            why="WORLD_SIZE and RANK are set: each of these processes would take the run over from the others",
            next="call torch.distributed.init_process_group() before resume(); if these processes are jobs of their "
            "own, unset RANK and WORLD_SIZE in them",
        )


def _host_of_rank_0(environ: Mapping[str, str]) -> str:
    if environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE", "1") or "MASTER_ADDR" not in environ:
        is_one_host = "MASTER_ADDR" in environ or int(environ.get("NNODES", "1")) == 1
        return "127.0.0.1" if is_one_host else socket.gethostname()
    return environ["MASTER_ADDR"]
