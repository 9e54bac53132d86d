"""This process's hold on a run directory: claim it, choose what to continue, save into it, retain, close.

Both managers, the standalone one and the Lightning callback, are faces of this. It decides nothing about when to save.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ckptmgr.claim import RunClaim
from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.format.layout import MAX_STEP, CheckpointId, note_key
from ckptmgr.format.manifest import Continuation, EntryRecord, Manifest, Note, Outcome, metric_to_value
from ckptmgr.format.record import FORMAT_VERSION, encode_record
from ckptmgr.joint_save import JointSaves
from ckptmgr.launch.redact import redact_text, secret_values
from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE
from ckptmgr.loading import LoadedCheckpoint, load_checkpoint
from ckptmgr.policy.retention import CheckpointFacts, RetentionPolicy
from ckptmgr.policy.triggers import MetricSpan, widen_spans
from ckptmgr.ranks.group import Ranks
from ckptmgr.resume_drift import tell_drift
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.clock import utc_now
from ckptmgr.run.commit import CheckpointFields
from ckptmgr.run.environment import recorded_versions
from ckptmgr.run.facts import facts_from_plain, facts_to_plain
from ckptmgr.run.lineage import record_end, record_line, refuse_if_fenced
from ckptmgr.run.reference import checked_tags
from ckptmgr.saved_so_far import SavedSoFar
from ckptmgr.state.capture import CapturedEntry
from ckptmgr.state.divergence import OnDivergence
from ckptmgr.state.sharding import LiveShards
from ckptmgr.state.snapshot import SnapshotBuffers
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.words import format_nbytes, format_seconds, printable_place
from ckptmgr.writer import BackgroundWriter

__all__ = ["RUN_DIR_VARIABLE", "LoadedCheckpoint", "Monitor", "TrainingRun", "load_checkpoint"]

_log = logging.getLogger("ckptmgr")

_MAX_ERROR_LENGTH = 2000
_LONG_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Monitor:
    """The metric that says which checkpoint is best, and which way is better."""

    metric: str
    mode: Literal["min", "max"] = "min"


class TrainingRun:
    """One attempt at a run: this process, from its claim to its end.

    Use `open`. Not safe for use from several threads.

    Attributes:
        run_dir: The run's root, as the user named it.
        continued: What to restore; None on a fresh start. Set it to None once restored, to free the memory.
        monitor: Says which checkpoint is best; None where nobody does.
    """

    def __init__(
        self,
        run_dir: str,
        storage: Storage,
        *,
        retention: RetentionPolicy,
        monitor: Monitor | None,
        background: bool,
        ranks: Ranks,
        on_divergence: OnDivergence,
    ) -> None:
        self.run_dir = run_dir
        self.storage = storage
        self.monitor = monitor
        self.continued: LoadedCheckpoint | None = None
        self._writer = BackgroundWriter(background=background)
        self._buffers = SnapshotBuffers()
        self._ranks = ranks
        self._joint = JointSaves(ranks, on_divergence)
        self._attempt = 0
        self._nsaves = 0
        self._nnotes = 0
        self._continuation: Continuation | None = None
        self._saved = SavedSoFar(storage, retention, deletes=ranks.leads)
        self._has_told_monitor = False
        self._is_accepted = False
        self._is_closed = False
        self._has_waited = False
        self._run_id = ""
        self._pid = os.getpid()
        self._unclosed: weakref.finalize[Any, TrainingRun] | None = None
        self._environment = recorded_versions()

    @classmethod
    def open(
        cls,
        run_dir: str,
        *,
        resume: str = "auto",
        retention: RetentionPolicy,
        monitor: Monitor | None = None,
        storage_options: Mapping[str, Any] | None = None,
        background: bool = True,
        check: Callable[[LoadedCheckpoint], None] = lambda loaded: None,
        check_fresh: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
        shards: LiveShards | None = None,
        on_divergence: OnDivergence = "warn",
        classes: Mapping[str, str | None] | None = None,
        strict_environment: bool = False,
    ) -> TrainingRun:
        """Claim a run, creating it if need be, and load what it continues. All ranks of a job do it together.

        The caller restores `continued` and then calls `accept`. Until then the attempt fences older ones but has no
        line.

        Args:
            run_dir: Path or fsspec URL.
            resume: ``auto`` continues the newest intact checkpoint if there is one, ``must`` wants one, ``never``
                starts from nothing, anything else is a selector (``best``, a step, an id, a tag).
            retention: What to keep.
            monitor: Recorded in each manifest, so that ``best`` means the same everywhere.
            storage_options: For the storage; never recorded.
            background: Whether saves are written while training goes on.
            check: Raises if a checkpoint does not fit. Asked before the claim: who cannot use a run does not take it
                away from the process that trains in it.
            check_fresh: Raises if training cannot begin from nothing. Asked in the same way.
            ranks: The processes of the job; by default this one alone. Rank 0 decides, claims and commits.
            shards: Live sharded tensors, of which only this rank's parts are loaded.
            on_divergence: What to do when ranks that should hold the same parameters and moments do not.
            classes: The code of the live modules: class → digest of its source.
            strict_environment: Refuse to go on where versions or code have changed in a way that may matter.

        Raises:
            EnvironmentDriftError: They have, and ``strict_environment`` is set.
            CheckpointNotFoundError: ``resume`` wants a checkpoint that is not there.
            FormatVersionError: The run was made by a newer format.
            RankFailure: A rank failed, is gone, or late.
            CorruptCheckpointError: There are checkpoints, and none of them is whole.
            CkptmgrError: Whatever ``check`` or ``check_fresh`` raises. In all these cases nothing was claimed.
        """
        ranks = ranks or Ranks.alone()
        storage = open_storage(run_dir, storage_options=storage_options)
        run = cls(
            run_dir,
            storage,
            retention=retention,
            monitor=monitor,
            background=background,
            ranks=ranks,
            on_divergence=on_divergence,
        )
        claim = RunClaim(storage, run_dir, resume, ranks)
        if claim.look():
            run.continued = claim.choose(shards)
            loaded = run.continued
            ranks.loop.decide(
                "comparing the environment with the checkpoint's",
                lambda: tell_drift(storage, loaded, classes or {}, strict=strict_environment),
            )
            ranks.loop.together("comparing the checkpoint with the live objects", lambda: check(loaded))
        else:
            ranks.loop.together("looking at what begins from nothing", check_fresh)
        run._run_id, run._attempt = claim.claim()
        if claim.has_changed:
            try:
                run.continued = None
                run.continued = claim.choose(shards)
            except CkptmgrError as error:
                run.abandon(error)
                raise
        run._unclosed = weakref.finalize(run, _tell_unclosed, run_dir, run._pid)
        return run

    @property
    def ranks(self) -> Ranks:
        """The processes of the job."""
        return self._ranks

    @property
    def seen(self) -> Mapping[str, MetricSpan]:
        """Span of each metric over the saves of the line so far."""
        return self._saved.seen

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1."""
        return self._attempt

    def accept(self) -> None:
        """Record that this attempt continues what was loaded. From now on the run's line leads through it."""
        manifest = self.continued.manifest if self.continued else None

        def accept() -> list[dict[str, Any]]:
            self._continuation = record_line(self.storage, self._attempt, manifest)
            catalog = Catalog(self.storage, known={manifest.id: manifest} if manifest else None)
            intact = [checkpoint for checkpoint in catalog.on_line if catalog.why_not_intact(checkpoint) is None]
            self._saved.manifests = {checkpoint: catalog.manifest(checkpoint) for checkpoint in intact}
            return [facts_to_plain(catalog.facts(checkpoint)) for checkpoint in intact]

        told = self._ranks.loop.decide("accepting what is continued", accept)
        self._is_accepted = True
        for facts in map(facts_from_plain, told):
            self._saved.add(facts)

    def save(
        self,
        entries: Sequence[CapturedEntry],
        *,
        step: int,
        reason: str,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        wait: bool = False,
    ) -> CheckpointId:
        """Snapshot the state, and commit it in the background.

        Training is blocked while the snapshot is copied, and while a save that is still in flight ends.

        Args:
            entries: The captured state: live references.
            step: Optimizer updates completed.
            reason: Why this save happens, for people.
            epoch: Epochs completed or under way, where there are any.
            metrics: Values known at this step.
            tags: Names by which the checkpoint is pinned.
            wait: Return only when it is durable.

        Raises:
            UnsupportedStateError: At the first save: a value that cannot be stored.
            SaveFailedError, Fenced: The save before this one failed, or with ``wait`` this one.
        """
        self._refuse_in_fork("save")
        tags = checked_tags(tags)
        if step > MAX_STEP:
            raise UsageError(f"step {step} is larger than {MAX_STEP}", why="a checkpoint's name has ten digits for it")
        began = time.monotonic()
        name = f"the save of step {step}"
        self._wait_for_writer(name)
        encoders, share = self._joint.agree(name, entries)
        # All ranks have a snapshot, or none of them goes on.
        files = self._ranks.loop.together(
            f"the snapshot of step {step}",
            lambda: self._buffers.snapshot(entries, encoders=encoders, share=share),
        )
        checkpoint = CheckpointId(step, self._attempt, self._nsaves)
        self._nsaves += 1
        self._saved.seen = widen_spans(self._saved.seen, metrics or {})
        fields = CheckpointFields(
            run_id=self._run_id,
            reason=reason,
            entries=tuple(
                EntryRecord(
                    name=e.name,
                    handler=e.handler,
                    handler_version=e.version,
                    scope=e.scope,
                    fingerprint=e.fingerprint,
                    classes=dict(e.classes),
                )
                for e in entries
            ),
            epoch=epoch,
            metrics=dict(metrics or {}),
            monitor=self.monitor.metric if self.monitor else None,
            mode=self.monitor.mode if self.monitor else None,
            tags=tags,
            continues=self._continuation,
            environment=self._environment,
        )
        blocked_s = time.monotonic() - began
        by_name = {entry.name: encoder for entry, encoder in zip(entries, encoders, strict=True)}

        def commit() -> None:
            facts, manifest = self._joint.write(name, self.storage, checkpoint, files, fields, by_name)
            self._note_committed(facts, manifest, began, blocked_s)

        self._writer.submit(name, commit)
        if wait:
            self.wait()
        return checkpoint

    def annotate(
        self, checkpoint: CheckpointId, *, metrics: Mapping[str, float] | None = None, tags: Sequence[str] = ()
    ) -> None:
        """Add metrics or tags to a checkpoint that was saved before they were known. Waits for it to be durable."""
        self._refuse_in_fork("annotate")
        tags = checked_tags(tags)
        self.wait()

        def write() -> dict[str, float]:
            if metrics or tags:
                self._write_note(checkpoint, metrics or {}, tags)
            return dict(metrics or {})

        # Rank 0's metrics: the others may have none, or other ones.
        told = self._ranks.loop.decide(f"adding to the checkpoint of step {checkpoint.step}", write)
        self._saved.annotate(checkpoint, told, tags)

    def annotate_step(self, step: int | None, metrics: Mapping[str, float]) -> None:
        """Add metrics to the checkpoint of a step, by default to the newest one. Waits for it to be durable.

        Raises:
            UsageError: No checkpoint of that step is on the line (any more).
        """
        self.wait()

        def choose() -> str:
            return str(self._saved.of_step(step, where=self.run_dir))

        # What rank 0 could not delete it still has in mind, and the others have not.
        found = self._ranks.loop.decide("choosing the checkpoint that takes metrics", choose)
        self.annotate(CheckpointId.parse(found), metrics=metrics)

    def tell_missing_monitor(self, metrics: Mapping[str, float]) -> None:
        """Warn, once, that the monitored metric has no value, where a save knows all metrics of its step."""
        if self.monitor and not self._has_told_monitor and self.monitor.metric not in {*self.seen, *metrics}:
            self._has_told_monitor = True
            given = ", ".join(map(repr, sorted(metrics)[:8])) or "none"
            what = "monitor=%r has no value: a checkpoint without one is never the best. Metrics given: %s"
            _log.warning(what, self.monitor.metric, given)

    def latest(self) -> CheckpointId | None:
        """Return the newest checkpoint on the line that this process knows to be durable."""
        return self._saved.latest()

    def best(self) -> tuple[CheckpointId, float] | None:
        """Return the best checkpoint on the line, and its value of the monitored metric."""
        return None if self.monitor is None else self._saved.best(self.monitor.metric, self.monitor.mode)

    def refuse_missing(self, selector: str) -> None:
        """Raise if nothing in the run answers to a selector.

        Raises:
            CheckpointNotFoundError: Nothing does.
        """

        def look() -> None:
            Catalog(self.storage).resolve(selector)

        self._ranks.loop.decide(f"looking for {selector}", look)

    def wait(self) -> None:
        """Wait until the last save is durable.

        Raises:
            SaveFailedError, Fenced: It failed.
        """
        self._writer.wait()

    def close(self, outcome: Outcome, *, step: int | None = None, error: str | None = None) -> None:
        """Wait for the last save, delete what was only kept for readers, and record how the attempt ended. Idempotent.

        Raises:
            SaveFailedError, Fenced: The last save failed.
        """
        # A forked child that leaves its parent's `with` block has nothing to end.
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        if self._unclosed is not None:
            self._unclosed.detach()
        try:
            self._writer.wait()
        except Exception as failure:
            with suppress(CkptmgrError, FileExistsError):
                self._record_end("failed", step, f"{type(failure).__name__}: {failure}")
            raise
        if self._is_accepted:
            self._saved.delete_the_rest(self._attempt)
        self._record_end(outcome, step, error)

    def abandon(self, error: BaseException) -> None:
        """Close as failed because of an error, which the caller raises whatever happens here."""
        with suppress(CkptmgrError, FileExistsError):
            self.close("failed", error=f"{type(error).__name__}: {error}")

    def _write_note(self, checkpoint: CheckpointId, metrics: Mapping[str, float], tags: Sequence[str]) -> None:
        note = Note(
            version=FORMAT_VERSION,
            checkpoint=str(checkpoint),
            attempt=self._attempt,
            created_at=utc_now(),
            metrics={name: metric_to_value(value) for name, value in metrics.items()},
            tags=tuple(tags),
        )
        refuse_if_fenced(self.storage, self._attempt)
        self.storage.write(note_key(checkpoint, self._attempt, self._nnotes), [encode_record(note)], exclusive=True)
        self._nnotes += 1

    def _record_end(self, outcome: Outcome, step: int | None, error: str | None) -> None:
        if error is not None:
            error = redact_text(error, secret_values(os.environ))[:_MAX_ERROR_LENGTH]
        if self._ranks.leads and self._attempt:
            record_end(self.storage, self._attempt, outcome, step=step, error=error)

    def _refuse_in_fork(self, action: str) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"cannot {action} in process {os.getpid()}: process {self._pid} opened {self.run_dir}",
                why="a forked child shares its parent's attempt, and two writers of one attempt cannot be told apart",
                next="save in the process that opened the run",
            )

    def _wait_for_writer(self, name: str) -> None:
        if not self._writer.is_busy:
            self._writer.wait()
            return
        began = time.monotonic()
        self._writer.wait()
        waited_s = time.monotonic() - began
        # Once. How long each save blocked stands in its own line.
        if waited_s >= _LONG_WAIT_S and not self._has_waited:
            self._has_waited = True
            _log.warning("%s waited %.2f s: saves are due faster than the storage takes them", name, waited_s)

    def _note_committed(
        self, facts: CheckpointFacts, manifest: Manifest | None, began: float, blocked_s: float
    ) -> None:
        checkpoint = CheckpointId.parse(facts.id)
        if manifest is not None:
            _log.info(
                "saved step %d (%s): %s in %s; training blocked %s, durable after %s",
                *(checkpoint.step, manifest.reason, format_nbytes(manifest.nbytes), printable_place(self.run_dir)),
                *(format_seconds(blocked_s), format_seconds(time.monotonic() - began)),
            )
            self._saved.manifests[checkpoint] = manifest
        self._saved.add(facts)
        self._saved.retain(self._attempt)


def _tell_unclosed(run_dir: str, pid: int) -> None:
    if os.getpid() == pid:
        _log.warning(
            "%s was not closed: what was trained after its last save is lost; use `with`, or call close()", run_dir
        )
