"""What ``ckptmgr run`` and ``ckptmgr resume`` share: training in this process, and telling how it went."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

from ckptmgr.cli.output import note, print_json
from ckptmgr.errors import CkptmgrError
from ckptmgr.progress import set_quiet

if TYPE_CHECKING:
    from ckptmgr.config.changes import Change
    from ckptmgr.experiment.plan import Plan
    from ckptmgr.run.reference import Reference

__all__ = ["enter_project", "print_plan", "train_and_report"]


def enter_project(cwd: Path) -> None:
    """Let the project that the user is in be imported, as ``python -m`` would; never what lies in a run directory."""
    from ckptmgr.launch.project import find_project_root, why_not_own_code

    root = find_project_root(cwd)
    if why_not_own_code(root, root) is not None:
        return
    for folder in (root / "src", root):
        if folder.is_dir() and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def print_plan(plan: Plan, files: Sequence[str], *, nproc: int | None, as_json: bool) -> None:
    """Print a configuration and what would be built from it. Everything that it names is imported, nothing is built.

    Args:
        plan: The experiment.
        files: Those that it was composed from.
        nproc: On how many processes it would be trained; None: on this one.
        as_json: One JSON document instead of one YAML document.

    Raises:
        ConfigError, NotAllowedError: A target is not there, or is not what its name promised.
    """
    from ckptmgr.experiment.start import check

    check(plan, nproc=nproc)
    if nproc is not None and nproc > 1:
        note(f"on {nproc} processes of this machine")
    targets = [(target.key, target.name, plan.allow.source_of(target.name)) for target in plan.targets]
    if as_json:
        print_json(
            {
                "kind": plan.kind,
                "files": list(files),
                "config": plan.stored.config,
                "targets": [{"key": key, "target": name, "allowed_by": source} for key, name, source in targets],
            }
        )
        return
    print(plan.stored.config, end="")
    # As comments, so that what is printed can be used as a configuration.
    print("# would build, with what allows it:")
    for key, name, source in targets:
        print(f"#   {key}: {name}  ({source})")


def train_and_report(
    plan: Plan,
    *,
    run_dir: str,
    resume: str,
    fork_from: Reference | None = None,
    source: str | None,
    overrides: Sequence[str],
    changes: Sequence[Change],
    as_json: bool,
) -> None:
    """Train an experiment, then say where it stands. An exception of the user's code is shown with its traceback.

    Raises:
        CkptmgrError: The experiment cannot be built, or not be resumed.
        Preempted: The process was told to stop; the state is saved.
    """
    from ckptmgr.cli.output import is_other_rank, show_log
    from ckptmgr.experiment.start import train

    show_log()
    if is_other_rank():
        # What Lightning and progress would tell, rank 0 tells.
        set_quiet(True)
    note(f"run directory: {run_dir}")
    for change in changes:
        note(f"changed since the last start: {change}")
    try:
        # What the user's code prints must not stand before the document.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            train(
                plan,
                run_dir=run_dir,
                resume=resume,
                fork_from=fork_from,
                source=source,
                overrides=overrides,
                changes=changes,
            )
    except CkptmgrError:
        raise
    except Exception as error:
        # It is the user's program that failed, so the user needs to see where.
        traceback.print_exception(error.with_traceback(_of_the_program(error.__traceback__)))
        raise click.exceptions.Exit(1) from error
    if not is_other_rank():
        _report(run_dir, as_json=as_json)


def _of_the_program(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of ours that it begins with."""
    package = str(Path(__file__).parents[1])
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(package):
        inner = inner.tb_next
    return inner or trace


def _report(run_dir: str, *, as_json: bool) -> None:
    from ckptmgr.cli.listing import list_run
    from ckptmgr.run.catalog import Catalog
    from ckptmgr.storage.open import open_storage

    listing = list_run(Catalog(open_storage(run_dir)))
    latest = next((summary for summary in listing.checkpoints if summary.is_latest), None)
    best = next((summary for summary in listing.checkpoints if summary.best_of is not None), None)
    if as_json:
        print_json(
            {
                "run_dir": run_dir,
                "run_id": listing.run_id,
                "step": None if latest is None else latest.step,
                "best": None if best is None else {"step": best.step, "metric": best.best_of, "metrics": best.metrics},
            }
        )
        return
    words = f"done: {run_dir}"
    if latest is not None:
        words += f" at step {latest.step}"
    if best is not None and best.best_of in best.metrics:
        words += f", best {best.best_of}={best.metrics[best.best_of]:.4g} at step {best.step}"
    note(words)
