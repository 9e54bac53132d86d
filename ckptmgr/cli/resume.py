"""``ckptmgr resume``: start a run again, where it stopped, with overrides or as a fork."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptmgr.cli.arguments import OpenRun, json_option, open_run, quiet_option, run_dir_argument
from ckptmgr.cli.complete import complete_directory
from ckptmgr.cli.nproc import (
    allow_words,
    nproc_option,
    output_words,
    place_of_this_process,
    ranks_command,
    run_ranks,
    trainer_values,
)
from ckptmgr.errors import NotAllowedError, ResumeRefusedError, RunInUseError, UsageError
from ckptmgr.launch.requested import STRICT_VARIABLE
from ckptmgr.launch.torchrun import MAX_PROCESSES
from ckptmgr.run.imported import source_of, ways_on
from ckptmgr.run.life import life_of
from ckptmgr.run.reference import Reference

if TYPE_CHECKING:
    from ckptmgr.config.changes import Change
    from ckptmgr.experiment.plan import Plan
    from ckptmgr.experiment.stored_run import StoredExperiment
    from ckptmgr.launch.start_record import StartRecord

__all__ = ["command"]


@click.command(name="resume")
@run_dir_argument("RUN_DIR[@REF]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--to",
    metavar="NEW_DIR",
    shell_complete=complete_directory,
    help="Fork: copy the checkpoint into a new run, and go on there.",
)
@click.option("--dry-run", is_flag=True, help="Print the configuration, and what it would build.")
@click.option("--allow", multiple=True, metavar="PATTERN", help="Allow targets, such as my_pkg.*; may be repeated.")
@click.option(
    "--strict-environment",
    is_flag=True,
    help="Refuse to go on where versions or code have changed in a way that may matter.",
)
@nproc_option("Train on N processes of this machine, started by torchrun; by default on as many as before.")
@click.option("--print", "print_only", is_flag=True, help="Print the command, and do not run it.")
@click.option("--allow-command", is_flag=True, help="Run the recorded command although it is not of this project.")
@quiet_option()
@json_option()
def command(
    reference: str,
    overrides: Sequence[str],
    to: str | None,
    dry_run: bool,
    allow: Sequence[str],
    strict_environment: bool,
    nproc: int | None,
    print_only: bool,
    allow_command: bool,
    as_json: bool,
) -> None:
    """Start a run again, where it stopped, or from one of its checkpoints (RUN_DIR@REF).

    A run that `ckptmgr run` started is built again from its own configuration, with overrides where they are given:
    KEY=VALUE, +KEY=VALUE, ~KEY, as for `ckptmgr run`.

    For any other, the recorded script is run if it lies in the current project, with this Python, in this environment;
    the exit code is that of the script. Its command is printed, and not run, with --print or --json.

    --nproc N goes on with N ranks, however many have saved: `ckptmgr show RUN_DIR@REF --nproc N` says what becomes of
    their state. The exit code is 75 if the job was told to stop, and has saved.

    Refuses (exit code 11) while a process of this host trains in the run.
    """
    from ckptmgr.experiment.stored_run import read_experiment

    if strict_environment:
        _be_strict()
    place = place_of_this_process(nproc)
    run = open_run(reference)
    manifest = None if run.selector is None else run.catalog.resolve(run.selector)
    # Who goes back to a checkpoint wants it as it was trained, not as what came after it was configured.
    is_older = manifest is not None and run.selector != "latest"
    stored = read_experiment(run.catalog, attempt=manifest.attempt if is_older and manifest else None)
    if to is not None:
        _check_fork(run, to, is_rank=place is not None)
    # Of several ranks the first looks, before it claims the run; with --nproc we have looked before they were started.
    looks = place is None or (nproc is None and place.rank == 0)
    if to is None and looks and not (dry_run or print_only or (as_json and stored is None)):
        _refuse_if_running(run)
    if stored is None:
        _refuse_for_scripts(run, overrides, dry_run=dry_run)
        _relaunch(run, to, nproc=nproc, print_only=print_only, allow_command=allow_command, as_json=as_json)
        return
    if nproc is None and place is None:
        nproc = _as_many_as_before(run, stored)
    plan, changes = _plan(run, stored, overrides, to, nproc=nproc, allow=allow)
    if nproc is not None and nproc > 1 and place is None and not dry_run:
        words = [*overrides, *allow_words(allow), *output_words(as_json=as_json)]
        _train_on_ranks(run, words, to, nproc=nproc, print_only=print_only)
    else:
        dry_run = dry_run or print_only
        _train(run, plan, changes, overrides, to, nproc=nproc, dry_run=dry_run, as_json=as_json)


def _be_strict() -> None:
    """Let every process that this one becomes or starts refuse another environment."""
    before = os.environ.get(STRICT_VARIABLE)
    os.environ[STRICT_VARIABLE] = "1"
    if before is None:
        click.get_current_context().call_on_close(lambda: os.environ.pop(STRICT_VARIABLE, None))


def _plan(
    run: OpenRun,
    stored: StoredExperiment,
    overrides: Sequence[str],
    to: str | None,
    *,
    nproc: int | None,
    allow: Sequence[str],
) -> tuple[Plan, list[Change]]:
    """Return what would be built, and how that differs from the last start."""
    from ckptmgr.cli.training import enter_project
    from ckptmgr.experiment.plan import apply_to_slots, make_plan
    from ckptmgr.experiment.stored_run import read_experiment
    from ckptmgr.instantiate.allow_list import AllowList
    from ckptmgr.launch.project import find_project_root

    # Where the run is now, whatever was typed when it began: it may have been moved, or be a fork.
    values: dict[str, object] = {"run_dir": run.run_dir if to is None else to}
    where = f"the configuration of {run.run_dir}"
    _refuse_another_place(run.run_dir, overrides)
    enter_project(Path.cwd())
    allowed = AllowList.gather(cwd=Path.cwd(), extra=allow)
    try:
        plan = make_plan(apply_to_slots(stored.config, overrides, values), where=where, allow=allowed)
        if more := trainer_values(plan, nproc):
            plan = make_plan(apply_to_slots(stored.config, overrides, values | more), where=where, allow=allowed)
    except NotAllowedError as error:
        # A run directory has no say in what is imported; it may say where its code was.
        here, there = str(find_project_root(Path.cwd())), stored.project_root
        hint = f"; or resume it in {there}, the project that it was started in" if here != there else ""
        raise NotAllowedError(error.what, why=error.why, next=f"{error.next}{hint}") from error
    newest = read_experiment(run.catalog) or stored
    return plan, plan.changes_since(newest.config)


def _train_on_ranks(run: OpenRun, words: Sequence[str], to: str | None, *, nproc: int, print_only: bool) -> None:
    place, selector = run.run_dir if to is None else to, run.selector or "latest"
    reference = place if to is not None or selector == "latest" else f"{place}@{selector}"
    relaunch = ranks_command(nproc, ["resume", reference, *words])
    if print_only:
        print(relaunch.shell_line)
        return
    if to is not None:
        # The ranks cannot each make it.
        _fork(run, selector, to)
    run_ranks(relaunch, run_dir=place)


def _train(
    run: OpenRun,
    plan: Plan,
    changes: Sequence[Change],
    overrides: Sequence[str],
    to: str | None,
    *,
    nproc: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from ckptmgr.cli.output import note
    from ckptmgr.cli.training import print_plan, train_and_report

    place, selector = run.run_dir if to is None else to, run.selector or "latest"
    if dry_run:
        found = run.catalog.resolve(selector) if run.selector else next(run.catalog.newest_first(), None)
        note(f"{place} would go on from step {found.step if found else 0}")
        for change in changes:
            note(f"changed since the last start: {change}")
        print_plan(plan, (), nproc=nproc, as_json=as_json)
        return
    train_and_report(
        plan,
        run_dir=place,
        # A run that was killed before its first save has nothing to resume, and starts again.
        resume="must" if to is not None else "auto" if selector == "latest" else selector,
        fork_from=None if to is None else Reference(run.run_dir, selector),
        source=None,
        overrides=overrides,
        changes=changes,
        as_json=as_json,
    )


def _refuse_another_place(run_dir: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "run_dir":
            raise UsageError(
                "run_dir cannot be overridden in a resume",
                why=f"the run goes on where it is, in {run_dir}",
                next=f"ckptmgr resume {run_dir} --to {value or 'NEW_DIR'} forks it into another directory",
            )


def _relaunch(
    run: OpenRun, to: str | None, *, nproc: int | None, print_only: bool, allow_command: bool, as_json: bool
) -> None:
    from ckptmgr.cli.output import note, print_json
    from ckptmgr.launch.relaunch import relaunch_command, start

    selector = run.selector or "latest"
    relaunch = relaunch_command(
        _newest_start(run),
        run_dir=run.run_dir if to is None else to,
        cwd=Path.cwd(),
        selector=selector if to is None else "latest",
        nproc=nproc,
        allow_command=allow_command,
    )
    for remark in relaunch.notes:
        note(remark)
    if as_json:
        print_json({"argv": relaunch.argv, "cwd": str(relaunch.cwd), "env": relaunch.env, "notes": relaunch.notes})
        return
    if print_only:
        print(relaunch.shell_line)
        return
    if to is not None:
        _fork(run, selector, to)
    if relaunch.has_launcher:
        run_ranks(relaunch, run_dir=run.run_dir if to is None else to)
    note(relaunch.shell_line)
    start(relaunch)


def _check_fork(run: OpenRun, to: str, *, is_rank: bool) -> None:
    from ckptmgr.fork import check_fork

    if is_rank:
        raise UsageError(
            f"several ranks would fork {run.run_dir} to {to}",
            why="each of them would make the same new run",
            next=f"ckptmgr resume {run.run_dir} --to {to} --nproc N makes it once, and then starts N ranks",
        )
    check_fork(Reference(run.run_dir, run.selector or "latest"), to)


def _fork(run: OpenRun, selector: str, to: str) -> None:
    from ckptmgr.cli.output import note
    from ckptmgr.fork import fork_run

    fork_run(Reference(run.run_dir, selector), to)
    note(f"forked {run.run_dir}@{selector} to {to}")


def _as_many_as_before(run: OpenRun, stored: StoredExperiment) -> int | None:
    """Return on how many processes a configured run goes on if nobody says: as its last start; None: on this one."""
    from ckptmgr.cli.output import note

    count = stored.world_size
    if stored.local_world_size != count or count > MAX_PROCESSES:
        raise ResumeRefusedError(
            f"{run.run_dir} was trained by {count} ranks on several machines",
            why="this command starts processes of this machine only",
            next=f"--nproc N goes on with N of them; on several machines, torchrun … -m ckptmgr resume {run.run_dir}",
        )
    if count == 1:
        return None
    note(f"on {count} processes, as before; --nproc N takes another number")
    return count


def _refuse_if_running(run: OpenRun) -> None:
    # It would take the run over. That is right for a job that was started again, and a slip where both are in sight:
    # the other process would go on until its next save, and both would write the same logs meanwhile.
    life = life_of(run.catalog)
    if life.state == "running":
        raise RunInUseError(
            f"{run.run_dir} is in use",
            why=f"{life.detail} is training in it",
            next=f"stop it, or wait until it has ended; `ckptmgr resume {run.run_dir} --to NEW_DIR` forks the run",
        )


def _refuse_for_scripts(run: OpenRun, overrides: Sequence[str], *, dry_run: bool) -> None:
    if overrides or dry_run:
        raise UsageError(
            f"{run.run_dir} has no configuration to {'override' if overrides else 'show'}",
            why="it was started from a script, and not by `ckptmgr run`",
            next=f"change the script, and `ckptmgr resume {run.run_dir}`; --print shows what that would start",
        )


def _newest_start(run: OpenRun) -> StartRecord:
    from ckptmgr.cli.listing import explain, read_attempts
    from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE, shell_line

    attempts = read_attempts(run.catalog)
    starts = [attempt for attempt in reversed(attempts) if attempt.start is not None]
    # One that ended before it could train, such as a notebook that looked into the run, does not stand for it.
    for attempt in [attempt for attempt in starts if attempt.line or not attempt.end] or starts:
        assert attempt.start is not None
        return attempt.start
    newest = next(run.catalog.newest_first(), None)
    source = source_of(newest) if newest is not None else None
    if newest is not None and source is not None:
        raise ResumeRefusedError(
            f"{run.run_dir} was imported, from {source}: no program has trained in it",
            why="there is no command that could be started again",
            next="; ".join(ways_on(newest, run.run_dir)),
        )
    problems = [explain(problem) for attempt in attempts for problem in attempt.problems]
    raise ResumeRefusedError(
        f"nothing tells how {run.catalog.storage.url} was started",
        why="; ".join(problems) or "no process start is recorded in it",
        next=f"start the program by hand with {shell_line([], {RUN_DIR_VARIABLE: run.run_dir})} in its environment",
    )
