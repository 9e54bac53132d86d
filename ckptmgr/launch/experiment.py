"""What this process is building from a configuration, for the record of its start.

A manager opens the run, but does not know that a configuration made it. So whoever builds from one says so here, for as
long as it builds and trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from ckptmgr.format.digest import block_digests, combined_digest

__all__ = ["Experiment", "ExperimentRecord", "building_experiment", "current_experiment", "document_digest"]


class ExperimentRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The part of ``start.json`` that a configured experiment has.

    Attributes:
        source: The configuration as it was named; None where the run's own was used.
        config_digest: Of ``config.yaml`` beside the record, as text.
        resolved_digest: Of ``resolved.yaml``.
        overrides: As they were typed at this start, without secrets.
        changes: How the configuration differs from the one before it in this run, in words, without secrets.
        redacted: Keys whose values are secret and were not stored.
    """

    source: str | None = None
    config_digest: str
    resolved_digest: str
    overrides: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    redacted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Experiment:
    """A configured experiment, as it may be stored: nothing in it is secret.

    Attributes:
        config: The composed configuration, unresolved, as YAML.
        resolved: The same, resolved.
        record: What the record of the start says about it.
    """

    config: str
    resolved: str
    record: ExperimentRecord


_current: list[Experiment] = []


@contextmanager
def building_experiment(experiment: Experiment) -> Iterator[None]:
    """Record an experiment with every run that this process opens within the block."""
    _current.append(experiment)
    try:
        yield
    finally:
        _current.pop()


def current_experiment() -> Experiment | None:
    """Return what this process is building, if it builds from a configuration."""
    return _current[-1] if _current else None


def document_digest(document: bytes) -> str:
    """Return the digest of a stored document, as hex."""
    return combined_digest(block_digests(document))
