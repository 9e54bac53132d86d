"""One save of all ranks: agree on who writes what, write and seal, and let rank 0 commit what all have sealed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from xxhash import xxh3_128_hexdigest

from ckptmgr.errors import StateMismatchError, StorageError
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import FileRecord, Manifest, TensorRecord, Topology
from ckptmgr.format.payload import FilePayload
from ckptmgr.policy.retention import CheckpointFacts
from ckptmgr.ranks.group import Ranks
from ckptmgr.run.commit import CheckpointFields, Sealed, commit_checkpoint, commit_sealed, told_if_fenced, write_files
from ckptmgr.run.facts import facts_from_plain, facts_of, facts_to_plain
from ckptmgr.state.capture import dry_check
from ckptmgr.state.codec import EntryEncoder
from ckptmgr.state.divergence import OnDivergence, compared_digests, joined_digest, replica_digests
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.sharding import mesh_sizes
from ckptmgr.state.shares import Layout, Share, layout_digest, layout_of, plan_shares, refuse_different_layouts
from ckptmgr.storage.protocol import Storage

__all__ = ["JointSaves", "prove_state"]

_log = logging.getLogger("ckptmgr")

_SHOWN = 8


def prove_state(ranks: Ranks, capture: Callable[[], Sequence[CapturedEntry]]) -> None:
    """Prove, before anything is claimed, that every rank's state can be saved, and that the ranks hold the same.

    Args:
        ranks: The processes of the job.
        capture: Returns this rank's capture.

    Raises:
        UnsupportedStateError: A value that cannot be stored.
        StateMismatchError: The ranks do not hold the same tensors; tells which.
        RankFailure: A rank failed, is gone, or late.
    """
    layout: Layout = []

    def look() -> str:
        entries = capture()
        dry_check(entries)
        if ranks.world_size > 1:
            layout.extend(layout_of(entries, [EntryEncoder(entry) for entry in entries]))
        return layout_digest(layout)

    what = "looking at the state"
    if not ranks.loop.exchange(what, look, lambda digests: len(set(digests)) == 1):
        # With shards, layouts differ by design: their places in the whole do.
        ranks.loop.exchange(f"{what} of all ranks", lambda: layout, refuse_different_layouts)


class JointSaves:
    """The saves of one attempt, as its ranks make them together.

    Args:
        ranks: The processes of the job.
        on_divergence: What to do when ranks that should hold the same parameters and moments do not.
    """

    def __init__(self, ranks: Ranks, on_divergence: OnDivergence) -> None:
        self._ranks = ranks
        self._on_divergence = on_divergence
        self._known_layouts: list[str] = []
        self._nplans = 0
        self._plan_id = 0
        self._mine: frozenset[tuple[str, str]] = frozenset()
        self._is_proved = False

    def agree(self, what: str, entries: Sequence[CapturedEntry]) -> tuple[list[EntryEncoder], Share]:
        """Encode the state, and agree on what this rank writes of it. Waits for all ranks.

        Args:
            what: The save, in the same words on every rank.
            entries: This rank's capture.

        Raises:
            UnsupportedStateError: A value that cannot be stored.
            StateMismatchError: The ranks do not hold the same tensors; or, where that is asked for, the same values.
            RankFailure: A rank failed, is gone, or late.
        """
        encoders: list[EntryEncoder] = []
        layout: Layout = []

        def describe() -> dict[str, Any]:
            if not self._is_proved:
                dry_check(entries)
            encoders.extend(EntryEncoder(entry) for entry in entries)
            if self._ranks.world_size == 1:
                return {}
            layout.extend(layout_of(entries, encoders))
            is_checked = self._on_divergence != "off"
            return {
                "layout": layout_digest(layout),
                "plan": self._plan_id,
                "compared": compared_digests(entries, encoders),
                "content": joined_digest(replica_digests(entries, encoders)) if is_checked else None,
            }

        told = self._ranks.loop.exchange(what, describe, self._compare)
        self._is_proved = True
        if self._ranks.world_size == 1:
            return encoders, Share.OF_ONE
        if not told["is_known"]:
            plan = self._ranks.loop.exchange(f"sharing out {what}", lambda: layout, self._plan)
            self._mine = frozenset((layout[i][0], layout[i][1]) for i in plan["shares"][self._ranks.rank])
            self._plan_id = plan["id"]
        if told["has_diverged"]:
            self._tell_divergence(what, entries, encoders)
        own = frozenset((entry, name) for entry, name in told["own"])
        return encoders, Share(self._ranks.rank, self._ranks.world_size, self._mine, own)

    def write(
        self,
        what: str,
        storage: Storage,
        checkpoint: CheckpointId,
        files: Sequence[FilePayload],
        fields: CheckpointFields,
        encoders: Mapping[str, EntryEncoder],
    ) -> tuple[CheckpointFacts, Manifest | None]:
        """Write this rank's files, and commit once every rank has sealed its own. In the background.

        Args:
            what: The save, in the same words on every rank.
            storage: The run's root.
            checkpoint: The id of the save.
            files: What this rank writes.
            fields: The manifest, but for the files.
            encoders: The state's entries by name.

        Returns:
            Its facts, and on rank 0 the manifest. When this returns, the checkpoint is durable and acknowledged.

        Raises:
            Fenced, SaveFailedError, StorageError, RankFailure: On every rank. There is no new checkpoint, and the old
                ones are untouched.
        """
        if self._ranks.world_size == 1:
            manifest = commit_checkpoint(storage, checkpoint, files, fields)
            return facts_of(manifest), manifest
        committed: list[Manifest] = []

        def write() -> dict[str, Any]:
            if self._ranks.leads:
                with told_if_fenced(storage, checkpoint.attempt):
                    sealed = write_files(storage, checkpoint, files)
            else:
                sealed = write_files(storage, checkpoint, files)
            per_rank = [entry.name for entry in fields.entries if entry.scope == "per-rank"]
            return {
                "files": msgspec.to_builtins(sealed.files),
                "tensors": msgspec.to_builtins(sealed.tensors),
                "state": sealed.state,
                "own": {name: _content(encoders[name].tree, name, sealed) for name in per_rank},
            }

        def commit(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            parts = [
                Sealed(
                    msgspec.convert(report["files"], tuple[FileRecord, ...]),
                    msgspec.convert(report["tensors"], tuple[TensorRecord, ...]),
                    report["state"],
                )
                for report in reports
            ]
            own = reports[0]["own"]
            same = {name for name in own if all(report["own"].get(name) == own[name] for report in reports)}
            # Recorded, so that another number of ranks knows whether something is lost.
            scopes = {name: "replicated" if name in same else "per-rank" for name in own}
            entries = tuple(
                msgspec.structs.replace(entry, scope=scopes.get(entry.name, entry.scope)) for entry in fields.entries
            )
            sizes = mesh_sizes(tensor for encoder in encoders.values() for tensor in encoder.sharded)
            topology = Topology(world_size=self._ranks.world_size, mesh=sizes)
            whole = replace(fields, entries=entries, topology=topology)
            try:
                committed.append(commit_sealed(storage, checkpoint, parts, whole))
            except StorageError as error:
                raise StorageError(f"rank 0: {error.what}", why=error.why, next=error.next) from error
            return facts_to_plain(facts_of(committed[0]))

        facts = facts_from_plain(self._ranks.saves.exchange(what, write, commit))
        return facts, committed[0] if committed else None

    def _compare(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if len(results) == 1:
            return {}
        # Both names may have slashes in them, so they stay two.
        compared = [{(entry, name): digest for entry, name, digest in result["compared"]} for result in results]
        differing = [key for key, digest in compared[0].items() if any(c.get(key) != digest for c in compared)]
        return {
            # A rank that had given rank 0 up does not have the plan that was made without it.
            "is_known": [result["layout"] for result in results] == self._known_layouts
            and all(result["plan"] == self._nplans for result in results),
            "own": differing,
            "has_diverged": len({result["content"] for result in results}) > 1,
        }

    def _plan(self, layouts: Sequence[Layout]) -> dict[str, Any]:
        refuse_different_layouts(layouts)
        shares = plan_shares(layouts)
        self._known_layouts = [layout_digest(layout) for layout in layouts]
        self._nplans += 1
        return {"id": self._nplans, "shares": shares}

    def _tell_divergence(self, what: str, entries: Sequence[CapturedEntry], encoders: Sequence[EntryEncoder]) -> None:
        def told(digests: Sequence[Mapping[str, str]]) -> str:
            differing = {
                name: [rank for rank, other in enumerate(digests) if other.get(name) != digests[0][name]]
                for name in digests[0]
                if any(other.get(name) != digests[0][name] for other in digests)
            }
            shown = [f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in list(differing.items())[:_SHOWN]]
            more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            text = (
                f"{len(differing)} of {len(digests[0])} tensors differ from those of rank 0: {'; '.join(shown)}{more}"
            )
            if differing and self._on_divergence == "raise":
                raise StateMismatchError(
                    f"the replicas have diverged, at {what}",
                    why=text,
                    next="nothing was saved; look for a step that only some ranks take, or for randomness before the "
                    "first step; on_divergence='warn' saves rank 0's",
                )
            return text if differing else ""

        text = self._ranks.loop.exchange(
            f"comparing replicas at {what}", lambda: replica_digests(entries, encoders), told
        )
        if text and self._ranks.leads:
            _log.warning(
                "the replicas have diverged, at %s: %s; what is saved is each tensor as one rank has it", what, text
            )


def _content(tree: Any, entry: str, sealed: Sealed) -> str:
    """Return what two ranks' entries have in common if they are the same."""
    blocks: list[list[str | None]] = [[t.name, t.blocks] for t in sealed.tensors if t.entry == entry]
    blocks += [[file.name, file.digest] for file in sealed.files if file.entry == entry]
    return xxh3_128_hexdigest(json.dumps([tree, blocks]).encode())
