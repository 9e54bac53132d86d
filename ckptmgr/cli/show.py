"""``ckptmgr show``: one checkpoint in full, a run's story, its configuration, or several runs side by side."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import click

from ckptmgr.cli.arguments import OpenRun, json_option, open_run, quiet_option
from ckptmgr.cli.complete import complete_reference
from ckptmgr.cli.listing import AttemptSummary, explain, read_attempts
from ckptmgr.cli.nproc import nproc_option
from ckptmgr.cli.story import tell_story
from ckptmgr.cli.topology import count_of_ranks, describe_scope, describe_topology, tensor_scopes
from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError, UsageError
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.manifest import Manifest, RunMarker, metric_to_value
from ckptmgr.run.catalog import Catalog

__all__ = ["command"]


@click.command(name="show")
@click.argument("references", metavar="RUN_DIR[@REF]...", nargs=-1, required=True, shell_complete=complete_reference)
@click.option("--config", "which", flag_value="config", help="Print the configuration that it was built from.")
@click.option("--resolved", "which", flag_value="resolved", help="The same, with everything in it resolved.")
@nproc_option("Say what becomes of a checkpoint's state when N ranks go on with it.")
@quiet_option()
@json_option()
def command(
    references: Sequence[str], which: Literal["config", "resolved"] | None, nproc: int | None, as_json: bool
) -> None:
    """Show one checkpoint (RUN_DIR@REF), the story of a run (RUN_DIR), or what sets several runs apart (RUN_DIR...)."""
    runs = [open_run(reference) for reference in references]
    if nproc is not None and (which is not None or len(runs) > 1 or runs[0].selector is None):
        raise UsageError(
            "--nproc is about one checkpoint",
            next=f"ckptmgr show {runs[0].run_dir}@{runs[0].selector or 'latest'} --nproc {nproc}",
        )
    if which is not None and len(runs) == 1:
        _print_config(runs[0], which, as_json=as_json)
    elif which is not None:
        raise UsageError(f"--{which} is about one run", next=f"ckptmgr show --{which} {references[0]}")
    elif len(runs) > 1:
        from ckptmgr.cli.compare import print_comparison

        print_comparison(runs, as_json=as_json)
    elif runs[0].selector is None:
        _show_run(runs[0], as_json=as_json)
    else:
        _show_checkpoint(runs[0], runs[0].catalog.resolve(runs[0].selector), nproc=nproc, as_json=as_json)


def _show_checkpoint(run: OpenRun, manifest: Manifest, *, nproc: int | None, as_json: bool) -> None:
    import msgspec

    from ckptmgr.cli.output import format_metrics, format_nbytes, format_time, print_json, print_pairs, print_table
    from ckptmgr.cli.remap import remap
    from ckptmgr.run.reader import CheckpointReader

    facts = run.catalog.facts(manifest.id)
    metrics = {name: metric_to_value(value) for name, value in facts.metrics.items()}
    problems = run.catalog.what_is_missing(manifest)
    entries = _entries(manifest)
    remapped = [] if nproc is None else remap(CheckpointReader(run.catalog.storage, manifest), nproc)
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
        if nproc is not None:
            document["on_nproc"] = {"nproc": nproc, "entries": [dataclasses.asdict(entry) for entry in remapped]}
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
            "created": f"{format_time(manifest.created_at)} UTC",
            "size": f"{format_nbytes(manifest.nbytes)} in {len(manifest.files)} files",
            "state": "intact" if not problems else "damaged: " + "; ".join(problems),
            "metrics": format_metrics(metrics),
            "tags": " ".join(sorted(facts.tags)),
            "line": f"attempt {manifest.attempt}"
            + (f", which continues step {continues.step} of attempt {continues.attempt}" if continues else ""),
            "ranks": describe_topology(manifest.topology),
            "written with": ", ".join(f"{name} {version}" for name, version in manifest.environment.items()),
        }
    )
    print()
    print_table(
        ["entry", "handler", "ranks", "tensors", "size", "dtypes", "fingerprint"],
        [
            [
                entry["name"],
                f"{entry['handler']} v{entry['handler_version']}",
                entry["scope"] if manifest.topology.world_size > 1 else "",
                str(entry["ntensors"]),
                format_nbytes(entry["nbytes"]),
                " ".join(entry["dtypes"]),
                entry["fingerprint"] or "",
            ]
            for entry in entries
        ],
        right=["tensors", "size"],
    )
    if nproc is not None:
        print()
        print_table(["entry", f"on {count_of_ranks(nproc)}"], [[entry.entry, entry.words] for entry in remapped])
    print()
    print_table(["file", "size"], [[file.path, format_nbytes(file.nbytes)] for file in manifest.files], right=["size"])


def _entries(manifest: Manifest) -> list[dict[str, Any]]:
    scopes = tensor_scopes(manifest)
    nbytes: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    for tensor in manifest.tensors:
        nbytes[tensor.entry] += tensor.nbytes
        dtypes.setdefault(tensor.entry, set()).add(tensor.logical_dtype or tensor.dtype)
    for file in manifest.files:
        if file.entry is not None:
            nbytes[file.entry] += file.nbytes
    return [
        {
            "name": entry.name,
            "handler": entry.handler,
            "handler_version": entry.handler_version,
            "scope": describe_scope(entry, scopes[entry.name]),
            "tensor_scopes": dict(scopes[entry.name]),
            "ntensors": scopes[entry.name].total(),
            "nbytes": nbytes[entry.name],
            "dtypes": sorted(dtypes.get(entry.name, ())),
            "fingerprint": entry.fingerprint,
        }
        for entry in manifest.entries
    ]


def _show_run(run: OpenRun, *, as_json: bool) -> None:
    import msgspec

    from ckptmgr.cli.listing import list_run
    from ckptmgr.cli.output import format_metrics, format_time, note, print_json, print_pairs, print_table
    from ckptmgr.launch.relaunch import shell_line
    from ckptmgr.run.life import life_of

    attempts = read_attempts(run.catalog)
    listing = list_run(run.catalog)
    marker = _marker(run.catalog)
    parent = marker.parent if marker else None
    chapters = tell_story(run.catalog, attempts, life=life_of(run.catalog))
    if as_json:
        print_json(
            {
                "run_dir": run.catalog.storage.url,
                "run_id": run.catalog.run_id,
                "created_at": marker.created_at if marker else None,
                "parent": parent,
                "ncheckpoints": len(run.catalog.committed),
                "attempts": [
                    {
                        "number": attempt.number,
                        "began": chapter.began,
                        "changes": list(chapter.changes),
                        "outcome": chapter.ended,
                        "nsaved": chapter.nsaved,
                        "claim": msgspec.to_builtins(attempt.claim),
                        "line": msgspec.to_builtins(attempt.line),
                        "start": msgspec.to_builtins(attempt.start),
                        "command": None if attempt.start is None else shell_line(attempt.start.argv),
                        "end": msgspec.to_builtins(attempt.end),
                        "problems": [explain(problem) for problem in attempt.problems],
                    }
                    for attempt, chapter in zip(attempts, chapters, strict=True)
                ],
            }
        )
        return
    latest = next((summary for summary in listing.checkpoints if summary.is_latest), None)
    best = next((summary for summary in listing.checkpoints if summary.best_of), None)
    saved = [str(len(listing.checkpoints))]
    if latest is not None:
        saved.append(f"newest step {latest.step}")
    if best is not None and best.best_of:
        saved.append(f"best {format_metrics({best.best_of: best.metrics.get(best.best_of)})} at step {best.step}")
    print_pairs(
        {
            "run": f"{run.catalog.storage.url} ({run.catalog.run_id})",
            "created": f"{format_time(marker.created_at)} UTC" if marker else "",
            "forked from": parent or "",
            "configuration": _source(attempts),
            "checkpoints": ", ".join(saved),
        }
    )
    print()
    print_table(
        ["attempt", "time", "began", "changed", "ended", "checkpoints", "host", "code", "command"],
        [
            [
                str(chapter.number),
                format_time(attempt.claim.claimed_at) if attempt.claim else "?",
                chapter.began,
                "; ".join(chapter.changes),
                chapter.ended,
                str(chapter.nsaved or ""),
                f"{attempt.claim.host}:{attempt.claim.pid}" if attempt.claim else "?",
                _code(attempt),
                shell_line(attempt.start.argv) if attempt.start and not attempt.start.fork_of else "",
            ]
            for attempt, chapter in zip(attempts, chapters, strict=True)
        ],
        right=["attempt", "checkpoints"],
    )
    for attempt in attempts:
        for problem in attempt.problems:
            note(f"attempt {attempt.number}: {explain(problem)}")


def _marker(catalog: Catalog) -> RunMarker | None:
    try:
        return catalog.marker
    except CkptmgrError:
        # The manifests tell which run it is; when it was created is not worth an error.
        return None


def _source(attempts: Sequence[AttemptSummary]) -> str:
    sources = [attempt.start.experiment.source for attempt in attempts if attempt.start and attempt.start.experiment]
    named = [source for source in sources if source]
    return (named[-1] if named else "its own") + " (--config prints it)" if sources else ""


def _print_config(run: OpenRun, which: Literal["config", "resolved"], *, as_json: bool) -> None:
    from ckptmgr.cli.output import print_json

    manifest = None if run.selector in (None, "latest") else run.catalog.resolve(run.selector or "latest")
    numbers = [manifest.attempt] if manifest else sorted(run.catalog.attempts, reverse=True)
    for number in numbers:
        if which in run.catalog.attempts.get(number, ()):
            text = run.catalog.storage.read(attempt_key(number, which)).decode(errors="replace")
            if as_json:
                print_json({"run_dir": run.catalog.storage.url, "attempt": number, which: text})
            else:
                print(text, end="")
            return
    raise CheckpointNotFoundError(
        f"{run.run_dir} has no configuration",
        why="it was not started by `ckptmgr run`" if manifest is None else f"attempt {manifest.attempt} recorded none",
        next=f"ckptmgr show {run.run_dir} tells how it was started",
    )


def _code(attempt: AttemptSummary) -> str:
    git = attempt.start.git if attempt.start else None
    if git is None or git.commit is None:
        return ""
    return git.commit[:10] + (" (changed)" if git.is_dirty else "")
