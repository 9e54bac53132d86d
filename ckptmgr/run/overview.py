"""A run in one line: how it is doing, how far it is, what its best checkpoint is, and what it weighs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from ckptmgr.errors import CkptmgrError
from ckptmgr.format.layout import CheckpointId, manifest_key
from ckptmgr.format.manifest import ManifestExcerpt, decode_manifest_excerpt
from ckptmgr.policy.retention import best
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.facts import facts_of
from ckptmgr.run.life import Host, Life, life_of, this_host
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage

__all__ = ["BestSoFar", "RunOverview", "look_at", "look_at_all"]

_READERS = 16


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """The best checkpoint of a line by the metric that the run monitors."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True)
class RunOverview:
    """One run.

    Attributes:
        name: Where it lies, relative to the directory that was asked about.
        url: Where it lies.
        life: How it is doing.
        step, epoch: Of the newest intact checkpoint on the line; None without one.
        saved_at: When that was committed, in RFC 3339.
        created_at: When the run was, likewise; None where that cannot be read.
        best: None where nothing is monitored, or has a value.
        ncheckpoints: How many are committed, on the line or not.
        nattempts: How many process starts there were.
        nbytes: Of everything in the run directory.
        problem: What cannot be read of it; None where all can.
    """

    name: str
    url: str
    life: Life
    step: int | None = None
    epoch: int | None = None
    saved_at: str | None = None
    created_at: str | None = None
    best: BestSoFar | None = None
    ncheckpoints: int = 0
    nattempts: int = 0
    nbytes: int = 0
    problem: str | None = None


def look_at_all(runs: Mapping[str, Storage]) -> list[RunOverview]:
    """Describe several runs, the one that was saved into last first."""
    host = this_host()

    def look(name: str) -> RunOverview:
        return look_at(name, runs[name], host)

    if any(not isinstance(storage, LocalStorage) for storage in runs.values()):
        with ThreadPoolExecutor(_READERS) as readers:
            overviews = list(readers.map(look, runs))
    else:
        overviews = [look(name) for name in runs]
    return sorted(overviews, key=lambda run: (run.saved_at or run.created_at or "", run.name), reverse=True)


def look_at(name: str, storage: Storage, host: Host | None = None) -> RunOverview:
    """Describe a run. Whatever cannot be read is described, not raised."""
    try:
        catalog = Catalog(storage)
    except CkptmgrError as error:
        return RunOverview(name, storage.url, Life("unknown"), problem=error.what)
    life = life_of(catalog, host)
    problem: str | None = None
    created_at: str | None = None
    newest: ManifestExcerpt | None = None
    found: BestSoFar | None = None
    with suppress(CkptmgrError, FileNotFoundError):
        created_at = catalog.marker.created_at
    try:
        excerpts = {excerpt.checkpoint: excerpt for excerpt in _newest_first(catalog)}
        newest = next(iter(excerpts.values()), None)
        if newest is not None and newest.monitor is not None:
            facts = [facts_of(excerpt, catalog.notes(CheckpointId.parse(id))) for id, excerpt in excerpts.items()]
            first = best(facts, newest.monitor, newest.mode or "min")
            if first is not None:
                found = BestSoFar(newest.monitor, first.metrics[newest.monitor], first.step)
    except (CkptmgrError, FileNotFoundError) as error:
        problem = str(error).partition("\n")[0]
    return RunOverview(
        name=name,
        url=storage.url,
        life=life,
        step=None if newest is None else newest.step,
        epoch=None if newest is None else newest.epoch,
        saved_at=None if newest is None else newest.created_at,
        created_at=created_at,
        best=found,
        ncheckpoints=len(catalog.committed),
        # What has neither started nor left a line has only pruned.
        nattempts=sum(records != {"claim", "end"} for records in catalog.attempts.values()),
        nbytes=sum(catalog.sizes.values()),
        problem=problem,
    )


def _newest_first(catalog: Catalog) -> Iterator[ManifestExcerpt]:
    """Yield excerpts of the intact checkpoints on the line: whole manifests would take ten times as long."""
    for checkpoint in reversed(catalog.on_line):
        key = manifest_key(checkpoint)
        try:
            excerpt = decode_manifest_excerpt(catalog.storage.read(key), where=key, checkpoint=checkpoint)
        except (CkptmgrError, FileNotFoundError):
            continue
        if excerpt.run_id == catalog.run_id and not catalog.what_is_missing(excerpt):
            yield excerpt
