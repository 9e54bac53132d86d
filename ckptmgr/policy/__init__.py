"""When to save and what to keep: pure functions of records, without a clock and without I/O."""

from __future__ import annotations

from ckptmgr.policy.arguments import Mode
from ckptmgr.policy.budget import Budget
from ckptmgr.policy.intervals import AnyOf, Triggers, parse_interval
from ckptmgr.policy.retention import (
    CheckpointFacts,
    ExplainsDrops,
    KeepAll,
    KeepBest,
    KeepEveryEpochs,
    KeepEverySteps,
    KeepLast,
    KeepTagged,
    KeepWithin,
    RetentionPlan,
    RetentionPolicy,
    Union,
    best,
    plan,
)
from ckptmgr.policy.triggers import (
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
    "Budget",
    "CheckpointFacts",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "ExplainsDrops",
    "KeepAll",
    "KeepBest",
    "KeepEveryEpochs",
    "KeepEverySteps",
    "KeepLast",
    "KeepTagged",
    "KeepWithin",
    "MetricSpan",
    "Mode",
    "Moment",
    "OnException",
    "OnImprovement",
    "OnSignal",
    "RetentionPlan",
    "RetentionPolicy",
    "Trigger",
    "Triggers",
    "Union",
    "best",
    "parse_interval",
    "plan",
    "widen_spans",
]
