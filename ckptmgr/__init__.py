"""ckptmgr: training that cannot be lost, and a model that loads as it was.

Names are loaded when they are first used: importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptmgr.checkpointer import Checkpointer
    from ckptmgr.errors import (
        CheckpointNotFoundError,
        CkptmgrError,
        CorruptCheckpointError,
        Fenced,
        GoldenMismatchError,
        Preempted,
        SaveFailedError,
        StateMismatchError,
        UnsupportedStateError,
        UsageError,
    )
    from ckptmgr.golden.samples import Golden
    from ckptmgr.inference import Inference, load_inference
    from ckptmgr.instantiate.allow_list import allow_targets, factory
    from ckptmgr.lightning import CheckpointManager
    from ckptmgr.policy.budget import Budget
    from ckptmgr.policy.intervals import AnyOf
    from ckptmgr.policy.retention import (
        KeepAll,
        KeepBest,
        KeepEveryEpochs,
        KeepEverySteps,
        KeepLast,
        KeepTagged,
        KeepWithin,
        Union,
    )
    from ckptmgr.policy.triggers import (
        EveryEpochs,
        EverySeconds,
        EverySteps,
        OnException,
        OnImprovement,
        OnSignal,
    )
    from ckptmgr.preprocess.kinds import register_kind
    from ckptmgr.state.elastic_sampler import ElasticSampler
    from ckptmgr.state.handlers import register_handler
    from ckptmgr.state.per_sample_seed import PerSampleSeed
    from ckptmgr.state.selection import Selection

__version__ = "0.1.0"

_HOMES = {
    "ckptmgr.checkpointer": ["Checkpointer"],
    "ckptmgr.errors": [
        "CheckpointNotFoundError",
        "CkptmgrError",
        "CorruptCheckpointError",
        "Fenced",
        "GoldenMismatchError",
        "Preempted",
        "SaveFailedError",
        "StateMismatchError",
        "UnsupportedStateError",
        "UsageError",
    ],
    "ckptmgr.golden.samples": ["Golden"],
    "ckptmgr.inference": ["Inference", "load_inference"],
    "ckptmgr.instantiate.allow_list": ["allow_targets", "factory"],
    "ckptmgr.lightning": ["CheckpointManager"],
    "ckptmgr.policy.budget": ["Budget"],
    "ckptmgr.policy.intervals": ["AnyOf"],
    "ckptmgr.policy.retention": [
        "KeepAll",
        "KeepBest",
        "KeepEveryEpochs",
        "KeepEverySteps",
        "KeepLast",
        "KeepTagged",
        "KeepWithin",
        "Union",
    ],
    "ckptmgr.policy.triggers": [
        "EveryEpochs",
        "EverySeconds",
        "EverySteps",
        "OnException",
        "OnImprovement",
        "OnSignal",
    ],
    "ckptmgr.preprocess.kinds": ["register_kind"],
    "ckptmgr.state.elastic_sampler": ["ElasticSampler"],
    "ckptmgr.state.handlers": ["register_handler"],
    "ckptmgr.state.per_sample_seed": ["PerSampleSeed"],
    "ckptmgr.state.selection": ["Selection"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnyOf",
    "Budget",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CkptmgrError",
    "CorruptCheckpointError",
    "ElasticSampler",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "Fenced",
    "Golden",
    "GoldenMismatchError",
    "Inference",
    "KeepAll",
    "KeepBest",
    "KeepEveryEpochs",
    "KeepEverySteps",
    "KeepLast",
    "KeepTagged",
    "KeepWithin",
    "OnException",
    "OnImprovement",
    "OnSignal",
    "PerSampleSeed",
    "Preempted",
    "SaveFailedError",
    "Selection",
    "StateMismatchError",
    "Union",
    "UnsupportedStateError",
    "UsageError",
    "__version__",
    "allow_targets",
    "factory",
    "load_inference",
    "register_handler",
    "register_kind",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptmgr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
