"""The process group of a loop that several ranks run, for as long as they train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ckptmgr.errors import Preempted
from ckptmgr.launch.torchrun import PlaceInJob, place_in_job

__all__ = ["process_group"]


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the ranks that torchrun has started, unless the program has done so: over NCCL and gloo, or gloo alone.

    The group is there before anything is built: a model may be made of shards. With NCCL this rank's GPU is the current
    one. Without torchrun, or with one rank, nothing happens.
    """
    place, distributed = place_in_job(os.environ), torch.distributed
    if place is None or not distributed.is_available() or distributed.is_initialized():
        yield
        return
    distributed.init_process_group(_backend(place))
    try:
        yield
    except Preempted:
        distributed.destroy_process_group()
        raise
    except BaseException:
        # The others may be in the middle of a collective: taking the group down would wait for them.
        raise
    else:
        distributed.destroy_process_group()


def _backend(place: PlaceInJob) -> str:
    cuda = torch.cuda
    if cuda.is_available() and cuda.device_count() >= place.local_world_size and torch.distributed.is_nccl_available():
        cuda.set_device(place.local_rank)
        return "cpu:gloo,cuda:nccl"
    return "gloo"
