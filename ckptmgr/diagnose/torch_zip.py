"""Files of `torch.save` since 1.6, of TorchScript and of `torch.export`: zip archives with a pickle in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.byte_source import ByteSource, Part
from ckptmgr.diagnose.pickle_calls import itemsize
from ckptmgr.diagnose.pickle_facts import PickleFacts
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.pickle_tree import Recognised, recognise, tensor_facts, tensors_in
from ckptmgr.diagnose.pickle_values import Dict, Object, Symbol
from ckptmgr.diagnose.pickled import pickled_artifact, storages_of
from ckptmgr.diagnose.plain_words import clean, listed
from ckptmgr.diagnose.zip_records import (
    Archive,
    BadZipError,
    ZipRecord,
    checksum_of,
    record_source,
    scan_records,
)
from ckptmgr.words import format_nbytes

__all__ = ["root_of", "truncated_torch_zip", "zip_of_torch"]

_SMALL_NBYTES = 4096
_MAX_PICKLES = 20


def root_of(archive: Archive) -> str | None:
    """Return the folder of an archive of torch, with a slash at its end; None for any other archive."""
    first = next(iter(archive.records), "")
    folder = first.partition("/")[0] + "/"
    for prefix in (folder, ""):
        has_pickle = f"{prefix}data.pkl" in archive.records
        is_exported = f"{prefix}archive_format" in archive.records
        is_package = f"{prefix}.data/extern_modules" in archive.records
        if has_pickle or is_exported or is_package:
            return prefix
    return None


def zip_of_torch(source: ByteSource, place: str, archive: Archive, *, check_nbytes: int) -> Artifact:
    """Describe an archive that torch wrote.

    Args:
        source: The file.
        place: As it was named.
        archive: Its records, with `root_of` not None.
        check_nbytes: How many bytes may be read in order to compare checksums.
    """
    root = root_of(archive) or ""
    records = {name.removeprefix(root): record for name, record in archive.records.items()}
    versions, details = _versions(source, records)
    problems = list(archive.problems)
    if f"{root}data.pkl" not in archive.records or "archive_format" in records:
        return _without_pickle(place, source, records, versions, problems)
    problems += _damaged(source, archive, check_nbytes, details)
    facts = _pickle(source, records["data.pkl"], problems)
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        return _script(place, source, facts, versions, problems, details)
    for name, record in list(archive.records.items())[: 100 * _MAX_PICKLES]:
        if name.endswith(".pkl") and record is not records["data.pkl"] and details.setdefault("pickles", 1) < 20:
            details["pickles"] += 1
            other = _pickle(source, record, problems)
            facts.globals = {**other.globals, **facts.globals}
            problems.append(f"it holds a second pickle: {clean(name)}")
    found = recognise(facts.root)
    problems += _missing_storages(records, found)
    return pickled_artifact(
        place,
        facts,
        container="torch-zip",
        nbytes=source.nbytes,
        found=found,
        versions=versions,
        problems=problems,
        details=details,
    )


def truncated_torch_zip(source: ByteSource, place: str) -> Artifact | None:
    """Describe an archive of torch whose end is missing; None if it is another archive."""
    scanned = scan_records(source)
    start = next((start for name, start in scanned if name.rpartition("/")[2] == "data.pkl"), None)
    if start is None:
        return None
    facts = describe_pickle(Part(source, start))
    found = recognise(facts.root)
    expected = start + facts.end + sum(_nbytes(storage) for storage in storages_of(found).values())
    problem = f"truncated: it has no central directory, and ends after {source.nbytes} bytes"
    if facts.is_complete and expected > source.nbytes:
        problem += f"; what it describes needs more than {expected} ({format_nbytes(expected)})"
    artifact = pickled_artifact(
        place, facts, container="torch-zip", nbytes=source.nbytes, found=found, problems=[problem]
    )
    return dataclasses.replace(
        artifact,
        kind="torch-truncated",
        title=f"the beginning of {artifact.title}" if facts.is_complete else "the beginning of a file of torch.save",
        certainty="likely",
        advice=("the download or the save was cut off: copy or download it again, and compare the sizes",),
        details={**artifact.details, "kind_of_the_whole": artifact.kind, "expected_nbytes_at_least": expected},
    )


def _versions(source: ByteSource, records: Mapping[str, ZipRecord]) -> tuple[dict[str, str], dict[str, Any]]:
    versions: dict[str, str] = {}
    details: dict[str, Any] = {}
    for name, label in (("version", "torch archive"), (".format_version", "torch format"), ("byteorder", "byteorder")):
        text = _text(source, records.get(name))
        if text is not None and name == "byteorder":
            details["byteorder"] = text
        elif text is not None:
            versions[label] = text
    return versions, details


def _text(source: ByteSource, record: ZipRecord | None) -> str | None:
    if record is None or record.nbytes > _SMALL_NBYTES:
        return None
    try:
        return clean(record_source(source, record).read(0, _SMALL_NBYTES).decode("utf-8", "replace").strip(), 40)
    except BadZipError:
        return None


def _pickle(source: ByteSource, record: ZipRecord, problems: list[str]) -> PickleFacts:
    try:
        return describe_pickle(record_source(source, record))
    except BadZipError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return PickleFacts()


def _damaged(source: ByteSource, archive: Archive, check_nbytes: int, details: dict[str, Any]) -> list[str]:
    """Compare checksums, the small records first, as far as the bytes that may be read reach."""
    left, damaged, unchecked = check_nbytes, [], 0
    for record in sorted(archive.records.values(), key=lambda record: record.nbytes):
        # torch writes 0 where it was told to leave the checksums out.
        if record.crc == 0 or record.nbytes > left:
            unchecked += 1 if record.nbytes else 0
            continue
        left -= record.nbytes
        try:
            content = record_source(source, record)
        except BadZipError as error:
            damaged.append(str(error))
            continue
        if content.nbytes != record.nbytes:
            damaged.append(f"its record {clean(record.name)!r} is cut off")
        elif checksum_of(content) != record.crc:
            damaged.append(f"its record {clean(record.name)!r} is damaged: the checksum is another one")
    details["records_checked"] = len(archive.records) - unchecked
    if unchecked:
        details["records_not_checked"] = unchecked
    return damaged[:20]


def _missing_storages(records: Mapping[str, ZipRecord], found: Recognised) -> list[str]:
    problems, missing = [], []
    for key, storage in storages_of(found).items():
        record = records.get(f"data/{key}")
        needed = _nbytes(storage)
        if record is None:
            missing.append(f"data/{key}")
        elif record.nbytes < needed:
            problems.append(
                f"its record 'data/{clean(key)}' has {record.nbytes} bytes; the tensors in it are declared to need"
                f" {needed}"
            )
    if missing:
        problems.append(f"records of tensors are missing: {listed(missing)}")
    return problems[:20]


def _nbytes(storage: Any) -> int:
    return int(storage.numel) * (itemsize(storage.dtype) or 0)


def _without_pickle(
    place: str,
    source: ByteSource,
    records: Mapping[str, ZipRecord],
    versions: Mapping[str, str],
    problems: list[str],
) -> Artifact:
    is_package = ".data/extern_modules" in records
    title = "a package of torch.package, with code in it" if is_package else "a program of torch.export (.pt2)"
    advice = (
        f"torch.package.PackageImporter({place!r}) runs the code in it: only if you trust it"
        if is_package
        else f"torch.export.load({place!r})"
    )
    contents = {clean(name): format_nbytes(record.nbytes) for name, record in list(records.items())[:200]}
    kind = "torch-package" if is_package else "torch-export"
    return Artifact(
        place, kind, title, "certain", source.nbytes, versions, None, contents, (), tuple(problems), (advice,)
    )


def _script(
    place: str,
    source: ByteSource,
    facts: PickleFacts,
    versions: Mapping[str, str],
    problems: list[str],
    details: Mapping[str, Any],
) -> Artifact:
    # Its pickle is read by TorchScript's own reader, which imports nothing.
    of = facts.root.of.removeprefix("__torch__.") if isinstance(facts.root, Object) else "an unknown class"
    return Artifact(
        place=place,
        kind="torchscript",
        title=f"a TorchScript program of class {clean(of)}",
        certainty="certain",
        nbytes=source.nbytes,
        versions=versions,
        tensors=tensor_facts(tensors_in(_as_dicts(facts.root))),
        problems=(*problems, *(f"its pickle: {problem}" for problem in facts.problems)),
        advice=(
            f"torch.jit.load({place!r}, map_location='cpu') gives the program; only if you trust it",
            "its weights alone: that program's .state_dict(); no class of yours is needed",
        ),
        details={"container": "torchscript", "class": clean(of), **details},
    )


def _as_dicts(root: Symbol) -> Symbol:
    """Return the object tree of a program as nested dicts of what holds tensors."""
    budget = 200_000
    made = Dict()
    pending: list[tuple[Symbol, Dict, int]] = [(root, made, 0)]
    while pending and budget > 0:
        value, into, depth = pending.pop()
        state = value.state if isinstance(value, Object) else value
        if not isinstance(state, Dict) or depth >= 40:
            continue
        budget -= len(state)
        for key, inner in state.items():
            if isinstance(inner, (Object, Dict)):
                child = Dict()
                into.pairs.append((key, child))
                pending.append((inner, child, depth + 1))
            else:
                into.pairs.append((key, inner))
    return made
