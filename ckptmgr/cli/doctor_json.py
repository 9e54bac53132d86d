"""A diagnosis as one JSON document: complete, whatever its length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.diagnosis import Diagnosis
from ckptmgr.diagnose.difference import Change, Difference, Proposal, SelectionPart

__all__ = ["as_document"]


def as_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return everything that a diagnosis tells, as plain values."""
    artifact = diagnosis.artifact
    document: dict[str, Any] = {
        "place": artifact.place,
        "kind": artifact.kind,
        "title": artifact.title,
        "certainty": artifact.certainty,
        "nbytes": artifact.nbytes,
        "is_well": diagnosis.is_well,
        "is_damaged": diagnosis.is_damaged,
        "versions": dict(artifact.versions),
        "contents": dict(artifact.contents),
        "tensors": None if artifact.tensors is None else [_tensor(it) for it in artifact.tensors],
        "globals": [{"name": it.name, "verdict": it.verdict, "found": it.found} for it in artifact.globals],
        "problems": list(artifact.problems),
        "drift": [
            {"name": it.name, "then": it.then, "now": it.now, "grade": it.grade, "why": it.why}
            for it in diagnosis.drifts
        ],
        "advice": list(diagnosis.advice),
        "details": _plain(artifact.details),
    }
    if diagnosis.against is not None:
        document["against"] = diagnosis.against
        document["uncomparable"] = diagnosis.uncomparable
    if diagnosis.difference is not None:
        document["difference"] = _difference(diagnosis.difference)
        document["code"] = list(diagnosis.code())
        document["reference"] = diagnosis.reference
        document["selection"] = diagnosis.selection
    return document


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "fits": difference.fits,
        "fits_after": difference.fits_after,
        "matched": list(difference.matched),
        "missing": [_tensor(it) for it in difference.missing],
        "unexpected": [_tensor(it) for it in difference.unexpected],
        "shape": [_change(it) for it in difference.shape],
        "dtype": [_change(it) for it in difference.dtype],
        "proposals": [_proposal(it) for it in difference.proposals],
        "after": {
            "missing": list(difference.missing_after),
            "unexpected": list(difference.unexpected_after),
            "shape": list(difference.shape_after),
        },
    }


def _tensor(tensor: TensorFacts) -> dict[str, Any]:
    found: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    return found if tensor.tied_to is None else {**found, "tied_to": tensor.tied_to}


def _change(change: Change) -> dict[str, Any]:
    return {"name": change.name, "saved": _tensor(change.saved), "live": _tensor(change.live)}


def _proposal(proposal: Proposal) -> dict[str, Any]:
    return {
        "kind": proposal.kind,
        "certainty": proposal.certainty,
        "summary": proposal.summary,
        "reason": proposal.reason,
        "covers": [list(pair) for pair in proposal.covers],
        "code": list(proposal.code),
        "selection": _part(proposal.selection),
        "candidates": [
            {"summary": it.summary, "code": list(it.code), "selection": _part(it.selection)}
            for it in proposal.candidates
        ],
    }


def _part(part: SelectionPart | None) -> dict[str, Any] | None:
    if part is None:
        return None
    return {
        "rename": dict(part.rename),
        "exclude": list(part.exclude),
        "resize": dict(part.resize),
        "dtype": part.dtype,
    }


def _plain(value: Any) -> Any:
    """Return what a file tells as plain JSON: it may hold anything."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
