"""What a look at a file or a directory tells about it, as frozen records. Nothing of it was executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

__all__ = ["Artifact", "Certainty", "GlobalUse", "TensorFacts", "is_damaged"]

_DAMAGED_KINDS: Final = ("torch-truncated", "zip-truncated", "empty", "zeros")
_DAMAGED: Final = re.compile(
    r"\b(truncated|damaged|cut off|not intact|header cannot be read)\b"
    r"|\b(shard is|shards are|files of it are|records of tensors are) missing"
)

Certainty: TypeAlias = Literal["certain", "likely", "unknown"]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor of an artifact, without its elements.

    Attributes:
        name: As a model would know it, such as ``layers.0.weight``; of a Lightning checkpoint its key in
            ``state_dict``.
        dtype: In torch's words, such as ``float32``; what is no dtype of torch keeps its own name.
        shape: Sizes of its dimensions, in elements.
        tied_to: Name of the tensor whose memory it shares, where the artifact says so.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied_to: str | None = None


@dataclass(frozen=True, slots=True)
class GlobalUse:
    """A class or function that unpickling the artifact would import.

    Attributes:
        name: ``module.qualified_name``.
        verdict: ``plain``: PyTorch's restricted loading takes it. ``code``: somebody's class or function, which only
            loads where it can be imported as it was. ``dangerous``: it runs commands, reads files or evaluates code.
        found: Where it was looked for, or why it is not importable here; looked up without importing it.
    """

    name: str
    verdict: Literal["plain", "code", "dangerous"]
    found: str | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or directory, recognised.

    Attributes:
        place: As it was named.
        kind: Stable short word, such as ``lightning-checkpoint``; `sniff.KINDS` lists them.
        title: What it is, in a few words of a sentence.
        certainty: How sure that is.
        nbytes: Size of the file, or of all files of the directory.
        versions: Frameworks and formats that wrote it, as far as it says so: name → version.
        tensors: The model's weights; None where they cannot be listed without the tool that wrote it.
        contents: Names of what else it holds (top-level keys of a dict, files of a directory) → a few words about it.
        globals: What unpickling it would import.
        problems: What is wrong with it, the worst first: truncated, a part missing, a pointer instead of the content.
        advice: What reads it: the command or the code, one per line.
        details: Further facts for ``--json``.
    """

    place: str
    kind: str
    title: str
    certainty: Certainty
    nbytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[TensorFacts, ...] | None = None
    contents: Mapping[str, str] = field(default_factory=dict)
    globals: tuple[GlobalUse, ...] = ()
    problems: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def is_damaged(artifact: Artifact) -> bool:
    """Say whether bytes of it are missing, or not those that were written."""
    # Names of classes are whatever their authors liked.
    names = tuple(f"{use.name}:" for use in artifact.globals)
    told = (problem for problem in artifact.problems if not problem.startswith(names))
    return artifact.kind in _DAMAGED_KINDS or any(_DAMAGED.search(problem) for problem in told)
