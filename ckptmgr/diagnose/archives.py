"""Zip archives that torch did not write: Keras, NumPy, skops, or anything; and other packed files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource
from ckptmgr.diagnose.global_uses import global_uses
from ckptmgr.diagnose.hdf5_file import keras_version_notes, read_hdf5
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.pickle_calls import numpy_dtype
from ckptmgr.diagnose.pickle_facts import PickleFacts
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.plain_words import clean, plural
from ckptmgr.diagnose.small_json import bounded_json
from ckptmgr.diagnose.zip_records import Archive, BadZipError, record_source
from ckptmgr.words import format_nbytes

__all__ = ["NPY_MAGIC", "npy_file", "tar_members", "zip_file"]

NPY_MAGIC = b"\x93NUMPY"
_MAX_ARRAYS = 5_000
_DESCR = re.compile(r"'descr':\s*(?:'([^']{1,40})'|(\[))")
_SHAPE = re.compile(r"'shape':\s*\(([\d,\s]{0,400})\)")


def zip_file(source: ByteSource, place: str, archive: Archive) -> Artifact:
    """Describe an archive by what is in it."""
    names = archive.records
    if "config.json" in names and "metadata.json" in names and any(name.endswith("weights.h5") for name in names):
        return _keras(source, place, archive)
    if names and all(name.endswith(".npy") for name in names):
        return _npz(source, place, archive)
    if "schema.json" in names and isinstance(_json(source, archive, "schema.json"), dict):
        schema = _json(source, archive, "schema.json")
        if "_skops_version" in schema or "__loader__" in schema:
            return _skops(source, place, archive, schema)
    return Artifact(
        place=place,
        kind="zip",
        title=f"a zip archive of {plural(len(names), 'file')}",
        certainty="certain",
        nbytes=source.nbytes,
        contents=_contents(archive),
        problems=archive.problems,
        advice=("unpack it, and look at what is in it",),
    )


def _contents(archive: Archive) -> dict[str, str]:
    return {clean(name): format_nbytes(record.nbytes) for name, record in list(archive.records.items())[:200]}


def _json(source: ByteSource, archive: Archive, name: str) -> Any:
    record = archive.records.get(name)
    if record is None or record.nbytes > 16 << 20:
        return None
    try:
        content = record_source(source, record)
        return bounded_json(content.read(0, content.nbytes))
    except (BadZipError, ValueError):
        return None


def _keras(source: ByteSource, place: str, archive: Archive) -> Artifact:
    metadata = _json(source, archive, "metadata.json")
    config = _json(source, archive, "config.json")
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    version = clean(version, 40) if isinstance(version, str) else None
    problems = list(archive.problems)
    tensors: tuple[TensorFacts, ...] | None = None
    name = next((name for name in archive.records if name.endswith("weights.h5")), "")
    try:
        weights = read_hdf5(record_source(source, archive.records[name]))
        tensors = tuple(weights.datasets) if weights.datasets is not None else None
        problems += weights.problems
    except BadZipError as error:
        problems.append(str(error))
    text = str(config) if isinstance(config, dict) else ""
    if "'__lambda__'" in text or "'class_name': 'Lambda'" in text:
        problems.append("it holds a Lambda layer, which is Python code: loading it with safe_mode=False runs that")
    if not isinstance(config, dict):
        problems.append("its config.json cannot be read")
    return Artifact(
        place=place,
        kind="keras-zip",
        title="a Keras model" + (f", written by Keras {version}" if version else ""),
        certainty="certain",
        nbytes=source.nbytes,
        versions={"keras": version} if version else {},
        tensors=tensors,
        contents=_contents(archive),
        problems=tuple(problems),
        advice=(f"keras.saving.load_model({place!r})", *keras_version_notes(version)),
        details={
            "class": clean(str(config.get("class_name"))) if isinstance(config, dict) else None,
            "date_saved": clean(str(metadata.get("date_saved"))) if isinstance(metadata, dict) else None,
        },
    )


def _skops(source: ByteSource, place: str, archive: Archive, schema: Mapping[str, Any]) -> Artifact:
    version = schema.get("_skops_version")
    of = f"{schema.get('__module__', '')}.{schema.get('__class__', '')}".strip(".")
    versions = {"skops": clean(version, 40)} if isinstance(version, str) else {}
    types: set[str] = set()
    pending: list[Any] = [schema]
    while pending and len(types) < 500:
        node = pending.pop()
        if isinstance(node, dict):
            if isinstance(node.get("__module__"), str) and isinstance(node.get("__class__"), str):
                types.add(clean(f"{node['__module__']}.{node['__class__']}"))
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    return Artifact(
        place=place,
        kind="skops",
        title=f"a skops file of an object of class {clean(of)}",
        certainty="certain",
        nbytes=source.nbytes,
        versions=versions,
        contents=_contents(archive),
        problems=archive.problems,
        advice=(
            f"skops.io.get_untrusted_types(file={place!r}), then skops.io.load({place!r}, trusted=[…])",
            compared("skops", versions.get("skops"), installed_version("skops")),
        ),
        details={"types": sorted(types)},
    )


def _npz(source: ByteSource, place: str, archive: Archive) -> Artifact:
    tensors: list[TensorFacts] = []
    problems = list(archive.problems)
    found: dict[tuple[str, str], str] = {}
    has_objects, is_ambiguous = False, False
    for name, record in list(archive.records.items())[:_MAX_ARRAYS]:
        try:
            content = record_source(source, record)
        except BadZipError as error:
            problems.append(str(error))
            continue
        fact, start, problem = _npy(content, clean(name.removesuffix(".npy")))
        if problem:
            problems.append(problem)
        if fact is not None:
            tensors.append(fact)
            if fact.dtype == "object":
                has_objects = True
                facts = describe_pickle(content, start=start)
                found = {**found, **facts.globals}
                is_ambiguous = is_ambiguous or facts.is_ambiguous
    return _arrays(source, place, "numpy-npz", tensors, problems, found, has_objects, is_ambiguous)


def npy_file(source: ByteSource, place: str) -> Artifact:
    """Describe a file of one NumPy array."""
    fact, start, problem = _npy(source, "array")
    has_objects = fact is not None and fact.dtype == "object"
    facts = describe_pickle(source, start=start) if has_objects else PickleFacts()
    tensors, problems = [fact] if fact is not None else [], [problem] if problem else []
    return _arrays(source, place, "numpy-npy", tensors, problems, facts.globals, has_objects, facts.is_ambiguous)


def _arrays(
    source: ByteSource,
    place: str,
    kind: str,
    tensors: list[TensorFacts],
    problems: list[str],
    found: Mapping[tuple[str, str], str],
    has_objects: bool,
    is_ambiguous: bool,
) -> Artifact:
    uses = global_uses(found)
    if has_objects:
        problems.append("it holds Python objects as a pickle: numpy.load reads them with allow_pickle=True alone")
    if is_ambiguous or any(use.verdict == "dangerous" for use in uses):
        problems.insert(0, "unpickling it would run code: do not load it with allow_pickle=True")
    return Artifact(
        place=place,
        kind=kind,
        title=f"a NumPy file of {plural(len(tensors), 'array')}",
        certainty="certain",
        nbytes=source.nbytes,
        tensors=tuple(tensors),
        globals=uses,
        problems=tuple(problems),
        advice=(f"numpy.load({place!r})",),
    )


def _npy(source: ByteSource, name: str) -> tuple[TensorFacts | None, int, str | None]:
    """Return the array, where its elements start, and what is wrong with it."""
    head = source.read(0, 12)
    size = 2 if head[6:7] == b"\x01" else 4
    start = 8 + size + int.from_bytes(head[8 : 8 + size], "little")
    if not head.startswith(NPY_MAGIC) or start > 1 << 16:
        return None, start, f"{name!r} is no array"
    text = source.read(8 + size, start - 8 - size).decode("latin-1")
    descr, shape = _DESCR.search(text), _SHAPE.search(text)
    if descr is None or shape is None:
        return None, start, f"the description of {name!r} is damaged"
    dtype = "structured" if descr.group(2) else numpy_dtype(descr.group(1))
    sizes = tuple(int(part) for part in shape.group(1).split(",") if part.strip().isdecimal())
    digits = re.search(r"\d+$", descr.group(1) or "")
    needed = int(digits.group()[:9]) if digits and dtype != "object" else 0
    for extent in sizes:
        needed *= extent
    problem = None
    if start + needed > source.nbytes:
        problem = f"truncated: {name!r} needs {start + needed} bytes, {source.nbytes} are there"
    return TensorFacts(name, dtype, sizes), start, problem


def tar_members(source: ByteSource, *, limit: int = 10_000) -> dict[str, tuple[int, int]] | None:
    """Return the files of a tar archive, name → start and size in bytes; None if it is none."""
    members: dict[str, tuple[int, int]] = {}
    position = 0
    while len(members) < limit:
        header = source.read(position, 512)
        if len(header) < 512 or not header.strip(b"\0"):
            break
        try:
            total = int(header[148:156].strip(b" \0") or b"-1", 8)
            nbytes = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            total, nbytes = -1, 0
        if total != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            break
        name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
        if header[156:157] in b"0\0":
            members[name] = (position + 512, nbytes)
        position += 512 + -(-nbytes // 512) * 512
    return members or None
