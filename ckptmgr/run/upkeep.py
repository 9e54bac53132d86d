"""Pruning a run in which nobody trains: judge every checkpoint, become the newest attempt, and delete.

Deleting is the newest attempt's right alone, so a claim comes first. It leads nowhere: an attempt without a line is
skipped by whoever looks for what to continue. A trainer that starts meanwhile claims the next number, and wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ckptmgr.errors import CkptmgrError, Fenced, RunInUseError
from ckptmgr.format.layout import CheckpointId
from ckptmgr.policy.retention import CheckpointFacts, RetentionPolicy, plan
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.life import Host, refuse_if_in_use
from ckptmgr.run.lineage import claim_attempt, record_end, refuse_if_fenced
from ckptmgr.run.prune import collect_temporary, collect_torn, delete_checkpoints
from ckptmgr.storage.protocol import HoldsTemporary

__all__ = ["Verdict", "has_leftovers", "judge", "prune_run"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of a committed checkpoint.

    Attributes:
        id: Which.
        is_kept: Whether it stays.
        reasons: Why, or why not; at least one.
        facts: None where its manifest cannot be read.
    """

    id: CheckpointId
    is_kept: bool
    reasons: tuple[str, ...]
    facts: CheckpointFacts | None


def judge(catalog: Catalog, policy: RetentionPolicy, *, abandoned: bool = False) -> list[Verdict]:
    """Decide about every committed checkpoint of a run, oldest first. Deletes nothing.

    Only what is on the line and intact is the policy's to judge. What is damaged stays: it may be all that is left.

    Args:
        catalog: The run.
        policy: What to keep on the line.
        abandoned: Whether checkpoints beside the line go, unless they are tagged.

    Raises:
        CorruptCheckpointError: The line cannot be followed.
    """
    on_line = set(catalog.on_line)
    problems = {id: catalog.why_not_intact(id) for id in catalog.committed}
    facts = {id: _facts(catalog, id) for id in catalog.committed}
    intact = [known for id in catalog.on_line if problems[id] is None and (known := facts[id]) is not None]
    decided = plan(policy, intact)
    verdicts = []
    for id in catalog.committed:
        known, name = facts[id], str(id)
        if name in decided.keep:
            verdicts.append(Verdict(id, True, decided.keep[name], known))
        elif name in decided.drop:
            verdicts.append(Verdict(id, False, (decided.drop[name],), known))
        elif id in on_line or known is None:
            verdicts.append(Verdict(id, True, (f"damaged: {problems[id]}",), known))
        else:
            tags = tuple(f"tagged {tag}" for tag in sorted(known.tags))
            verdicts.append(Verdict(id, not abandoned or bool(tags), ("not on the line", *tags), known))
    return verdicts


def has_leftovers(catalog: Catalog) -> bool:
    """Say whether cut-off saves, or temporary files, lie in a run."""
    storage = catalog.storage
    return bool(catalog.torn) or (isinstance(storage, HoldsTemporary) and bool(storage.list_temporary()))


def prune_run(
    catalog: Catalog, drop: Sequence[CheckpointId], *, force: bool = False, host: Host | None = None
) -> list[CheckpointId]:
    """Delete checkpoints, and what cut-off saves have left. Killed anywhere, each checkpoint is whole or gone.

    Args:
        catalog: The run, as the decision was made on.
        drop: What to delete.
        force: Also where the newest attempt may be alive on another host. It loses the run by this.
        host: Asked about its processes.

    Returns:
        What was deleted.

    Raises:
        RunInUseError: Somebody trains in the run, or started to while this went on. What was not deleted yet stays.
    """
    storage = catalog.storage
    refuse_if_in_use(catalog, host, force=force)
    try:
        attempt = claim_attempt(storage, catalog.attempts, is_patient=False).attempt
    except FileExistsError as error:
        raise RunInUseError(
            f"{storage.url} is in use", why="a process has just started in it", next="nothing was deleted; try later"
        ) from error
    before = set(catalog.committed)
    try:
        # Listed again: what was committed before the claim may refer to files of what is to go.
        fresh = Catalog(storage)
        delete_checkpoints(fresh, before & set(drop), check=lambda: refuse_if_fenced(storage, attempt))
        refuse_if_fenced(storage, attempt)
        collect_torn(fresh, attempt)
        collect_temporary(fresh, attempt)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}" if isinstance(error, CkptmgrError) else type(error).__name__
        with suppress(CkptmgrError, FileExistsError):
            record_end(storage, attempt, "failed", step=None, error=outcome)
        if isinstance(error, Fenced):
            raise RunInUseError(
                f"a process has started in {storage.url}", why=error.why, next="what was not deleted yet stays"
            ) from error
        raise
    record_end(storage, attempt, "finished", step=None)
    return sorted(before & set(drop))


def _facts(catalog: Catalog, id: CheckpointId) -> CheckpointFacts | None:
    try:
        return catalog.facts(id)
    except CkptmgrError:
        return None
