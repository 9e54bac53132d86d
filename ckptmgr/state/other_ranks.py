"""What becomes of each rank's own state when another number of ranks goes on with it; said aloud where it matters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from ckptmgr.format.manifest import Manifest
from ckptmgr.ranks.group import Ranks
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.rng import derived_rng

__all__ = ["for_ranks"]

_log = logging.getLogger("ckptmgr")

# What knows by itself what another number of ranks means to it, and random numbers.
_SILENT = ("data-position", "lightning-data", "lightning-metrics", "rng")


def for_ranks(entries: Mapping[str, CapturedEntry], manifest: Manifest, ranks: Ranks) -> dict[str, CapturedEntry]:
    """Adapt loaded entries to this rank, where the job has another number of ranks than the one that saved.

    A rank that is new gets random numbers of its own, derived from those of rank 0. What other state a rank had for
    itself, a new rank takes from rank 0; what the ranks that are gone had, is left. Data positions know by themselves
    what another number of ranks means to them.

    Args:
        entries: As this rank has read them.
        manifest: The checkpoint's.
        ranks: Of this job.
    """
    saved, now = manifest.topology.world_size, ranks.world_size
    if saved == now:
        return dict(entries)
    if ranks.leads:
        _log.info("step %d was saved by %s, and goes on on %s", manifest.step, _count(saved), _count(now))
        own = [e.name for e in entries.values() if e.scope == "per-rank" and e.handler not in _SILENT]
        if own and saved > 1:
            gone = f"what ranks {now} to {saved - 1} had is left" if now < saved else "new ranks take that of rank 0"
            _log.warning("each rank had its own %s: %s", ", ".join(own), gone)
    if ranks.rank < saved:
        return dict(entries)
    return {
        name: replace(entry, tree=derived_rng(entry.tree, rank=ranks.rank)) if entry.handler == "rng" else entry
        for name, entry in entries.items()
    }


def _count(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
