"""What retention and ``best`` may know about a checkpoint, from its manifest and the notes beside it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from ckptmgr.format.manifest import Manifest, ManifestExcerpt, Note, metric_from_value
from ckptmgr.policy.retention import CheckpointFacts

__all__ = ["facts_of"]


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
