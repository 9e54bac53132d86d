"""The configuration that a run was last built from, read back from its directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptmgr.config.yaml_source import parse_config
from ckptmgr.errors import CkptmgrError, CorruptCheckpointError
from ckptmgr.format.layout import attempt_key
from ckptmgr.launch.experiment import ExperimentRecord, document_digest
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.launch.torchrun import place_in_job
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import read_attempt_record

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["StoredExperiment", "read_experiment"]


@dataclass(frozen=True, slots=True)
class StoredExperiment:
    """A configuration as a run holds it.

    Attributes:
        config: Parsed, unresolved.
        project_root: The project that the user was in then.
        world_size: How many ranks trained.
        local_world_size: How many of them on the machine of rank 0.
    """

    config: DictConfig
    project_root: str
    world_size: int = 1
    local_world_size: int = 1


def read_experiment(catalog: Catalog, *, attempt: int | None = None) -> StoredExperiment | None:
    """Return the configuration of an attempt, or the newest one; None if the run was not built from a configuration.

    Args:
        catalog: The run.
        attempt: The attempt that wrote the checkpoint to go on from; None for the newest that trained.

    Raises:
        CorruptCheckpointError: The configuration is damaged. It is what everything is built from, so no other is used
            in its place without being asked.
        FormatVersionError: It was written by a newer version.
    """
    for number in _candidates(catalog, attempt):
        start = _start(catalog, number)
        if start is None:
            continue
        return None if start.experiment is None else _read(catalog, number, start.experiment, start)
    return None


def _candidates(catalog: Catalog, attempt: int | None) -> Iterator[int]:
    if attempt is not None:
        yield attempt
        return
    newest_first = sorted(catalog.attempts, reverse=True)
    # One that never began to train (it was refused, or only looked into the run) does not stand for it.
    trained = [number for number in newest_first if "line" in catalog.attempts[number]]
    yield from trained or newest_first


def _start(catalog: Catalog, attempt: int) -> StartRecord | None:
    try:
        return read_attempt_record(catalog.storage, attempt, "start", StartRecord)
    except FileNotFoundError:
        return None
    except CorruptCheckpointError as error:
        if "config" in catalog.attempts[attempt]:
            raise _damaged(catalog, attempt_key(attempt, "start"), error.why or error.what) from error
        return None


def _read(catalog: Catalog, attempt: int, record: ExperimentRecord, start: StartRecord) -> StoredExperiment:
    key = attempt_key(attempt, "config")
    try:
        data = catalog.storage.read(key)
    except FileNotFoundError as error:
        raise _damaged(catalog, key, "it is missing") from error
    if document_digest(data) != record.config_digest:
        raise _damaged(catalog, key, "its text does not match its digest")
    try:
        config = parse_config(data, where=key)
    except CkptmgrError as error:
        raise _damaged(catalog, key, error.why or error.what) from error
    place = place_in_job(start.topology)
    if place is None:
        return StoredExperiment(config, start.project_root)
    return StoredExperiment(config, start.project_root, place.world_size, place.local_world_size)


def _damaged(catalog: Catalog, key: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{key} of {catalog.storage.url} is damaged",
        why=why,
        next=f"name the configuration: ckptmgr run CONFIG run_dir={catalog.storage.url}",
    )
