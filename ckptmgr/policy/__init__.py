"""When to save and what to keep: pure functions of records, without a clock and without I/O."""

from __future__ import annotations

from ckptmgr.policy.arguments import Mode
from ckptmgr.policy.retention import (
    CheckpointFacts,
    KeepAll,
    KeepBest,
    KeepEverySteps,
    KeepLast,
    KeepTagged,
    RetentionPlan,
    RetentionPolicy,
    Union,
    best,
    plan,
)
from ckptmgr.policy.triggers import (
    AnyOf,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    MetricSpan,
    Moment,
    OnException,
    OnImprovement,
    OnSignal,
    Trigger,
    widen_spans,
)

__all__ = [
    "AnyOf",
    "CheckpointFacts",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "KeepAll",
    "KeepBest",
    "KeepEverySteps",
    "KeepLast",
    "KeepTagged",
    "MetricSpan",
    "Mode",
    "Moment",
    "OnException",
    "OnImprovement",
    "OnSignal",
    "RetentionPlan",
    "RetentionPolicy",
    "Trigger",
    "Union",
    "best",
    "plan",
    "widen_spans",
]
