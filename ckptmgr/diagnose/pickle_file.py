"""Files that begin with a pickle: of `torch.save` before 1.6, of joblib, and plain ones."""

from __future__ import annotations

from typing import Any

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.byte_source import ByteSource, Part
from ckptmgr.diagnose.known_globals import verdict_of
from ckptmgr.diagnose.pickle_calls import itemsize
from ckptmgr.diagnose.pickle_facts import TORCH_MAGIC, PickleFacts
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.pickle_tree import recognise
from ckptmgr.diagnose.pickle_values import Dict, Object
from ckptmgr.diagnose.pickled import pickled_artifact
from ckptmgr.diagnose.plain_words import clean
from ckptmgr.words import format_nbytes

__all__ = ["looks_like_a_pickle", "pickle_file", "torch_tar"]

# What an old pickle, without a protocol number in front, can begin with.
_OLD_STARTS = b"()]}cilBCFGIJKLMNPSTUVX\x82\x83\x84\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x95\x96\x97"


def looks_like_a_pickle(head: bytes) -> bool:
    """Say whether the bytes may be a pickle, by the first ones; `pickle_file` then tells."""
    first = head[0] if head else 0
    return (head[1:2] <= b"\x05" and len(head) > 1) if first == 0x80 else first != 0 and first in _OLD_STARTS


def pickle_file(source: ByteSource, place: str) -> Artifact | None:
    """Describe a file that may be a pickle; None if it is none."""
    facts = describe_pickle(source)
    if facts.is_complete and facts.root == TORCH_MAGIC and type(facts.root) is int:
        return _legacy(source, place, facts)
    if facts.protocol is None and not _is_convincing(facts):
        return None
    is_little = facts.ninstructions < 3 and not facts.is_complete and not facts.is_ambiguous
    if facts.protocol is not None and is_little:
        return None
    container = "joblib" if facts.has_joblib_arrays else "pickle"
    problems = []
    rest = source.nbytes - facts.end
    details: dict[str, Any] = {}
    if facts.is_complete and rest > 0 and not facts.has_joblib_arrays:
        details["nbytes_behind"] = rest
        _follow_the_others(source, facts, details)
        if not details.get("npickles"):
            problems.append(f"{format_nbytes(rest)} of something else follow the pickle")
    return pickled_artifact(place, facts, container=container, nbytes=source.nbytes, problems=problems, details=details)


def _is_convincing(facts: PickleFacts) -> bool:
    """Say whether bytes without a protocol number are a pickle, and no text or number that looks like one."""
    if any(verdict_of(*name) == "dangerous" for name in facts.globals):
        return True
    return facts.is_complete and facts.ninstructions > 2 and isinstance(facts.root, (Dict, Object, list, tuple, str))


def _follow_the_others(source: ByteSource, facts: PickleFacts, details: dict[str, Any]) -> None:
    """Look at the pickles that follow the first one: a program that loads one after the other runs them too."""
    position, count = facts.end, 1
    while position < source.nbytes and count < 20:
        other = describe_pickle(source, start=position)
        if not other.is_complete and not other.globals:
            return
        facts.globals = {**other.globals, **facts.globals}
        count += 1
        details["npickles"] = count
        if not other.is_complete:
            return
        position = other.end


def _legacy(source: ByteSource, place: str, magic: PickleFacts) -> Artifact:
    """Describe a file of five pickles: magic, version, machine, object, keys of storages; then the storages."""
    found_globals = dict(magic.globals)
    problems: list[str] = []
    details: dict[str, Any] = {}
    versions: dict[str, str] = {}
    position = magic.end
    parts: list[PickleFacts] = []
    for number in range(4):
        facts = describe_pickle(source, start=position)
        found_globals.update(facts.globals)
        parts.append(facts)
        position = facts.end
        if not facts.is_complete:
            if number < 2:
                problems.append("its pickle: " + "; ".join(facts.problems))
            break
    if type(parts[0].root) is int:
        versions["torch protocol"] = str(parts[0].root)
    machine = parts[1].root if len(parts) > 1 else None
    if isinstance(machine, Dict):
        details["little_endian"] = machine.get("little_endian") is True
    objects = parts[2] if len(parts) > 2 else PickleFacts(problems=["it is cut off before the object"])
    objects.globals = {**found_globals, **objects.globals}
    found = recognise(objects.root)
    if len(parts) > 3 and parts[3].is_complete:
        keys = parts[3].root if isinstance(parts[3].root, list) else []
        storages = objects.storages
        needed = position
        for key in keys:
            storage = storages.get(key) if isinstance(key, str) else None
            needed += 8 + (storage.numel * (itemsize(storage.dtype) or 0) if storage is not None else 0)
        if needed > source.nbytes:
            problems.append(
                f"truncated: it ends after {source.nbytes} bytes; what it describes needs {needed}"
                f" ({format_nbytes(needed)})"
            )
    elif objects.is_complete:
        problems.append(f"truncated: the storages of its tensors are missing; it ends after {source.nbytes} bytes")
    return pickled_artifact(
        place,
        objects,
        container="torch-legacy",
        nbytes=source.nbytes,
        found=found,
        versions=versions,
        problems=problems,
        details=details,
    )


def torch_tar(source: ByteSource, place: str, members: dict[str, tuple[int, int]]) -> Artifact | None:
    """Describe a file of torch from before 0.2: a tar with the members ``pickle``, ``tensors`` and ``storages``.

    Args:
        source: The file.
        place: As it was named.
        members: Name → start and size of each file in the archive.
    """
    if not {"pickle", "storages", "tensors"} <= set(members):
        return None
    facts = describe_pickle(Part(source, *members["pickle"]))
    for name in ("storages", "tensors", "sys_info"):
        if name in members:
            other = describe_pickle(Part(source, *members[name]))
            facts.globals = {**other.globals, **facts.globals}
    return pickled_artifact(
        place,
        facts,
        container="torch-tar",
        nbytes=source.nbytes,
        problems=["a format of before 2017: torch.load reads it with weights_only=False alone"],
        details={"members": [clean(name) for name in list(members)[:20]]},
    )
