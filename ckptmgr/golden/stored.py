"""The entry of golden samples as a checkpoint has it, checked before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptmgr.errors import CorruptCheckpointError, FormatVersionError
from ckptmgr.golden.record import HANDLER, VERSION
from ckptmgr.golden.samples import MAX_SAMPLES
from ckptmgr.state.entry import CapturedEntry

__all__ = ["stored_golden"]


def stored_golden(entries: Mapping[str, CapturedEntry], *, reference: str) -> Mapping[str, Any] | None:
    """Return what `record.capture_golden` stored.

    Args:
        entries: Those of the checkpoint.
        reference: Names it.

    Returns:
        The tree; None where there is none, or where its samples could not be run at the save.

    Raises:
        FormatVersionError: A newer version wrote it.
        CorruptCheckpointError: It is no such tree.
    """
    found = [entry for entry in entries.values() if entry.handler == HANDLER]
    if not found:
        return None
    entry = found[0]
    if entry.version != VERSION:
        raise FormatVersionError(
            f"the golden samples of {reference} were stored by version {entry.version}",
            why=f"this program knows version {VERSION}",
            next="use the version of ckptmgr that the run used; golden=False loads without this proof",
        )
    try:
        _check(entry.tree)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCheckpointError(
            f"what {reference} holds are no golden samples",
            why=f"{type(error).__name__}: {str(error)[:200]}",
            next="verify the checkpoint: `ckptmgr verify`; golden=False loads without this proof",
        ) from error
    return entry.tree if entry.tree["samples"] else None


def _check(tree: Any) -> None:
    if not isinstance(tree, dict):
        raise TypeError(f"a {type(tree).__name__} instead of a dict")
    samples = tree["samples"]
    if not isinstance(samples, list) or len(samples) > MAX_SAMPLES:
        raise ValueError(f"the samples are no list of up to {MAX_SAMPLES}")
    for sample in samples:
        if not isinstance(sample, dict) or not {"raw", "inputs", "output"} <= sample.keys():
            raise ValueError("a sample without raw input, inputs and output")
    for name in ("rtol", "atol"):
        value = tree[name]
        if value is not None and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r:.80}")
    if not isinstance(tree["device"], str):
        raise TypeError("the device is no text")
    for name in ("encode", "predict"):
        described = tree[name]
        if described is None:
            continue
        if not isinstance(described, dict) or not isinstance(described["name"], str):
            raise TypeError(f"{name} is described by something else than a name")
        if not isinstance(described["source"], str | None):
            raise TypeError(f"the source of {name} is no text")
