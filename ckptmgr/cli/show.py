"""``ckptmgr show``: one checkpoint in full, or a run and its attempts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from ckptmgr.cli.arguments import OpenRun, json_option, open_run, run_dir_argument
from ckptmgr.cli.listing import AttemptSummary, explain, read_attempts
from ckptmgr.format.manifest import Manifest, metric_to_value

__all__ = ["command"]


@click.command(name="show")
@run_dir_argument("RUN_DIR[@REF]")
@json_option()
def command(reference: str, as_json: bool) -> None:
    """Show one checkpoint (RUN_DIR@REF), or a run and its process starts (RUN_DIR)."""
    run = open_run(reference)
    if run.selector is None:
        _show_run(run, as_json=as_json)
    else:
        _show_checkpoint(run, run.catalog.resolve(run.selector), as_json=as_json)


def _show_checkpoint(run: OpenRun, manifest: Manifest, *, as_json: bool) -> None:
    import msgspec

    from ckptmgr.cli.output import format_metrics, format_nbytes, print_json, print_pairs, print_table

    facts = run.catalog.facts(manifest.id)
    metrics = {name: metric_to_value(value) for name, value in facts.metrics.items()}
    problems = run.catalog.what_is_missing(manifest)
    entries = _entries(manifest)
    if as_json:
        document: dict[str, Any] = {
            "run_dir": run.catalog.storage.url,
            "run_id": manifest.run_id,
            "id": manifest.checkpoint,
            "step": manifest.step,
            "epoch": manifest.epoch,
            "attempt": manifest.attempt,
            "created_at": manifest.created_at,
            "reason": manifest.reason,
            "is_intact": not problems,
            "problems": problems,
            "metrics": metrics,
            "tags": sorted(facts.tags),
            "nbytes": manifest.nbytes,
            "continues": msgspec.to_builtins(manifest.continues),
            "topology": msgspec.to_builtins(manifest.topology),
            "environment": manifest.environment,
            "entries": entries,
            "files": [{"path": file.path, "nbytes": file.nbytes, "digest": file.digest} for file in manifest.files],
        }
        print_json(document)
        return
    continues = manifest.continues
    print_pairs(
        {
            "checkpoint": manifest.checkpoint,
            "run": f"{run.catalog.storage.url} ({manifest.run_id})",
            "step": str(manifest.step),
            "epoch": "" if manifest.epoch is None else str(manifest.epoch),
            "reason": manifest.reason,
            "created": manifest.created_at,
            "size": f"{format_nbytes(manifest.nbytes)} in {len(manifest.files)} files",
            "state": "intact" if not problems else "damaged: " + "; ".join(problems),
            "metrics": format_metrics(metrics),
            "tags": " ".join(sorted(facts.tags)),
            "line": f"attempt {manifest.attempt}"
            + (f", which continues step {continues.step} of attempt {continues.attempt}" if continues else ""),
            "ranks": str(manifest.topology.world_size),
            "written with": ", ".join(f"{name} {version}" for name, version in manifest.environment.items()),
        }
    )
    print()
    print_table(
        ["entry", "handler", "tensors", "size", "dtypes"],
        [
            [
                entry["name"],
                f"{entry['handler']} v{entry['handler_version']}",
                str(entry["ntensors"]),
                format_nbytes(entry["nbytes"]),
                " ".join(entry["dtypes"]),
            ]
            for entry in entries
        ],
        right=["tensors", "size"],
    )
    print()
    print_table(["file", "size"], [[file.path, format_nbytes(file.nbytes)] for file in manifest.files], right=["size"])


def _entries(manifest: Manifest) -> list[dict[str, Any]]:
    ntensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    for tensor in manifest.tensors:
        ntensors[tensor.entry] += 1
        nbytes[tensor.entry] += tensor.nbytes
        dtypes.setdefault(tensor.entry, set()).add(tensor.logical_dtype or tensor.dtype)
    return [
        {
            "name": entry.name,
            "handler": entry.handler,
            "handler_version": entry.handler_version,
            "ntensors": ntensors[entry.name],
            "nbytes": nbytes[entry.name],
            "dtypes": sorted(dtypes.get(entry.name, ())),
        }
        for entry in manifest.entries
    ]


def _show_run(run: OpenRun, *, as_json: bool) -> None:
    import msgspec

    from ckptmgr.cli.output import note, print_json, print_pairs, print_table
    from ckptmgr.launch.relaunch import shell_line

    attempts = read_attempts(run.catalog)
    marker = run.catalog.marker
    if as_json:
        print_json(
            {
                "run_dir": run.catalog.storage.url,
                "run_id": marker.run_id,
                "created_at": marker.created_at,
                "parent": marker.parent,
                "ncheckpoints": len(run.catalog.committed),
                "attempts": [
                    {
                        "number": attempt.number,
                        "outcome": _outcome(attempt),
                        "claim": msgspec.to_builtins(attempt.claim),
                        "line": msgspec.to_builtins(attempt.line),
                        "start": msgspec.to_builtins(attempt.start),
                        "command": None if attempt.start is None else shell_line(attempt.start.argv),
                        "end": msgspec.to_builtins(attempt.end),
                        "problems": [explain(problem) for problem in attempt.problems],
                    }
                    for attempt in attempts
                ],
            }
        )
        return
    print_pairs(
        {
            "run": f"{run.catalog.storage.url} ({marker.run_id})",
            "created": marker.created_at,
            "checkpoints": str(len(run.catalog.committed)),
        }
    )
    print()
    print_table(
        ["attempt", "started", "host", "continues", "outcome", "code", "command"],
        [
            [
                str(attempt.number),
                attempt.claim.claimed_at if attempt.claim else "?",
                f"{attempt.claim.host}:{attempt.claim.pid}" if attempt.claim else "?",
                _continues(attempt),
                _outcome(attempt),
                _code(attempt),
                shell_line(attempt.start.argv) if attempt.start else "",
            ]
            for attempt in attempts
        ],
        right=["attempt"],
    )
    for attempt in attempts:
        for problem in attempt.problems:
            note(f"attempt {attempt.number}: {explain(problem)}")


def _continues(attempt: AttemptSummary) -> str:
    if attempt.line is None:
        return ""
    continues = attempt.line.continues
    return "nothing" if continues is None else f"step {continues.step} of attempt {continues.attempt}"


def _outcome(attempt: AttemptSummary) -> str:
    if attempt.end is None:
        return "running or killed"
    step = "" if attempt.end.step is None else f" at step {attempt.end.step}"
    # The first line says what happened; --json has all of them. An exception without a message leaves its colon.
    error = (attempt.end.error or "").partition("\n")[0].rstrip(": ")
    return f"{attempt.end.outcome}{step}" + (f": {error}" if error else "")


def _code(attempt: AttemptSummary) -> str:
    git = attempt.start.git if attempt.start else None
    if git is None or git.commit is None:
        return ""
    return git.commit[:10] + (" (changed)" if git.is_dirty else "")
