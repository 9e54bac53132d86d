"""The ranks of a job as PyTorch has started them, and sharded state through PyTorch's own planners.

Names are loaded when they are first used: `torch.distributed.checkpoint` takes its time to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptmgr.topology.dcp_reader import CheckpointReader
    from ckptmgr.topology.dcp_writer import CheckpointWriter
    from ckptmgr.topology.planners import LoadPlanner, SavePlanner

_HOME_OF = {
    "CheckpointReader": "ckptmgr.topology.dcp_reader",
    "CheckpointWriter": "ckptmgr.topology.dcp_writer",
    "LoadPlanner": "ckptmgr.topology.planners",
    "SavePlanner": "ckptmgr.topology.planners",
}

__all__ = ["CheckpointReader", "CheckpointWriter", "LoadPlanner", "SavePlanner"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptmgr.topology' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value
