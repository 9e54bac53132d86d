"""What retention and ``best`` may know about a checkpoint, from its manifest and the notes beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from ckptmgr.format.manifest import Manifest, ManifestExcerpt, Note, metric_from_value
from ckptmgr.policy.retention import CheckpointFacts

__all__ = ["facts_from_plain", "facts_of", "facts_to_plain"]


def facts_of(manifest: Manifest | ManifestExcerpt, notes: Iterable[Note] = ()) -> CheckpointFacts:
    """Return the facts of a checkpoint. Later notes win."""
    metrics = {name: metric_from_value(value) for name, value in manifest.metrics.items()}
    tags = set(manifest.tags)
    for note in notes:
        metrics.update((name, metric_from_value(value)) for name, value in note.metrics.items())
        tags.update(note.tags)
    return CheckpointFacts(
        id=manifest.checkpoint,
        step=manifest.step,
        epoch=manifest.epoch,
        metrics=metrics,
        tags=frozenset(tags),
        created_at=_seconds(manifest.created_at),
        nbytes=manifest.nbytes,
    )


def _seconds(text: str) -> float | None:
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def facts_to_plain(facts: CheckpointFacts) -> dict[str, Any]:
    """Return facts as plain values, to be told to other ranks."""
    return {**asdict(facts), "tags": sorted(facts.tags)}


def facts_from_plain(plain: Mapping[str, Any]) -> CheckpointFacts:
    """Return the facts that rank 0 told."""
    return CheckpointFacts(**{**plain, "tags": frozenset(plain["tags"])})
