"""What to keep, as it is typed on a command line: ``--keep-best val_acc:3:max --keep-within 7d``."""

from __future__ import annotations

from dataclasses import dataclass

from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.policy.arguments import Mode
from ckptmgr.policy.budget import Budget
from ckptmgr.policy.intervals import parse_interval
from ckptmgr.policy.retention import (
    CheckpointFacts,
    KeepAll,
    KeepBest,
    KeepEveryEpochs,
    KeepEverySteps,
    KeepLast,
    KeepTagged,
    KeepWithin,
    RetentionPolicy,
    Union,
)
from ckptmgr.policy.triggers import EveryEpochs, EverySteps
from ckptmgr.run.catalog import Catalog

__all__ = ["Keep", "chosen_policies"]

_DEFAULT_LAST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The options, as they were typed."""

    last: int | None = None
    best: tuple[str, ...] = ()
    every: str | None = None
    within: str | None = None
    budget: str | None = None


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the run says about metrics: the monitored one, and all that have a value."""

    monitor: str | None
    mode: Mode | None
    names: frozenset[str]


def chosen_policies(catalog: Catalog, keep: Keep) -> tuple[RetentionPolicy, str]:
    """Return the policy that options describe, and the same in words.

    Raises:
        UsageError: An option cannot be meant as it was typed, or names a metric that no checkpoint has: then nothing
            would be kept for being best.
    """
    measured = _measure(catalog)
    policies: list[RetentionPolicy] = []
    words: list[str] = []
    bests = [_read_best(text, measured) for text in keep.best]
    is_default = keep.last is None and not bests and keep.every is None and keep.within is None
    if is_default and measured.monitor is not None:
        bests = [KeepBest(1, measured.monitor, measured.mode or "min")]
    for best in bests:
        policies.append(best)
        words.append(f"best {best.k} by {best.metric} ({best.mode})")
    if keep.last is not None or (is_default and keep.budget is None):
        last = KeepLast(_DEFAULT_LAST if keep.last is None else keep.last)
        policies.append(last)
        words.append(f"last {last.k}")
    elif is_default:
        policies.append(KeepAll())
        words.append("the newest")
    if keep.every is not None:
        every = _read_every(keep.every)
        policies.append(every)
        unit = "step" if isinstance(every, KeepEverySteps) else "epoch"
        words.append(f"every {unit}" if every.n == 1 else f"every {every.n} {unit}s")
    if keep.within is not None:
        policies.append(KeepWithin(keep.within))
        words.append(f"within {keep.within} of the newest")
    policy: RetentionPolicy = Union(*policies, KeepTagged())
    text = ", ".join([*words, "what is tagged"])
    if keep.budget is not None:
        size = keep.budget if not keep.budget.strip().isdecimal() else int(keep.budget)
        policy, text = Budget(size, *policies), f"{text}; as far as it fits into {keep.budget}"
    return policy, f"{text} (the default)" if is_default and keep.budget is None else text


def _measure(catalog: Catalog) -> _Measured:
    newest = next(catalog.newest_first(), None)
    facts: list[CheckpointFacts] = []
    for id in catalog.on_line:
        try:
            facts.append(catalog.facts(id))
        except CkptmgrError:
            continue
    names = frozenset(name for known in facts for name in known.metrics)
    return _Measured(newest.monitor if newest else None, newest.mode if newest else None, names)


def _read_best(text: str, measured: _Measured) -> KeepBest:
    metric, count, mode = _split_best(text)
    if metric not in measured.names:
        known = ", ".join(sorted(measured.names)) or "none"
        raise UsageError(
            f"--keep-best {text}: no checkpoint on the line has a value of {metric!r}",
            why=f"the best ones would be deleted; metrics that have a value: {known}",
            next="it is METRIC, METRIC:K or METRIC:K:MODE, and MODE is min or max" if ":" in metric else None,
        )
    if mode is None and metric == measured.monitor:
        mode = measured.mode
    if mode is None:
        raise UsageError(
            f"--keep-best {text} does not say which way is better",
            why="the run does not monitor this metric",
            next=f"--keep-best {metric}:{count}:min, or max",
        )
    return KeepBest(count, metric, mode)


def _split_best(text: str) -> tuple[str, int, Mode | None]:
    # From the right: a metric's name may hold colons.
    rest, mode, count = text, None, 1
    head, colon, tail = rest.rpartition(":")
    if colon and tail in ("min", "max"):
        rest, mode = head, tail
        head, colon, tail = rest.rpartition(":")
    if colon and tail.isdecimal():
        rest, count = head, int(tail)
    if not rest or rest.isdecimal():
        raise UsageError(
            f"--keep-best {text} names no metric",
            why="it is METRIC, METRIC:K or METRIC:K:MODE",
            next="for example --keep-best val_acc:3:max",
        )
    return rest, count, mode  # type: ignore[return-value]


def _read_every(text: str) -> KeepEverySteps | KeepEveryEpochs:
    if text.strip().isdecimal():
        return KeepEverySteps(int(text))
    interval = parse_interval(text)
    if isinstance(interval, EverySteps):
        return KeepEverySteps(interval.n)
    if isinstance(interval, EveryEpochs):
        return KeepEveryEpochs(interval.n)
    raise UsageError(
        f"--keep-every {text} is a time",
        why="it counts steps or epochs",
        next="--keep-every 1000, --keep-every 10ep, or --keep-within for an age",
    )
