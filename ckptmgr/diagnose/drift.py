"""What is not as it was when a checkpoint was written: versions, code and configuration, graded. Pure functions.

*info*: worth knowing, and no reason why anything should fail. *warning*: it may change results, or explains a failure
that there is. *breaking*: something will not work, or is not tested at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptmgr.errors import EnvironmentDriftError

__all__ = ["TESTED_LIGHTNING", "Drift", "Grade", "drift_lines", "grade", "refuse_drift"]

Grade: TypeAlias = Literal["info", "warning", "breaking"]

TESTED_LIGHTNING = ((2, 5), (2, 7))
"""First tested version of Lightning, and the first one after the tested ones."""

_GRADES: tuple[Grade, ...] = ("breaking", "warning", "info")
_RELEASE = re.compile(r"\D{0,2}(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?")
# What explains most failures to load comes first.
_ORDER = (
    "format", "ckptmgr", "torch", "lightning", "pytorch-lightning", "config", "code", "git", "transformers",
    "torchdata", "scikit-learn", "skops", "tokenizers", "sentencepiece", "numpy", "pandas", "safetensors", "accelerate",
    "python", "cuda", "machine",
)  # fmt: skip
_LIGHTNINGS = ("lightning", "pytorch-lightning")
_NEEDED_TO_RESTORE = {"torchdata", "transformers", "tokenizers", "sentencepiece", "scikit-learn", "skops", *_LIGHTNINGS}
_Step: TypeAlias = Literal["major", "minor", "patch", "build"]
_STEPS: tuple[_Step, ...] = ("major", "minor", "patch")


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing that is not as it was.

    Attributes:
        name: A package, ``python``, ``cuda``, ``machine``, ``format``, ``git.commit``, ``config.KEY``.
        then: When the checkpoint was written; None where there was none.
        now: In this process; None where there is none.
        grade: How much it matters.
        why: Why it matters, in half a sentence.
    """

    name: str
    then: str | None
    now: str | None
    grade: Grade
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.then or 'none'} -> {self.now or 'none'}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a package is graded: by the part of its version that differs, for a newer one and for an older one."""

    newer: Mapping[_Step, tuple[Grade, str]]
    older: Mapping[_Step, tuple[Grade, str]]


def _rule(why: str, older: str | None = None, *, major: Grade, minor: Grade, older_minor: Grade | None = None) -> _Rule:
    newer: dict[_Step, tuple[Grade, str]] = {"major": (major, why), "minor": (minor, why)}
    behind: dict[_Step, tuple[Grade, str]] = {
        "major": (major, older or why),
        "minor": (older_minor or minor, older or why),
    }
    return _Rule(newer, behind)


_RULES: dict[str, _Rule] = {
    "ckptmgr": _rule(
        "a later version reads what an earlier one wrote",
        "an earlier version may not know what a later one wrote",
        major="info",
        minor="info",
        older_minor="warning",
    ),
    "torch": _rule(
        "kernels and defaults change between versions: numbers may differ in their last bits",
        "an older torch may lack the dtypes, layers and options of the one that wrote it",
        major="warning",
        minor="info",
        older_minor="warning",
    ),
    "lightning": _rule(
        "its loops and hooks change between versions",
        "its loops may not know what a later version wrote",
        major="warning",
        minor="info",
        older_minor="warning",
    ),
    "numpy": _rule(
        "the random streams of its generators may change between versions",
        "arrays pickled by NumPy 2 name modules that NumPy 1 has not",
        major="warning",
        minor="info",
    ),
    "python": _rule("pickled functions and hashes are those of one version", major="breaking", minor="info"),
    "safetensors": _rule("an older one may not know all dtypes", major="warning", minor="info"),
    "torchdata": _rule(
        "the state of a StatefulDataLoader is that of one version: the position in the data may not be taken back",
        major="warning",
        minor="warning",
    ),
    "transformers": _rule(
        "layers are renamed and defaults changed between versions",
        "an older one may not know the architecture, or a key of its configuration",
        major="warning",
        minor="info",
        older_minor="warning",
    ),
    "tokenizers": _rule(
        "normalisation may change between versions: compare golden samples",
        "an older one may not read tokenizer.json of a later one",
        major="warning",
        minor="info",
        older_minor="warning",
    ),
    "scikit-learn": _rule(
        "fitted estimators are those of one minor version: others may fail, or predict otherwise without a word",
        major="warning",
        minor="warning",
    ),
    "skops": _rule("an older one may not read what a later one wrote", major="warning", minor="info"),
    "pandas": _rule("dtypes and defaults change between major versions", major="warning", minor="info"),
    "cuda": _rule("other kernels: numbers may differ in their last bits", major="info", minor="info"),
}
_RULES["pytorch-lightning"] = _RULES["lightning"]
_OTHER = _rule("another version", major="info", minor="info")


def grade(then: Mapping[str, str], now: Mapping[str, str], reasons: Mapping[str, str] | None = None) -> list[Drift]:
    """Return everything that differs, what most likely explains a failure to load first.

    Args:
        then: As it was recorded: package → version, and beside those ``python``, ``cuda``, ``machine``, ``format``,
            ``git.commit``, ``git.changes``, ``code.CLASS`` (digest of its source) and ``config.KEY``. What was not
            recorded is not compared, but for ``config.``.
        now: The same of this process. A package that is not installed is not in it, nor a class that is not found.
        reasons: By name, why it matters, where more is known than the name tells.
    """
    names = dict.fromkeys((*then, *(name for name in now if name.startswith("config."))))
    drifts = []
    for name in names:
        before, after = then.get(name), now.get(name)
        if before != after:
            level, why = _judge(name, before, after)
            drifts.append(Drift(name, before, after, level, (reasons or {}).get(name, why)))
    return sorted(drifts, key=_weight)


def drift_lines(drifts: Iterable[Drift]) -> list[str]:
    """Return drifts as they are told once before training goes on: each with its grade; what is info in one line."""
    lines: list[str] = []
    infos: list[str] = []
    for drift in drifts:
        if drift.grade == "info":
            infos.append(str(drift))
        else:
            lines.append(f"{drift.grade}: {drift}: {drift.why}")
    return [*lines, *([f"info: {', '.join(infos)}"] if infos else [])]


def refuse_drift(drifts: Sequence[Drift], where: str) -> None:
    """Refuse to go on where anything that matters is not as it was.

    Args:
        drifts: As `grade` returns them.
        where: The checkpoint, for the message.

    Raises:
        EnvironmentDriftError: One of them is graded above info.
    """
    serious = [drift for drift in drifts if drift.grade != "info"]
    if serious:
        raise EnvironmentDriftError(
            f"the environment is not that of {where}",
            why="\n        ".join(f"{drift}: {drift.why}" for drift in serious),
            next="install the versions of then, or go on without strict_environment",
        )


def _judge(name: str, then: str | None, now: str | None) -> tuple[Grade, str]:
    if name.startswith("config."):
        return "warning", "the configuration is not the one that it was trained with"
    if name.startswith("git.") and now is None:
        return "info", "the code here is not under git"
    if name == "git.commit":
        return "warning", "the code is not the one that wrote it: classes, layers and defaults may have changed"
    if name == "git.changes":
        return "warning", "what is not committed is not what it was"
    if name.startswith("code.") and now is None:
        return "warning", "this class is not found here"
    if name.startswith("code."):
        return "warning", "the source of this class is not what it was"
    if name == "machine":
        return "info", "another kind of processor: numbers may differ in their last bits"
    if now is None:
        return _gone(name)
    if name == "format":
        return _format(then, now)
    if name in _LIGHTNINGS and not _is_tested(now):
        first, after = (".".join(map(str, version)) for version in TESTED_LIGHTNING)
        return "breaking", f"it is outside of the tested versions, from {first} to before {after}"
    step, is_older = _step(then or "", now)
    if name == "torch" and _release(then or "")[:2] < (2, 6) <= _release(now)[:2]:
        return "warning", "since 2.6 torch.load refuses pickled classes unless weights_only=False is given"
    rules = _RULES.get(name, _OTHER)
    found = (rules.older if is_older else rules.newer).get(step)
    return found or ("info", "another build of the same version" if step == "build" else "a version with corrections")


def _gone(name: str) -> tuple[Grade, str]:
    if name == "cuda":
        return "info", "state is free of devices, and goes where the live objects are; numbers may differ"
    if name == "torch":
        return "breaking", "nothing can be restored without it"
    if name in _NEEDED_TO_RESTORE:
        return "warning", "it is not installed, and what it has written may need it"
    return "info", "it is not installed"


def _format(then: str | None, now: str) -> tuple[Grade, str]:
    if _release(then or "") > _release(now):
        return "breaking", "it was written in a newer format than this ckptmgr reads: install a newer one"
    return "info", "older formats are read forever"


def _is_tested(version: str) -> bool:
    first, after = TESTED_LIGHTNING
    return first <= _release(version)[:2] < after


def _step(then: str, now: str) -> tuple[_Step, bool]:
    before, after = _release(then), _release(now)
    for step, one, other in zip(_STEPS, before, after, strict=True):
        if one != other:
            return step, other < one
    return "build", False


def _release(version: str) -> tuple[int, int, int]:
    found = _RELEASE.match(version)
    if found is None:
        return (0, 0, 0)
    major, minor, patch = (int(part or 0) for part in found.groups())
    return (major, minor, patch)


def _weight(drift: Drift) -> tuple[int, int, int, str]:
    steps = (*_STEPS, "build")
    step = steps.index(_step(drift.then or "", drift.now or "")[0]) if drift.now is not None else 0
    first = drift.name.partition(".")[0]
    place = _ORDER.index(first) if first in _ORDER else len(_ORDER)
    return (_GRADES.index(drift.grade), place, step, drift.name)
