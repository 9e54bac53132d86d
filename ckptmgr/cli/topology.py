"""The ranks of a checkpoint in words: how many there were, and which state they had in common."""

from __future__ import annotations

from collections import Counter

from ckptmgr.format.manifest import EntryRecord, Manifest, Topology
from ckptmgr.format.payload import Scope

__all__ = ["count_of_ranks", "describe_scope", "describe_topology", "tensor_scopes"]


def count_of_ranks(count: int) -> str:
    """Return ``1 rank`` or ``4 ranks``."""
    return "1 rank" if count == 1 else f"{count} ranks"


def describe_topology(topology: Topology) -> str:
    """Return the ranks, and the dimensions of their mesh with a multiplication sign between them."""
    mesh = " \N{MULTIPLICATION SIGN} ".join(f"{name} {size}" for name, size in topology.mesh.items())
    return count_of_ranks(topology.world_size) + (f" ({mesh})" if mesh else "")


def tensor_scopes(manifest: Manifest) -> dict[str, Counter[Scope]]:
    """Count the tensors of each entry by scope. One in many shards, or that each rank has for itself, is one."""
    named: dict[tuple[str, str], Scope] = {(record.entry, record.name): record.scope for record in manifest.tensors}
    counts: dict[str, Counter[Scope]] = {entry.name: Counter() for entry in manifest.entries}
    for (entry, _), scope in named.items():
        counts[entry][scope] += 1
    return counts


def describe_scope(entry: EntryRecord, scopes: Counter[Scope]) -> str:
    """Return what of an entry the ranks have in common: ``replicated``, or ``sharded 4, replicated 2``.

    Args:
        entry: The entry.
        scopes: Its tensors by scope.
    """
    if entry.scope == "per-rank" or set(scopes) == {"per-rank"}:
        return "per-rank"
    if len(scopes) > 1:
        return ", ".join(f"{scope} {count}" for scope, count in scopes.most_common())
    return next(iter(scopes), "replicated")
