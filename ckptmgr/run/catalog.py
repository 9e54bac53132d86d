"""What a run directory holds, from one listing: attempts, checkpoints, the line, and what a reference names.

*Committed* means that the manifest exists. *Intact* means that every file it lists is there with its size. Only intact
checkpoints answer to ``latest`` and ``best``, so a partly copied run never lies. A listing settles both, without
reading.
"""

from __future__ import annotations

import errno
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Literal

from ckptmgr.errors import (
    CheckpointNotFoundError,
    CkptmgrError,
    CorruptCheckpointError,
    RunNotFoundError,
    StorageError,
    UsageError,
)
from ckptmgr.format.layout import RUN_MARKER, CheckpointId, manifest_key, parse_attempt_key, parse_checkpoint_key
from ckptmgr.format.manifest import Continuation, Manifest, ManifestExcerpt, Note, decode_manifest
from ckptmgr.format.manifest import RunMarker as Marker
from ckptmgr.format.record import decode_record
from ckptmgr.policy.retention import CheckpointFacts, best
from ckptmgr.run.facts import facts_of
from ckptmgr.run.lineage import Line, read_line, trace_line
from ckptmgr.storage.protocol import Storage

__all__ = ["Catalog"]

_log = logging.getLogger("ckptmgr")


class Catalog:
    """A view of one run, as of the moment it was loaded. Manifests are read when asked for, and then kept.

    Args:
        storage: The run's root.
        known: Manifests that were read or written before; they never change.

    Attributes:
        storage: The run's root.
        sizes: Size in bytes of every object below the root, by key.
        attempts: Attempt number → names of its records (``claim``, ``line``, ``start``, ``end``). One whose records
            were lost, but not what it saved, has none.
        committed: Ids of all committed checkpoints, ascending.
        torn: Ids of saves that were started and never committed, ascending.
    """

    def __init__(self, storage: Storage, known: Mapping[CheckpointId, Manifest] | None = None) -> None:
        self.storage = storage
        self.sizes = {entry.key: entry.nbytes for entry in storage.list()}
        self.attempts: dict[int, set[str]] = {}
        self._files: dict[CheckpointId, set[str]] = {}
        for key in self.sizes:
            if attempt := parse_attempt_key(key):
                self.attempts.setdefault(attempt[0], set()).add(attempt[1])
            elif checkpoint := parse_checkpoint_key(key):
                self._files.setdefault(checkpoint[0], set()).add(checkpoint[1])
                self.attempts.setdefault(checkpoint[0].attempt, set())
        self.committed = sorted(id for id, files in self._files.items() if "manifest.json" in files)
        self.torn = sorted(id for id, files in self._files.items() if "manifest.json" not in files)
        self._manifests: dict[CheckpointId, Manifest] = dict(known or {})

    @classmethod
    def of_existing_run(cls, storage: Storage) -> Catalog:
        """Load a run that must be there.

        Raises:
            RunNotFoundError: The location holds no run.
            StorageError: It cannot be listed, or is a file.
        """
        place = shlex.quote(storage.url)
        foreign = f"`ckptmgr doctor {place}` tells what it is; `ckptmgr import {place} RUN_DIR` makes a run of it"
        try:
            catalog = cls(storage)
        except StorageError as error:
            if error.errno != errno.ENOTDIR:
                raise
            told = StorageError(f"{storage.url} is no run", why="it is a file", next=foreign)
            told.errno = error.errno
            raise told from error
        if not catalog.is_run and catalog.run_id is None:
            advice = "give the directory that the manager was given; in a script, resume='auto' starts a new run in it"
            if any(key.endswith(f"/{RUN_MARKER}") for key in catalog.sizes):
                advice = f"runs lie below it: ckptmgr ls {place}"
            elif catalog.sizes:
                advice += f"; if another tool has written it, {foreign}"
            raise RunNotFoundError(
                f"no run in {storage.url}",
                why="nothing is stored there" if not catalog.sizes else f"it holds files, but no {RUN_MARKER}",
                next=advice,
            )
        return catalog

    @property
    def is_run(self) -> bool:
        """Whether the location holds a run."""
        return RUN_MARKER in self.sizes

    @cached_property
    def marker(self) -> Marker:
        """The run's own record.

        Raises:
            CorruptCheckpointError, FormatVersionError: It is lost, or cannot be read.
        """
        try:
            data = self.storage.read(RUN_MARKER)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(
                f"{RUN_MARKER} is lost",
                why=f"it is not in {self.storage.url}",
                next="its checkpoints tell the same; the next start writes it again",
            ) from error
        return decode_record(data, Marker, where=RUN_MARKER)

    @cached_property
    def run_id(self) -> str | None:
        """The run's own id: its marker's, else that of its newest readable manifest; None for a new run.

        Raises:
            FormatVersionError: The run was made by a newer format.
        """
        problem: CorruptCheckpointError | None = None
        if self.is_run:
            try:
                return self.marker.run_id
            except CorruptCheckpointError as error:
                problem = error
        for checkpoint in reversed(self.committed):
            try:
                run_id = self.manifest(checkpoint).run_id
            except CorruptCheckpointError:
                continue
            what = f"{problem.what}: {problem.why}" if problem else f"{RUN_MARKER} is missing"
            _log.warning("%s; the checkpoints in %s tell the run's id", what, self.storage.url)
            return run_id
        if problem is not None:
            raise problem
        return None

    @cached_property
    def line(self) -> Line:
        """The line of the newest attempt that recorded one. A claim alone fences, but leads nowhere.

        Raises:
            CorruptCheckpointError: It cannot be followed to its start.
        """
        savers = {checkpoint.attempt for checkpoint in self.committed}
        recorded = sorted(number for number, records in self.attempts.items() if "line" in records or number in savers)
        while recorded:
            try:
                self._read_link(recorded[-1])
            except CorruptCheckpointError as error:
                # It saved nothing, or a manifest of it would tell the same.
                _log.warning("%s; attempt %d is left out", error, recorded.pop())
            else:
                break
        return trace_line(recorded[-1] if recorded else None, self._read_link)

    def _read_link(self, attempt: int) -> Continuation | None:
        try:
            return read_line(self.storage, attempt).continues
        except (CorruptCheckpointError, FileNotFoundError):
            # Every manifest of the attempt holds the same.
            for checkpoint in self.committed:
                if checkpoint.attempt == attempt:
                    with suppress(CorruptCheckpointError):
                        return self.manifest(checkpoint).continues
            raise

    @property
    def on_line(self) -> list[CheckpointId]:
        """Ids of the committed checkpoints on the line, oldest first."""
        return [id for id in self.committed if self.line.holds(id)]

    def files_of(self, checkpoint: CheckpointId) -> set[str]:
        """Return the names of the files that lie in a checkpoint's folder."""
        return self._files.get(checkpoint, set())

    def manifest(self, checkpoint: CheckpointId) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFoundError: It does not exist (any more).
            CorruptCheckpointError, FormatVersionError: It cannot be read.
        """
        if checkpoint not in self._manifests:
            key = manifest_key(checkpoint)
            try:
                data = self.storage.read(key)
            except FileNotFoundError as error:
                raise CheckpointNotFoundError(
                    f"no committed checkpoint {checkpoint} in {self.storage.url}",
                    why="a save was cut off before its manifest" if checkpoint in self._files else None,
                    next=f"`ckptmgr ls {self.storage.url}` lists the committed ones",
                ) from error
            self._manifests[checkpoint] = decode_manifest(data, where=key, checkpoint=checkpoint)
        return self._manifests[checkpoint]

    def what_is_missing(self, manifest: Manifest | ManifestExcerpt) -> list[str]:
        """Return what keeps a committed checkpoint from being intact; an empty list if it is."""
        problems = []
        for file in manifest.files:
            nbytes = self.sizes.get(file.path)
            if nbytes is None:
                problems.append(f"{file.path} is missing")
            elif nbytes != file.nbytes:
                problems.append(f"{file.path} has {nbytes} bytes instead of {file.nbytes}")
        return problems

    def why_not_intact(self, checkpoint: CheckpointId) -> str | None:
        """Return why a committed checkpoint cannot be used; None if it is intact as far as a listing tells."""
        try:
            manifest = self.manifest(checkpoint)
            problems = self.what_is_missing(manifest)
            if manifest.run_id != self.run_id:
                problems.append(f"it belongs to another run: {manifest.run_id}, not {self.run_id}")
        except CkptmgrError as error:
            return f"{error.what}: {error.why}" if error.why else error.what
        return "; ".join(problems) or None

    def newest_first(self) -> Iterator[Manifest]:
        """Yield the intact checkpoints on the line, newest first."""
        for checkpoint in reversed(self.on_line):
            if self.why_not_intact(checkpoint) is None:
                yield self.manifest(checkpoint)

    def facts(self, checkpoint: CheckpointId) -> CheckpointFacts:
        """Return what retention and ``best`` decide by, later notes included."""
        return facts_of(self.manifest(checkpoint), self.notes(checkpoint))

    def notes(self, checkpoint: CheckpointId) -> list[Note]:
        """Read the records that were added beside a manifest, in order. Unreadable ones are skipped."""
        notes = []
        for name in sorted(self.files_of(checkpoint)):
            if name.startswith("note-"):
                key = checkpoint.folder + name
                try:
                    note = decode_record(self.storage.read(key), Note, where=key)
                except (CkptmgrError, FileNotFoundError):
                    continue
                if note.checkpoint == str(checkpoint):
                    notes.append(note)
        return notes

    def latest(self) -> Manifest:
        """Return the newest intact checkpoint on the line.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        for manifest in self.newest_first():
            return manifest
        raise self._nothing("latest", self._why_nothing())

    def best(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> Manifest:
        """Return the intact checkpoint on the line with the best value of a metric.

        Args:
            metric: Its name; by default the one that the newest checkpoint records as monitored.
            mode: Whether smaller or larger is better; by default as recorded.

        Raises:
            CheckpointNotFoundError: No checkpoint on the line has a value of it.
            UsageError: No metric was named, and none is recorded.
        """
        manifests = {manifest.checkpoint: manifest for manifest in self.newest_first()}
        newest = next(iter(manifests.values()), None)
        metric = metric or (newest.monitor if newest else None)
        mode = mode or (newest.mode if newest and newest.monitor == metric else None) or "min"
        if newest is None:
            raise self._nothing("best", self._why_nothing())
        if metric is None:
            raise UsageError(
                f"{self.storage.url}@best: no metric says what is best",
                why="the run was saved without monitor=",
                next="name the metric, give the manager monitor= and mode=, or use @latest",
            )
        found = best([self.facts(manifest.id) for manifest in manifests.values()], metric, mode)
        if found is None:
            raise self._nothing("best", f"no checkpoint on the line has a value of {metric!r}")
        return manifests[found.id]

    def resolve(self, selector: str) -> Manifest:
        """Return the checkpoint that a selector names.

        Args:
            selector: ``latest``, ``best``, a step on the current line, a checkpoint's id, or a tag. A named checkpoint
                is returned even if it is not intact: verifying it tells what is wrong.

        Raises:
            CheckpointNotFoundError: Nothing answers to it. Names what is near.
        """
        if selector == "latest":
            return self.latest()
        if selector == "best":
            return self.best()
        if selector.isdecimal():
            at_step = [id for id in self.on_line if id.step == int(selector)]
            if at_step:
                return self.manifest(at_step[-1])
            raise self._nothing(f"step {int(selector)}", self._why_no_step(int(selector)))
        try:
            return self.manifest(CheckpointId.parse(selector))
        except ValueError:
            pass
        for checkpoint in reversed(self.on_line):
            try:
                if selector in self.facts(checkpoint).tags:
                    return self.manifest(checkpoint)
            except CorruptCheckpointError:
                continue
        raise self._nothing(f"{selector!r}", "it is neither latest, best, a step, an id nor a tag of this run")

    def _nothing(self, what: str, why: str) -> CheckpointNotFoundError:
        intact = next(self.newest_first(), None)
        return CheckpointNotFoundError(
            f"no committed checkpoint for {what} in {self.storage.url}",
            why=why,
            next=(
                f"the newest one is step {intact.step}: {self.storage.url}@{intact.step}"
                if intact
                else f"`ckptmgr ls {self.storage.url}` shows what is there"
            ),
        )

    def _why_nothing(self) -> str:
        if self.on_line:
            reasons = {str(id): self.why_not_intact(id) for id in self.on_line}
            return "none is intact: " + "; ".join(f"{id}: {reason}" for id, reason in reasons.items())
        if self.committed:
            return f"the {len(self.committed)} committed ones are not on the line of the newest attempt"
        return "a save was started, but none was ever committed" if self.torn else "none was ever saved"

    def _why_no_step(self, step: int) -> str:
        if any(id.step == step for id in self.committed):
            return "it was committed, but is not on the current line (a later start went back behind it)"
        if any(id.step == step for id in self.torn):
            return "a save of that step was cut off before its manifest"
        steps = sorted({id.step for id in self.on_line}, key=lambda other: abs(other - step))[:3]
        return f"the nearest saved steps are {', '.join(map(str, sorted(steps)))}" if steps else "none was ever saved"
