"""What is recorded of two checkpoints besides their state: step, metrics, ranks, versions, code and configuration."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptmgr.diff.records import FactChange
from ckptmgr.diff.sides import OpenSide
from ckptmgr.errors import CkptmgrError, CorruptCheckpointError
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.manifest import Manifest
from ckptmgr.launch.experiment import document_digest
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["compare_facts"]

# Where a run is kept and what it is called is no difference in what it is.
_PLACES = ("run_dir", "name")


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One checkpoint, and how the process that wrote it was started; None, and why, where that cannot be told."""

    side: OpenSide
    catalog: Catalog
    manifest: Manifest
    start: StartRecord | None
    why: str = "is not recorded"


def compare_facts(a: OpenSide, b: OpenSide) -> tuple[list[FactChange], list[str]]:
    """Return what is recorded of two checkpoints and differs, and what could not be compared and why.

    Raises:
        CorruptCheckpointError: A record or a configuration is damaged. Names it.
        FormatVersionError: It was written by a newer version.
    """
    recorded = [_recorded(side) for side in (a, b)]
    if recorded[0] is None or recorded[1] is None:
        return [], []
    first, second = recorded[0], recorded[1]
    notes = [
        f"{one.side.label}: how attempt {one.manifest.attempt} was started {one.why}, so its code is not known"
        for one in (first, second)
        if one.start is None
    ]
    changes = [*_progress(first, second), *_topology(first, second), *_environment(first, second)]
    changes += _entries(first.manifest, second.manifest)
    if first.start is not None and second.start is not None:
        changes += _code(first.start, second.start)
    configuration, said = _configuration(first, second)
    return changes + configuration, notes + said


def _recorded(side: OpenSide) -> _Recorded | None:
    if side.catalog is None or side.manifest is None:
        return None
    attempt = side.manifest.attempt
    try:
        start = read_attempt_record(side.catalog.storage, attempt, "start", StartRecord)
    except FileNotFoundError:
        return _Recorded(side, side.catalog, side.manifest, None)
    except CorruptCheckpointError as error:
        # The record vouches for the configuration beside it. Without one it only tells a story.
        if "config" in side.catalog.attempts[attempt]:
            raise
        return _Recorded(side, side.catalog, side.manifest, None, f"cannot be read ({error.why})")
    return _Recorded(side, side.catalog, side.manifest, start)


def _progress(a: _Recorded, b: _Recorded) -> Iterator[FactChange]:
    manifests = (a.manifest, b.manifest)
    for name in ("step", "epoch"):
        values = [getattr(manifest, name) for manifest in manifests]
        if values[0] != values[1]:
            yield FactChange("progress", name, *(None if value is None else str(value) for value in values))
    metrics = [dict(one.catalog.facts(one.manifest.id).metrics) for one in (a, b)]
    for name in metrics[0] | metrics[1]:
        texts = [repr(each[name]) if name in each else None for each in metrics]
        # As text: a NaN is a NaN here.
        if texts[0] != texts[1]:
            yield FactChange("progress", f"metric {name}", *texts)


def _topology(a: _Recorded, b: _Recorded) -> Iterator[FactChange]:
    topologies = [one.manifest.topology for one in (a, b)]
    if topologies[0].world_size != topologies[1].world_size:
        yield FactChange("topology", "ranks", *(str(topology.world_size) for topology in topologies))
    for name in topologies[0].mesh | topologies[1].mesh:
        sizes = [topology.mesh.get(name) for topology in topologies]
        if sizes[0] != sizes[1]:
            yield FactChange("topology", f"mesh {name}", *(None if size is None else str(size) for size in sizes))


def _environment(a: _Recorded, b: _Recorded) -> Iterator[FactChange]:
    environments = [one.manifest.environment for one in (a, b)]
    for name in environments[0] | environments[1]:
        versions = [environment.get(name) for environment in environments]
        if versions[0] != versions[1]:
            yield FactChange("environment", name, *versions)


def _code(a: StartRecord, b: StartRecord) -> Iterator[FactChange]:
    commands = [shlex.join(start.argv) for start in (a, b)]
    if commands[0] != commands[1]:
        yield FactChange("command", "command", *commands)
    facts = [_code_of(start) for start in (a, b)]
    for name in facts[0] | facts[1]:
        texts = [each.get(name) for each in facts]
        if texts[0] != texts[1]:
            yield FactChange("code", name, *texts)


def _code_of(start: StartRecord) -> dict[str, str]:
    facts: dict[str, str] = {}
    git = start.git
    if git is not None and git.commit is not None:
        facts["commit"] = git.commit
    if git is not None and git.is_dirty:
        facts["uncommitted changes"] = git.diff_digest or "unknown ones"
    return facts


def _configuration(a: _Recorded, b: _Recorded) -> tuple[list[FactChange], list[str]]:
    # Weighs as much as everything else together, and most loops have none.
    if all(one.start is None or one.start.experiment is None for one in (a, b)):
        return [], ["neither has a stored configuration: no process of `ckptmgr run` wrote them"]
    from ckptmgr.config.changes import changes_between

    written = [_stored(one, "config") for one in (a, b)]
    if written[0] is None or written[1] is None:
        label = (a if written[0] is None else b).side.label
        return [], [f"{label} has no stored configuration, so configurations were not compared"]
    changes = changes_between(written[0], written[1])
    resolved = [_stored(one, "resolved") for one in (a, b)]
    if resolved[0] is not None and resolved[1] is not None:
        # What an interpolation gave, where the text of the interpolation is the same.
        told = {change.key for change in changes}
        changes += [
            change
            for change in changes_between(resolved[0], resolved[1])
            if change.key not in told and not any(change.key.startswith(f"{key}.") for key in told)
        ]
    return [
        FactChange("configuration", change.key, *change.texts) for change in changes if change.key not in _PLACES
    ], []


def _stored(one: _Recorded, which: str) -> DictConfig | None:
    """Return a configuration of the attempt that wrote a checkpoint; None where there is none."""
    from ckptmgr.config.yaml_source import parse_config

    record = None if one.start is None else one.start.experiment
    if record is None:
        return None
    key = attempt_key(one.manifest.attempt, which)
    try:
        data = one.catalog.storage.read(key)
    except FileNotFoundError as error:
        if which == "resolved":
            return None
        raise _damaged(one, key, "it is missing") from error
    if document_digest(data) != (record.config_digest if which == "config" else record.resolved_digest):
        raise _damaged(one, key, "its text does not match its digest")
    try:
        return parse_config(data, where=key)
    except CkptmgrError as error:
        raise _damaged(one, key, error.why or error.what) from error


def _damaged(one: _Recorded, key: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{key} of {one.catalog.storage.url} is damaged",
        why=why,
        next="`ckptmgr diff --only '*' A B` compares the state alone",
    )


def _entries(a: Manifest, b: Manifest) -> Iterator[FactChange]:
    """Yield the classes whose source has changed, and the preprocessors that do something else."""
    first, second = ({entry.name: entry for entry in manifest.entries} for manifest in (a, b))
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if one.fingerprint != other.fingerprint:
            yield FactChange("code", f"fingerprint of {name}", one.fingerprint, other.fingerprint)
        for cls in sorted(one.classes.keys() | other.classes.keys()):
            if one.classes.get(cls) != other.classes.get(cls):
                yield FactChange("code", f"source of {cls}", one.classes.get(cls), other.classes.get(cls))
