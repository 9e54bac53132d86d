"""Becoming a run's newest attempt: look at what is there, choose what to continue, claim, and look again."""

from __future__ import annotations

import secrets
from typing import Any

from ckptmgr.errors import CheckpointNotFoundError
from ckptmgr.fork import refuse_cut_off_fork
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import encode_record
from ckptmgr.launch.experiment import current_experiment
from ckptmgr.launch.requested import hint_at_choice
from ckptmgr.launch.start_record import describe_start
from ckptmgr.loading import LoadedCheckpoint, choose_checkpoint
from ckptmgr.ranks.group import Ranks
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, create_marker
from ckptmgr.run.reference import Reference
from ckptmgr.state.sharding import LiveShards
from ckptmgr.storage.protocol import Storage

__all__ = ["RunClaim"]


class RunClaim:
    """The way of one job into a run. Rank 0 looks and claims, the others learn what came of it.

    Args:
        storage: The run's root.
        run_dir: The same, as the user named it.
        resume: ``auto``, ``must``, ``never``, or a selector.
        ranks: The processes of the job.

    Attributes:
        has_changed: Other checkpoints can be continued after the claim than before it.
    """

    def __init__(self, storage: Storage, run_dir: str, resume: str, ranks: Ranks) -> None:
        self.has_changed = False
        self._storage = storage
        self._run_dir = run_dir
        self._resume = resume
        self._ranks = ranks
        self._wanted = Reference(run_dir, "latest" if resume in ("auto", "must", "never") else resume)
        self._catalog: Catalog | None = None
        self._run_id: str | None = None

    def look(self) -> bool:
        """Say whether there is something to continue.

        Raises:
            CheckpointNotFoundError: ``resume`` wants a checkpoint that is not there.
            FormatVersionError: The run was made by a newer format.
            UsageError: The run is a fork that was cut off.
        """
        return self._ranks.loop.decide(f"opening {self._run_dir}", self._look)

    def choose(self, shards: LiveShards | None) -> LoadedCheckpoint:
        """Load what is to be continued.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError, RankFailure: As `choose_checkpoint`.
        """
        return choose_checkpoint(self._catalog, self._storage, self._wanted, None, ranks=self._ranks, shards=shards)

    def claim(self) -> tuple[str, int]:
        """Claim the run, creating it if need be; return its id, and the attempt."""
        told = self._ranks.loop.decide(f"claiming {self._run_dir}", self._claim)
        self.has_changed = told["has_changed"]
        return told["run_id"], told["attempt"]

    def _look(self) -> bool:
        if self._resume not in ("auto", "never"):
            try:
                Catalog.of_existing_run(self._storage).resolve(self._wanted.selector)
            except CheckpointNotFoundError as error:
                raise hint_at_choice(error, self._resume) from error
        self._catalog = Catalog(self._storage)
        refuse_cut_off_fork(self._catalog, self._run_dir)
        self._run_id = self._catalog.run_id
        return self._resume != "never" and bool(self._catalog.on_line or self._resume != "auto")

    def _claim(self) -> dict[str, Any]:
        before = self._catalog
        assert before is not None
        if not before.is_run:
            create_marker(self._storage, self._run_id or secrets.token_hex(8))
        attempt = claim_attempt(self._storage, before.attempts).attempt
        # Listed again: what was committed before the claim, and only that, can be chosen.
        self._catalog = Catalog(self._storage)
        _record_start(self._storage, attempt, self._run_dir)
        has_changed = self._resume != "never" and self._catalog.on_line != before.on_line
        return {"run_id": self._catalog.run_id or "", "attempt": attempt, "has_changed": has_changed}


def _record_start(storage: Storage, attempt: int, run_dir: str) -> None:
    experiment = current_experiment()
    if experiment is not None:
        # Before the record that holds their digests.
        storage.write(attempt_key(attempt, "config"), [experiment.config.encode()])
        storage.write(attempt_key(attempt, "resolved"), [experiment.resolved.encode()])
    storage.write(attempt_key(attempt, "start"), [encode_record(describe_start(run_dir=run_dir))])
