"""Directories of PyTorch's distributed checkpoint (DCP): ``.metadata`` and one file per rank."""

from __future__ import annotations

import shlex
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import Bytes
from ckptmgr.diagnose.folder import Folder, is_inside
from ckptmgr.diagnose.global_uses import global_uses
from ckptmgr.diagnose.model_directories import contents_of
from ckptmgr.diagnose.pickle_calls import shape_of
from ckptmgr.diagnose.pickle_facts import PickleFacts
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.pickle_values import Dict, Global, Object, Symbol
from ckptmgr.diagnose.plain_words import clean, listed, plural

__all__ = ["dcp_directory", "is_dcp", "read_dcp"]

_MAX_METADATA_NBYTES = 256 << 20


def is_dcp(folder: Folder, prefix: str = "") -> bool:
    """Say whether a DCP checkpoint lies in a folder, or below it at ``prefix``, whole or not."""
    return any(
        name.startswith(prefix)
        and "/" not in name[len(prefix) :]
        and (name[len(prefix) :] == ".metadata" or name.endswith(".distcp"))
        for name in folder.files
    )


def read_dcp(folder: Folder, prefix: str = "") -> tuple[list[TensorFacts], dict[str, str], PickleFacts, list[str]]:
    """Read the metadata of a DCP checkpoint.

    Returns:
        Tensors, values that are no tensors by name, the metadata's pickle, and problems.
    """
    data = folder.data(f"{prefix}.metadata", limit=_MAX_METADATA_NBYTES)
    if data is None:
        why = "cannot be read" if f"{prefix}.metadata" in folder.files else "is missing: the save was not finished"
        return [], {}, PickleFacts(is_complete=True), [f"{prefix}.metadata {why}"]
    facts = describe_pickle(Bytes(data))
    problems = [f"{prefix}.metadata: {problem}" for problem in facts.problems]
    root = _state(facts.root)
    tensors: list[TensorFacts] = []
    values: dict[str, str] = {}
    entries = root.get("state_dict_metadata") if root is not None else None
    if root is None or not isinstance(entries, Dict):
        return [], {}, facts, problems or [f"{prefix}.metadata is not the metadata of a DCP checkpoint"]
    for name, entry in entries.items():
        fact = _tensor(clean(name, 300), entry)
        if fact is not None:
            tensors.append(fact)
        elif len(values) < 200:
            values[clean(name)] = "a value, pickled"
    files, spans = _files(root.get("storage_data"))
    outside = [name for name in files if not is_inside(name)]
    if outside:
        problems.append(f"its metadata names {listed(outside)}, outside of the directory: not looked at")
    missing = [name for name in files if is_inside(name) and prefix + name not in folder.files]
    if missing:
        problems.append(f"files of it are missing: {listed(missing)}")
    for name, stop in spans.items():
        nbytes = folder.files.get(prefix + name)
        if nbytes is not None and nbytes < stop:
            problems.append(f"{clean(name)} is truncated: it ends after {nbytes} bytes, and should have {stop}")
    return tensors, values, facts, problems[:50]


def _state(value: Symbol) -> Dict | None:
    return value.state if isinstance(value, Object) and isinstance(value.state, Dict) else None


def _tensor(name: str, entry: Symbol) -> TensorFacts | None:
    state = _state(entry)
    if state is None or not isinstance(entry, Object) or not entry.of.endswith(".TensorStorageMetadata"):
        return None
    shape = shape_of(state.get("size"))
    properties = state.get("properties")
    parts = properties.state if isinstance(properties, Object) else None
    if isinstance(parts, Dict):
        parts = (parts.get("dtype"),)
    dtype = parts[0].name.removeprefix("torch.") if isinstance(parts, tuple) and _is_global(parts) else "unknown"
    return None if shape is None else TensorFacts(name, clean(dtype, 40), shape)


def _is_global(parts: tuple[Any, ...]) -> bool:
    return bool(parts) and isinstance(parts[0], Global)


def _files(entries: Symbol) -> tuple[list[str], dict[str, int]]:
    """Return the files that hold the shards, and how long each has to be at least."""
    spans: dict[str, int] = {}
    for _, entry in entries.pairs if isinstance(entries, Dict) else ():
        state = _state(entry)
        path = state.get("relative_path") if state is not None else None
        if state is not None and isinstance(path, str) and len(spans) < 100_000:
            offset, length = state.get("offset"), state.get("length")
            stop = offset + length if type(offset) is int and type(length) is int else 0
            spans[path] = max(spans.get(path, 0), stop)
    return list(spans), spans


def dcp_directory(folder: Folder, prefix: str = "", *, title: str | None = None) -> Artifact:
    """Describe a DCP checkpoint.

    Args:
        folder: Where it lies, with `is_dcp`.
        prefix: The part of the folder that it lies in, with a slash at its end.
        title: What it is, where more is known than that it is one of DCP.
    """
    tensors, values, facts, problems = read_dcp(folder, prefix)
    uses = global_uses(facts.globals)
    if any(use.verdict == "dangerous" for use in uses):
        names = listed([use.name for use in uses if use.verdict == "dangerous"])
        problems.insert(0, f"unpickling its .metadata would run {names}: do not load it")
    is_dangerous = facts.is_ambiguous or any(use.verdict == "dangerous" for use in uses)
    is_lightning = "meta.pt" in folder.files and not prefix
    nfiles = sum(name.endswith(".distcp") for name in folder.files)
    what = title or (
        "a sharded checkpoint of Lightning" if is_lightning else "a distributed checkpoint of PyTorch (DCP)"
    )
    place = folder.place if not prefix else folder.place_of(prefix.rstrip("/"))
    typed = shlex.quote(place)
    advice = [] if problems else [f"ckptmgr import {typed} RUN_DIR"]
    advice.append(f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {typed} all.pt")
    if is_dangerous:
        advice = ["get it again from where it comes from"]
    return Artifact(
        place=folder.place,
        kind="dcp",
        title=f"{what} of {plural(len(tensors), 'tensor')} in {plural(nfiles, 'file')}",
        certainty="certain",
        nbytes=folder.nbytes,
        tensors=tuple(tensors),
        contents={**values, **contents_of(folder)},
        globals=uses,
        problems=(*problems, *folder.problems),
        advice=tuple(advice),
        details={"is_lightning": is_lightning},
    )
