"""``ckptmgr resume``: start the recorded program again; its manager goes on where the run stopped."""

from __future__ import annotations

from pathlib import Path

import click

from ckptmgr.cli.arguments import OpenRun, json_option, open_run, run_dir_argument
from ckptmgr.errors import ResumeRefusedError
from ckptmgr.launch.start_record import StartRecord

__all__ = ["command"]


@click.command(name="resume")
@run_dir_argument("RUN_DIR[@REF]")
@click.option("--print", "print_only", is_flag=True, help="Print the command instead of running it.")
@click.option("--allow-command", is_flag=True, help="Run the recorded command although it is not of this project.")
@json_option()
def command(reference: str, print_only: bool, allow_command: bool, as_json: bool) -> None:
    """Start a run again, where it stopped, or from one of its checkpoints (RUN_DIR@REF).

    Runs the recorded program if it lies in the current project, with this Python, in this environment. The exit code is
    that of the program. With --json, prints the command and does not run it.
    """
    from ckptmgr.cli.output import note, print_json
    from ckptmgr.launch.relaunch import relaunch_command, start

    run = open_run(reference)
    if run.selector is not None:
        run.catalog.resolve(run.selector)
    relaunch = relaunch_command(
        _newest_start(run),
        run_dir=run.run_dir,
        cwd=Path.cwd(),
        selector=run.selector or "latest",
        allow_command=allow_command,
    )
    for remark in relaunch.notes:
        note(remark)
    if as_json:
        print_json({"argv": relaunch.argv, "cwd": str(relaunch.cwd), "env": relaunch.env, "notes": relaunch.notes})
    elif print_only:
        print(relaunch.shell_line)
    else:
        note(relaunch.shell_line)
        start(relaunch)


def _newest_start(run: OpenRun) -> StartRecord:
    from ckptmgr.cli.listing import explain, read_attempts
    from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE, shell_line

    attempts = read_attempts(run.catalog)
    starts = [attempt for attempt in reversed(attempts) if attempt.start is not None]
    # One that ended before it could train, such as a notebook that looked into the run, does not stand for it.
    for attempt in [attempt for attempt in starts if attempt.line or not attempt.end] or starts:
        assert attempt.start is not None
        return attempt.start
    problems = [explain(problem) for attempt in attempts for problem in attempt.problems]
    raise ResumeRefusedError(
        f"nothing tells how {run.catalog.storage.url} was started",
        why="; ".join(problems) or "no process start is recorded in it",
        next=f"start the program by hand with {shell_line([], {RUN_DIR_VARIABLE: run.run_dir})} in its environment",
    )
