"""The checkpoints of the line that this process knows to be durable, and what retention does about them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import Manifest
from ckptmgr.policy.retention import CheckpointFacts, RetentionPolicy, best, plan
from ckptmgr.policy.triggers import MetricSpan, widen_spans
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import refuse_if_fenced
from ckptmgr.run.prune import collect_temporary, collect_torn, delete_checkpoints
from ckptmgr.storage.protocol import Storage

__all__ = ["SavedSoFar"]

_log = logging.getLogger("ckptmgr")


class SavedSoFar:
    """Keeps the facts of checkpoints, and deletes what may go.

    Args:
        storage: The run's root.
        retention: What to keep.
        deletes: Whether this process is the one that deletes; the other ranks only keep in mind what it does.

    Attributes:
        manifests: Those that were read or written, by id.
        seen: Span of each metric over the saves of the line so far.
    """

    def __init__(self, storage: Storage, retention: RetentionPolicy, *, deletes: bool) -> None:
        self.manifests: dict[CheckpointId, Manifest] = {}
        self.seen: dict[str, MetricSpan] = {}
        self._storage = storage
        self._retention = retention
        self._deletes = deletes
        self._facts: dict[CheckpointId, CheckpointFacts] = {}
        self._dropping: set[CheckpointId] = set()

    def add(self, facts: CheckpointFacts) -> None:
        """Note a durable checkpoint."""
        self._facts[CheckpointId.parse(facts.id)] = facts
        self.seen = widen_spans(self.seen, facts.metrics)

    def annotate(self, checkpoint: CheckpointId, metrics: Mapping[str, float], tags: Sequence[str]) -> None:
        """Note metrics and tags that came later."""
        self.seen = widen_spans(self.seen, metrics)
        known = self._facts.get(checkpoint)
        if known is not None:
            self._facts[checkpoint] = replace(known, metrics={**known.metrics, **metrics}, tags=known.tags | set(tags))

    def of_step(self, step: int | None, *, where: str) -> CheckpointId:
        """Return the newest checkpoint of a step, or of all.

        Raises:
            UsageError: There is none (any more).
        """
        found = max((id for id in self._facts if step is None or id.step == step), default=None)
        if found is not None:
            return found
        steps = ", ".join(str(step) for step in sorted({id.step for id in self._facts})[-8:])
        raise UsageError(
            f"no checkpoint of step {step!r} can take metrics in {where}"
            if step is not None
            else f"no checkpoint can take metrics in {where}: nothing was saved yet",
            why=f"it was never saved, or retention has dropped it; saved are: {steps}" if steps else None,
            next="add metrics to a step that is saved, or save first",
        )

    def latest(self) -> CheckpointId | None:
        """Return the newest one."""
        return max(self._facts, default=None)

    def best(self, metric: str, mode: Literal["min", "max"]) -> tuple[CheckpointId, float] | None:
        """Return the best one, and its value of a metric."""
        found = best(list(self._facts.values()), metric, mode)
        return None if found is None else (CheckpointId.parse(found.id), found.metrics[metric])

    def retain(self, attempt: int) -> None:
        """Decide what may go, and delete what might go already at the last save and may still."""
        dropped = {CheckpointId.parse(id) for id in plan(self._retention, list(self._facts.values())).drop}
        # One save behind: a reader that has just resolved a reference can still read what it names.
        self._delete(self._dropping & dropped, attempt)
        self._dropping = dropped - self._dropping

    def delete_the_rest(self, attempt: int) -> None:
        """Delete what was only kept for readers."""
        self._delete(self._dropping, attempt)

    def _delete(self, drop: set[CheckpointId], attempt: int) -> None:
        try:
            if self._deletes and not self._delete_stored(drop, attempt):
                return
        except CkptmgrError as error:
            # The save itself is durable. What could not be deleted is tried again at the next one.
            _log.warning("could not delete old checkpoints: %s", error)
            return
        for checkpoint in drop:
            self._facts.pop(checkpoint, None)
            self.manifests.pop(checkpoint, None)

    def _delete_stored(self, drop: set[CheckpointId], attempt: int) -> bool:
        catalog = Catalog(self._storage, known=self.manifests)
        refuse_if_fenced(self._storage, attempt)
        if catalog.line.head != attempt:
            _log.warning("nothing old is deleted: the line of attempt %d cannot be read", attempt)
            return False
        # Checkpoints beside the line stay: who went back by mistake, or started anew, finds all of them again.
        delete_checkpoints(catalog, drop)
        collect_torn(catalog, attempt)
        collect_temporary(catalog, attempt)
        return True
