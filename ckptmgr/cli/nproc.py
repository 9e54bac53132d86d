"""``--nproc``: the same command on several processes of this machine, started by torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ckptmgr.errors import UsageError
from ckptmgr.launch.torchrun import MAX_PROCESSES, PlaceInJob, end_of_options, place_in_job, torchrun_words

if TYPE_CHECKING:
    from ckptmgr.experiment.plan import Plan
    from ckptmgr.launch.relaunch import Relaunch

__all__ = [
    "allow_words",
    "nproc_option",
    "output_words",
    "place_of_this_process",
    "ranks_command",
    "run_ranks",
    "trainer_values",
]

F = TypeVar("F", bound=Callable[..., Any])


def nproc_option(text: str) -> Callable[[F], F]:
    """``--nproc N``."""
    return click.option("--nproc", type=click.IntRange(1, MAX_PROCESSES), metavar="N", help=text)


def place_of_this_process(nproc: int | None) -> PlaceInJob | None:
    """Return which rank this process is; None if it is not one of several.

    A rank that was started with ``--nproc`` got the option too, so that it knows by whom.

    Raises:
        UsageError: It is one of another number of ranks.
    """
    place = place_in_job(os.environ)
    if place is not None and nproc is not None and place.world_size != nproc:
        raise UsageError(
            f"--nproc {nproc} in a job of {place.world_size} ranks",
            why=f"RANK={place.rank} and WORLD_SIZE={place.world_size} are set: a launcher has started this process",
            next="start it without a launcher, or without --nproc",
        )
    return place


def trainer_values(plan: Plan, nproc: int | None) -> dict[str, object]:
    """Return what ``--nproc`` changes in a configuration: the devices that it gives to a Trainer, if it names others.

    Raises:
        UsageError: The Trainer is to run on several machines.
    """
    if nproc is None or plan.kind != "lightning":
        return {}
    trainer = plan.tree["trainer"]
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", "auto")
    if nodes != 1:
        raise UsageError(
            f"--nproc {nproc}, and trainer.num_nodes={nodes}",
            why="--nproc starts processes of this machine",
            next="give trainer.num_nodes=1, or start torchrun on each machine: torchrun … -m ckptmgr …",
        )
    count = len(devices) if isinstance(devices, list) else devices
    return {} if count == nproc or devices == "auto" else {"trainer.devices": nproc}


def ranks_command(nproc: int, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Relaunch:
    """Return the command that runs ``ckptmgr`` on each of several ranks.

    Args:
        nproc: How many.
        arguments: The command and its arguments, without ``--nproc``.
        env: What to add to the environment.
    """
    from ckptmgr.launch.relaunch import Relaunch

    words, _ = torchrun_words(nproc)
    # -P: else the current directory comes first among the modules, and it may be the run directory of somebody else.
    python = (sys.executable, "-P")
    program = (*python, "-m", "ckptmgr", *arguments, "--nproc", str(nproc))
    argv = (*python, *words, "--no-python", *end_of_options(program), *program)
    return Relaunch(argv, Path.cwd(), dict(env or {}), has_launcher=True)


def allow_words(patterns: Sequence[str]) -> list[str]:
    """Return ``--allow`` for each rank, as it was given."""
    return [word for pattern in patterns for word in ("--allow", pattern)]


def output_words(*, as_json: bool) -> list[str]:
    """Return ``--json`` and ``--quiet`` for each rank, as they were given."""
    from ckptmgr.progress import is_quiet

    return [*(["--json"] if as_json else []), *(["--quiet"] if is_quiet() else [])]


def run_ranks(relaunch: Relaunch, *, run_dir: str) -> NoReturn:
    """Run a job of several ranks, and exit as it did."""
    from ckptmgr.cli.output import note
    from ckptmgr.launch.job import run_job

    note(relaunch.shell_line)
    raise click.exceptions.Exit(run_job(relaunch, run_dir=run_dir))
