"""The runs of a directory, as ``ckptmgr ls DIR`` prints them."""

from __future__ import annotations

from ckptmgr.errors import RunNotFoundError
from ckptmgr.format.manifest import metric_to_value
from ckptmgr.run.discover import MAX_DEPTH, find_runs
from ckptmgr.run.overview import RunOverview, look_at_all
from ckptmgr.storage.protocol import Storage

__all__ = ["list_runs"]

_MAX_REMARK = 60


def list_runs(storage: Storage, *, as_json: bool) -> None:
    """Print one line for each run below a storage's root.

    Raises:
        RunNotFoundError: There is none.
    """
    from ckptmgr.cli.output import print_json, print_table

    found = find_runs(storage)
    if not found:
        raise RunNotFoundError(
            f"no run in {storage.url}",
            why=f"neither it nor a directory up to {MAX_DEPTH} levels below it holds one",
            next="give the directory that the manager was given, or one above it",
        )
    runs = look_at_all(found)
    if as_json:
        print_json({"directory": storage.url, "runs": [_document(run) for run in runs]})
        return
    print_table(
        ["run", "state", "step", "epoch", "age", "best", "checkpoints", "size", "attempts", "remarks"],
        [_row(run) for run in runs],
        right=["step", "epoch", "age", "checkpoints", "size", "attempts"],
    )


def _row(run: RunOverview) -> list[str]:
    from ckptmgr.cli.output import format_age, format_nbytes

    # What a state already says needs no words; why one failed, or is not known, does.
    remarks = [run.life.detail] if run.life.state in ("failed", "unknown") else []
    if run.problem is not None:
        remarks.append(run.problem)
    return [
        run.name,
        run.life.state,
        "" if run.step is None else str(run.step),
        "" if run.epoch is None else str(run.epoch),
        "" if run.saved_at is None else format_age(run.saved_at),
        "" if run.best is None else f"{run.best.metric}={run.best.value:.4g}@{run.best.step}",
        str(run.ncheckpoints),
        format_nbytes(run.nbytes),
        str(run.nattempts),
        _shortened("; ".join(remark for remark in remarks if remark)),
    ]


def _shortened(text: str) -> str:
    """Keep a remark to one line; ``ckptmgr show`` and ``--json`` have all of it."""
    return text if len(text) <= _MAX_REMARK else f"{text[: _MAX_REMARK - 1].rstrip()}…"


def _document(run: RunOverview) -> dict[str, object]:
    return {
        "name": run.name,
        "url": run.url,
        "state": run.life.state,
        "detail": run.life.detail,
        "step": run.step,
        "epoch": run.epoch,
        "saved_at": run.saved_at,
        "created_at": run.created_at,
        "best": None
        if run.best is None
        else {"metric": run.best.metric, "value": metric_to_value(run.best.value), "step": run.best.step},
        "ncheckpoints": run.ncheckpoints,
        "nattempts": run.nattempts,
        "nbytes": run.nbytes,
        "problem": run.problem,
    }
