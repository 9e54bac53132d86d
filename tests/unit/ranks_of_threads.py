"""Ranks of one process, each on a thread: real sockets, without processes that would have to import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ckptmgr.ranks.group import Ranks

__all__ = ["meet", "on_all"]


def meet(world_size: int, *, timeout_s: float = 20.0) -> list[Ranks]:
    """Return the ranks of a job, connected."""
    place: Future[dict[str, Any]] = Future()

    def broadcast(own: dict[str, Any] | None) -> dict[str, Any]:
        if own is not None:
            place.set_result(own)
        return place.result()

    def join(rank: int) -> Ranks:
        return Ranks.meet(rank, world_size, host="127.0.0.1", broadcast=broadcast, timeout_s=timeout_s)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(join, range(world_size)))


def on_all(ranks: Sequence[Ranks], work: Callable[[Ranks], Any]) -> list[Any]:
    """Do something on every rank at once; return what came of it by rank, errors too."""

    def outcome(rank: Ranks) -> Any:
        try:
            return work(rank)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(outcome, ranks))
