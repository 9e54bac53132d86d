"""Forks: a new run whose first checkpoint is a copy of another run's, complete by itself.

The order makes it safe to be killed: files first, then the new run's marker, then the manifest. Before the marker there
is no run, before the manifest there is no checkpoint, and the next fork into the same directory goes on as its next
attempt.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError, CorruptCheckpointError, UsageError
from ckptmgr.format.layout import (
    ATTEMPTS,
    CHECKPOINTS,
    RUN_MARKER,
    CheckpointId,
    attempt_key,
    manifest_key,
)
from ckptmgr.format.manifest import FileRecord, Manifest, RunMarker, metric_to_value
from ckptmgr.format.record import FORMAT_VERSION, decode_record, encode_record
from ckptmgr.launch.cut_off_fork import is_started, refuse_cut_off_fork
from ckptmgr.launch.experiment import document_digest
from ckptmgr.launch.redact import redact_url
from ckptmgr.launch.start_record import StartRecord, describe_start
from ckptmgr.progress import progress
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.clock import utc_now
from ckptmgr.run.copy import copy_files
from ckptmgr.run.lineage import claim_attempt, read_attempt_record, record_end, record_line, refuse_if_fenced
from ckptmgr.run.prune import collect_temporary, collect_torn
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.words import printable_place

__all__ = ["check_fork", "fork_run", "refuse_cut_off_fork"]

_DOCUMENTS = ("config", "resolved")


def fork_run(
    reference: Reference,
    to: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    to_storage_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Create a run whose first checkpoint is a copy of another run's, and whose record names that parent.

    Whatever the checkpoint refers to is copied, also files of earlier checkpoints, and the configuration that its
    attempt was built from. Metrics come along, notes included; tags do not, because they pin within their own run. The
    parent is only read, and may train on meanwhile.

    Every digest is checked while the bytes are copied. Within one object store the server copies the large files: their
    sizes are checked then, their digests when they are first loaded.

    A fork that was killed goes on when it is made again.

    Args:
        reference: The parent, and which of its checkpoints.
        to: Path or URL of the new run. Nothing, or an empty directory, may be there.
        storage_options: For the parent's storage; never recorded.
        to_storage_options: For the new one's; by default the parent's, if both are of the same protocol.

    Returns:
        The manifest of the copy: durable, and the new run's latest checkpoint.

    Raises:
        RunNotFoundError, CheckpointNotFoundError: Nothing answers to the reference.
        CorruptCheckpointError: The checkpoint is damaged. Nothing is left at the target.
        UsageError: Something is at the target, or one of the two directories lies within the other.
        Fenced: Another process has begun to fork into the same directory.
    """
    return _planned(reference, to, storage_options, to_storage_options).make()


def check_fork(reference: Reference, to: str) -> None:
    """Raise what `fork_run` would raise before it writes anything, and write nothing.

    Raises:
        RunNotFoundError, CheckpointNotFoundError, CorruptCheckpointError, UsageError: As `fork_run`.
    """
    _planned(reference, to, None, None).check()


def _planned(
    reference: Reference,
    to: str,
    storage_options: Mapping[str, Any] | None,
    to_storage_options: Mapping[str, Any] | None,
) -> _Fork:
    source = open_storage(reference.run_dir, storage_options=storage_options)
    if to_storage_options is None and _protocol(to) == _protocol(reference.run_dir):
        to_storage_options = storage_options
    if parse_reference(to).run_dir != to:
        raise UsageError(
            f"{to!r} names a checkpoint, not a run directory",
            why="what stands after the last @ chooses a checkpoint of a run",
            next="give the new run a name without @",
        )
    target = open_storage(to, storage_options=to_storage_options)
    _refuse_nested(source, target)
    catalog = Catalog.of_existing_run(source)
    manifest = catalog.resolve(reference.selector)
    problem = catalog.why_not_intact(manifest.id)
    if problem is not None:
        raise CorruptCheckpointError(
            f"step {manifest.step} of {source.url} cannot be forked",
            why=problem,
            next=f"`ckptmgr verify {source.url}` names the checkpoints that are whole: fork one of them",
        )
    return _Fork(catalog, manifest, target, to)


class _Fork:
    """One fork under way, from a checkpoint that is intact as far as a listing tells."""

    def __init__(self, catalog: Catalog, manifest: Manifest, target: Storage, to: str) -> None:
        self._source = catalog
        self._manifest = manifest
        self._target = target
        self._to = to
        self._parent = f"{redact_url(catalog.storage.url)}@{manifest.checkpoint}"
        self._written: list[str] = []

    def check(self) -> None:
        """Refuse a target that holds something else."""
        self._refuse_other(Catalog(self._target))

    def make(self) -> Manifest:
        """Copy, and commit."""
        found = Catalog(self._target)
        self._refuse_other(found)
        attempt = claim_attempt(self._target, found.attempts).attempt
        self._written.append(attempt_key(attempt, "claim"))
        checkpoint = CheckpointId(self._manifest.step, attempt, 0)
        try:
            self._record_start(attempt)
            files = self._copy(checkpoint)
            refuse_if_fenced(self._target, attempt)
        except BaseException:
            self._clear_away(checkpoint.folder)
            raise
        run_id = self._create_marker()
        copied = msgspec.structs.replace(
            self._manifest,
            run_id=run_id,
            checkpoint=str(checkpoint),
            attempt=attempt,
            reason=f"fork of {_name_of(self._source.storage)}@{self._manifest.step}",
            created_at=utc_now(),
            files=files,
            metrics={
                name: metric_to_value(value) for name, value in self._source.facts(self._manifest.id).metrics.items()
            },
            tags=(),
            continues=None,
        )
        refuse_if_fenced(self._target, attempt)
        self._target.write(manifest_key(checkpoint), [encode_record(copied)], exclusive=True)
        refuse_if_fenced(self._target, attempt)
        record_end(self._target, attempt, "finished", step=copied.step)
        whole = Catalog(self._target)
        collect_torn(whole, attempt)
        collect_temporary(whole, attempt)
        return copied

    def _copy(self, checkpoint: CheckpointId) -> tuple[FileRecord, ...]:
        source, manifest = self._source.storage, self._manifest
        try:
            with progress(f"copying step {manifest.step} to {printable_place(self._to)}", manifest.nbytes) as advance:
                return copy_files(source, manifest, self._target, checkpoint, advance)
        except CorruptCheckpointError as error:
            if manifest.id in Catalog(source).committed:
                raise
            # The parent may train on, and its retention be faster than the copy.
            raise CheckpointNotFoundError(
                f"step {manifest.step} of {source.url} was deleted while it was copied",
                why="the retention of the parent dropped it",
                next="fork a newer step, or one that is tagged",
            ) from error

    def _refuse_other(self, found: Catalog) -> None:
        place = printable_place(self._to)
        if found.committed:
            if _parent_of(found) == self._parent:
                raise _occupied(
                    place, "it is this very fork, and it is whole", f"`ckptmgr resume {place}` goes on in it"
                )
            raise _occupied(place, f"it holds a run with {len(found.committed)} checkpoints", "give another directory")
        others = _other_names(self._target, found)
        if others:
            shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            raise _occupied(place, f"it holds {shown}", "give a directory that is empty, or not there yet")
        if found.is_run:
            marker = found.marker
            if marker.parent is None or is_started(found):
                raise _occupied(place, "it holds a run, which has no checkpoint yet", "give another directory")
            if marker.parent != self._parent:
                raise _occupied(place, f"a fork of {marker.parent} was cut off there", "remove it, or fork that again")
        elif is_started(found):
            raise _occupied(place, "it holds the records of a run", "give another directory")

    def _record_start(self, attempt: int) -> None:
        self._written.append(attempt_key(attempt, "line"))
        record_line(self._target, attempt, None)
        records = self._source.attempts.get(self._manifest.attempt, set())
        parent = self._manifest.attempt
        start = None
        if "start" in records:
            # Without it the fork cannot be started again by itself; its state is whole nevertheless.
            with suppress(CorruptCheckpointError):
                start = read_attempt_record(self._source.storage, parent, "start", StartRecord)
        for name in _DOCUMENTS:
            if name in records:
                data = self._source.storage.read(attempt_key(parent, name))
                _check_document(data, name, parent, start)
                self._write(attempt_key(attempt, name), data)
        if start is not None:
            self._write(attempt_key(attempt, "start"), encode_record(_start_of_fork(start, self._parent)))

    def _write(self, key: str, data: bytes) -> None:
        # Before: a write may fail after the file is there.
        self._written.append(key)
        self._target.write(key, [data])

    def _create_marker(self) -> str:
        marker = RunMarker(
            version=FORMAT_VERSION, run_id=secrets.token_hex(8), created_at=utc_now(), parent=self._parent
        )
        try:
            self._target.write(RUN_MARKER, [encode_record(marker)], exclusive=True)
        except FileExistsError as error:
            there = decode_record(self._target.read(RUN_MARKER), RunMarker, where=RUN_MARKER)
            if there.parent != self._parent:
                place = printable_place(self._to)
                raise _occupied(place, "another process has just made a run of it", "give another directory") from error
            return there.run_id
        return marker.run_id

    def _clear_away(self, folder: str) -> None:
        """Leave nothing of a copy that failed. What cannot be removed does not count, and the next fork removes it."""
        with suppress(CkptmgrError):
            for entry in self._target.list(folder):
                self._target.delete(entry.key)
            # The claim last: as long as a file of it is there, its number must not be used again.
            for key in reversed(self._written):
                self._target.delete(key)


def _occupied(place: str, why: str, next: str) -> UsageError:
    return UsageError(f"cannot fork into {place}", why=why, next=next)


def _start_of_fork(parent: StartRecord, reference: str) -> StartRecord:
    """Return how the parent's training was started, by this process: so the fork can be resumed as the parent can."""
    here = describe_start()
    return msgspec.structs.replace(
        parent,
        fork_of=reference,
        started_at=here.started_at,
        host=here.host,
        pid=here.pid,
        user=here.user,
        platform=here.platform,
        cpu_count=here.cpu_count,
    )


def _check_document(data: bytes, name: str, attempt: int, start: StartRecord | None) -> None:
    experiment = None if start is None else start.experiment
    if experiment is None:
        return
    expected = experiment.config_digest if name == "config" else experiment.resolved_digest
    if document_digest(data) != expected:
        raise CorruptCheckpointError(
            f"{attempt_key(attempt, name)} is damaged",
            why="it does not match the digest that the record of its attempt holds",
            next="fork a checkpoint of another attempt, or write the configuration anew and `ckptmgr run` it",
        )


def _parent_of(found: Catalog) -> str | None:
    try:
        return found.marker.parent
    except CkptmgrError:
        return None


def _other_names(target: Storage, found: Catalog) -> list[str]:
    """Return what lies in a directory besides a run's own files."""
    own = (ATTEMPTS, CHECKPOINTS)
    others = [key for key in found.sizes if key != RUN_MARKER and not key.startswith(own)]
    if isinstance(target, LocalStorage):
        # A storage lists what can be its own only. What else lies there is somebody's, too.
        try:
            names = sorted(path.name for path in Path(target.url).iterdir())
        except FileNotFoundError:
            return others
        temporary = {entry.key for entry in target.list_temporary()}
        known = {RUN_MARKER, *(prefix.rstrip("/") for prefix in own), *temporary}
        others = [name for name in names if name not in known]
    return others


def _refuse_nested(source: Storage, target: Storage) -> None:
    old, new = _location(source), _location(target)
    if old == new:
        problem = "it is the run that is forked"
    elif new.startswith(f"{old}/"):
        problem = f"it lies within the run that is forked, {source.url}"
    elif old.startswith(f"{new}/"):
        problem = f"the run that is forked, {source.url}, lies within it"
    else:
        return
    raise UsageError(
        f"cannot fork into {target.url}",
        why=problem,
        next="give another directory; to go back within one run, `ckptmgr resume RUN_DIR@STEP` needs no copy",
    )


def _location(storage: Storage) -> str:
    return os.path.realpath(storage.url) if isinstance(storage, LocalStorage) else storage.url.rstrip("/")


def _name_of(storage: Storage) -> str:
    """Return the last part of a run's place, for people; the record of the fork has all of it."""
    return redact_url(storage.url).rstrip("/").rpartition("/")[2]


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else ""
