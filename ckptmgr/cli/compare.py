"""Several runs, or checkpoints, side by side: what sets them apart."""

from __future__ import annotations

from collections.abc import Sequence

from ckptmgr.cli.arguments import OpenRun
from ckptmgr.cli.listing import AttemptSummary, read_attempts
from ckptmgr.cli.output import format_metrics, print_json, print_table
from ckptmgr.errors import CkptmgrError
from ckptmgr.format.manifest import Manifest, metric_to_value

__all__ = ["print_comparison"]

_NONE = "-"


def print_comparison(runs: Sequence[OpenRun], *, as_json: bool) -> None:
    """Print step, metrics, configuration, code and versions of several runs, as far as they differ.

    Args:
        runs: Each with the checkpoint that is meant; the newest where none was named.
        as_json: One JSON document instead of a table.
    """
    names = [run.run_dir if run.selector is None else f"{run.run_dir}@{run.selector}" for run in runs]
    facts = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    rows = {key: [one.get(key, _NONE) for one in facts] for key in keys}
    differing = {key: values for key, values in rows.items() if len(set(values)) > 1}
    if as_json:
        print_json({"runs": names, "differences": differing})
        return
    print_table(["", *names], [[key, *values] for key, values in differing.items()])


def _facts(run: OpenRun) -> dict[str, str]:
    catalog = run.catalog
    manifest = _manifest(run)
    attempts = read_attempts(catalog)
    facts: dict[str, str] = {}
    if manifest is not None:
        metrics = {name: metric_to_value(value) for name, value in catalog.facts(manifest.id).metrics.items()}
        facts["step"] = str(manifest.step)
        facts |= {name: format_metrics({name: value}).partition("=")[2] for name, value in metrics.items()}
        facts |= _best(run)
    try:
        facts["forked from"] = catalog.marker.parent or _NONE
    except CkptmgrError:
        facts["forked from"] = "?"
    attempt = _attempt_of(manifest, attempts)
    if attempt is None or attempt.start is None:
        return facts
    git = attempt.start.git
    if git is not None and git.commit is not None:
        facts["code"] = git.commit[:10] + (f" + changes {(git.diff_digest or '?')[:8]}" if git.is_dirty else "")
    facts |= attempt.start.versions
    return facts | _configuration(run, attempt)


def _manifest(run: OpenRun) -> Manifest | None:
    if run.selector is not None:
        return run.catalog.resolve(run.selector)
    return next(run.catalog.newest_first(), None)


def _best(run: OpenRun) -> dict[str, str]:
    if run.selector is not None:
        return {}
    try:
        best = run.catalog.best()
    except CkptmgrError:
        return {}
    value = run.catalog.facts(best.id).metrics.get(best.monitor or "")
    return {} if value is None else {f"best {best.monitor}": f"{value:.4g} at step {best.step}"}


def _attempt_of(manifest: Manifest | None, attempts: Sequence[AttemptSummary]) -> AttemptSummary | None:
    number = manifest.attempt if manifest is not None else max((one.number for one in attempts), default=0)
    return next((attempt for attempt in attempts if attempt.number == number), None)


def _configuration(run: OpenRun, attempt: AttemptSummary) -> dict[str, str]:
    if "config" not in run.catalog.attempts[attempt.number]:
        return {}
    from ckptmgr.config.tree import join_key, leaves, plain
    from ckptmgr.experiment.stored_run import read_experiment

    try:
        stored = read_experiment(run.catalog, attempt=attempt.number)
    except CkptmgrError as error:
        return {"configuration": f"unreadable: {error.why or error.what}"}
    if stored is None:
        return {}
    texts = {join_key(path): str(value) for path, value in leaves(plain(stored.config))}
    return {key: text for key, text in texts.items() if key not in ("run_dir", "name")}
