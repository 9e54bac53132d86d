"""The command ``ckptmgr``: finds a command, runs it, and turns whatever happens into a message and an exit code.

Commands are loaded when they are called, so that ``--help`` costs nothing but click. Exit codes: 0 ok, 1 failed, 2
wrong usage, 10 not found, 11 owned by another writer, 12 corrupt, 75 preempted and saved.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from ckptmgr.cli.printable import printable
from ckptmgr.errors import CkptmgrError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["COMMANDS", "main", "run"]

COMMANDS = {
    "completion": "Print the script that makes a shell complete what is typed.",
    "diff": "Compare two checkpoints: configuration, code, state and weights.",
    "doctor": "Say what a file is, why it does not load, and what to do.",
    "export": "Write a checkpoint as files that other tools read.",
    "import": "Make a new run of what another tool has saved.",
    "ls": "List the checkpoints of a run, or the runs of a directory.",
    "prune": "Delete the checkpoints that no policy keeps.",
    "resume": "Start a run again, where it stopped.",
    "run": "Build an experiment from its configuration, and train it.",
    "show": "Show a run's story, one checkpoint, or what sets runs apart.",
    "verify": "Recompute every digest and name what is damaged.",
}

# What is a keyword of the language cannot be the name of a module.
_MODULES = {"import": "import_run"}

_TRACEBACK_VARIABLE = "CKPTMGR_TRACEBACK"
_INTERRUPTED = 128 + 2
_BROKEN_PIPE = 128 + 13


class _LazyCommands(click.Group):
    """A group whose commands are modules beside this one, imported when one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ckptmgr.cli.{_MODULES.get(cmd_name, cmd_name)}").command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        # click would import every command for its help.
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=text) for name, text in sorted(COMMANDS.items()) if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_LazyCommands, invoke_without_command=True)
@click.option("--traceback", is_flag=True, help=f"Show where an error comes from. Also {_TRACEBACK_VARIABLE}=1.")
@click.version_option(package_name="ckptmgr", message="ckptmgr %(version)s")
@click.pass_context
def _commands(ctx: click.Context, traceback: bool) -> None:
    """Training that cannot be lost, and a model that loads as it was.

    RUN_DIR is the directory or URL that was given to the manager. RUN_DIR@latest, @best, @STEP or @TAG names one of its
    checkpoints.
    """
    if traceback:
        os.environ[_TRACEBACK_VARIABLE] = "1"
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    instruction = os.environ.get("_CKPTMGR_COMPLETE")
    if instruction:
        # A shell asks what could be typed.
        from ckptmgr.cli.completion import answer

        sys.exit(answer(_commands, instruction))
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Errors are reported on stderr, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character gets its number, not an exception.
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not click's main(), which exits by itself on a broken pipe and on Ctrl-C.
        with _commands.make_context("ckptmgr", list(arguments)) as context:
            _commands.invoke(context)
        # Here, not at shutdown: a reader who has gone away must not cost a traceback.
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        return _BROKEN_PIPE
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except CkptmgrError as error:
        return _fail(_told_by_rank(error), error.exit_code)
    except click.ClickException as error:
        return _fail(_from_click(error).report(), error.exit_code)
    except Exception as error:
        return _fail(_unexpected(error), 1)
    return 0


def _fail(message: str, status: int) -> int:
    if os.environ.get(_TRACEBACK_VARIABLE, "") not in ("", "0") and sys.exc_info()[0] is not None:
        traceback.print_exc()
    try:
        print(printable(_without_secrets(message), keep="\n"), file=sys.stderr, flush=True)
    except BrokenPipeError:
        _abandon_stdout()
    return status


def _told_by_rank(error: CkptmgrError) -> str:
    from ckptmgr.launch.torchrun import place_in_job

    place = place_in_job(os.environ)
    if place is None or place.rank == 0:
        return error.report()
    # Mostly rank 0 says the same in full; if not, this must not be lost.
    return f"rank {place.rank}: {error.what}" + (f": {error.why}" if error.why else "")


def _without_secrets(message: str) -> str:
    from ckptmgr.launch.redact import REDACTED, secret_values

    # A configuration may read any variable, messages quote its values, and what a job prints is kept by others.
    for secret in secret_values(os.environ):
        message = message.replace(secret, REDACTED)
    return message


def _from_click(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ckptmgr"
    return UsageError(error.format_message(), next=f"{path} --help")


def _unexpected(error: Exception) -> str:
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        f"ckptmgr failed unexpectedly\n  why:  {what}\n"
        f"  next: {_TRACEBACK_VARIABLE}=1 shows where; nothing of this should happen, so please report it"
    )


def _abandon_stdout() -> None:
    # The interpreter flushes stdout once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
