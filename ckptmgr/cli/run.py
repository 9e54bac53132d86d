"""``ckptmgr run``: build an experiment from its configuration, and train it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptmgr.cli.arguments import json_option, quiet_option
from ckptmgr.cli.complete import complete_directory, complete_file
from ckptmgr.cli.nproc import (
    allow_words,
    nproc_option,
    output_words,
    place_of_this_process,
    ranks_command,
    run_ranks,
    trainer_values,
)
from ckptmgr.errors import UsageError
from ckptmgr.format.layout import RUN_MARKER

if TYPE_CHECKING:
    from ckptmgr.config.changes import Change
    from ckptmgr.experiment.plan import Plan

__all__ = ["command"]


@click.command(name="run")
@click.argument("config", shell_complete=complete_file)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print the composed configuration and what would be built.")
@click.option("--seed", type=int, help="The same as seed=N.")
@click.option("--name", help="The same as name=NAME: a fresh run's directory begins with it.")
@click.option(
    "--run-dir",
    metavar="RUN_DIR",
    shell_complete=complete_directory,
    help="The same as run_dir=RUN_DIR; by default runs/NAME-TIME-XXXX.",
)
@click.option("--allow", multiple=True, metavar="PATTERN", help="Allow targets, such as my_pkg.*; may be repeated.")
@nproc_option("Train on N processes of this machine, started by torchrun.")
@quiet_option()
@json_option()
def command(
    config: str,
    overrides: Sequence[str],
    dry_run: bool,
    seed: int | None,
    name: str | None,
    run_dir: str | None,
    allow: Sequence[str],
    nproc: int | None,
    as_json: bool,
) -> None:
    """Build the experiment that CONFIG describes, and train it.

    KEY=VALUE overrides what CONFIG says, +KEY=VALUE adds, ~KEY removes; lists go by index (callbacks.0.patience=3).
    CONFIG may name classes of your own packages if your pyproject.toml allows it: [tool.ckptmgr] allow = ["my_pkg.*"].

    If RUN_DIR holds a run already, training goes on there. Without RUN_DIR, each start is a fresh run below runs/.
    """
    from ckptmgr.cli.output import note
    from ckptmgr.cli.training import enter_project, print_plan, train_and_report
    from ckptmgr.config.compose import compose
    from ckptmgr.experiment.plan import apply_to_slots, make_plan
    from ckptmgr.experiment.start import choose_run_dir
    from ckptmgr.instantiate.allow_list import AllowList
    from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE
    from ckptmgr.launch.requested import requested_run
    from ckptmgr.launch.run_directory import absolute

    _refuse_run_directory(config)
    is_rank = place_of_this_process(nproc) is not None
    options = {"seed": seed, "name": name, "run_dir": run_dir}
    given = {key: value for key, value in options.items() if value is not None}
    composition = compose(config)
    for remark in composition.notes:
        note(remark)
    enter_project(Path.cwd())
    allowed = AllowList.gather(cwd=Path.cwd(), extra=allow)
    plan = make_plan(apply_to_slots(composition.config, overrides, given), where=config, allow=allowed)
    if values := trainer_values(plan, nproc):
        note(f"--nproc: {', '.join(f'{key}={value}' for key, value in values.items())}")
        plan = make_plan(
            apply_to_slots(composition.config, overrides, {**given, **values}), where=config, allow=allowed
        )
    if dry_run:
        note(f"run directory: {plan.tree['run_dir'] or 'a fresh one below runs/'}")
        print_plan(plan, composition.files, nproc=nproc, as_json=as_json)
        return
    if is_rank:
        _refuse_a_place_for_each_rank(plan, config)
    place, resume = requested_run(choose_run_dir(plan, source=config), "auto")
    assert place is not None
    if nproc is not None and nproc > 1 and not is_rank:
        words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        words += [*allow_words(allow), *output_words(as_json=as_json)]
        chosen = absolute(place) if resume == "auto" else f"{absolute(place)}@{resume}"
        # The ranks cannot each choose a fresh directory.
        run_ranks(ranks_command(nproc, ["run", config, *overrides, *words], {RUN_DIR_VARIABLE: chosen}), run_dir=place)
    train_and_report(
        plan,
        run_dir=place,
        resume=resume,
        source=config,
        overrides=(*overrides, *(f"{key}={value}" for key, value in given.items())),
        changes=_changes_in(place, plan),
        as_json=as_json,
    )


def _refuse_run_directory(config: str) -> None:
    if (Path(config) / RUN_MARKER).is_file():
        raise UsageError(f"{config} is a run, not a configuration", next=f"ckptmgr resume {config} goes on with it")


def _refuse_a_place_for_each_rank(plan: Plan, config: str) -> None:
    from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE
    from ckptmgr.launch.run_directory import job_name

    # The job's name makes the same directory on each rank.
    if plan.tree["run_dir"] is None and RUN_DIR_VARIABLE not in os.environ and job_name(os.environ) is None:
        raise UsageError(
            f"several ranks of {config}, and no run directory",
            why="each of them would choose a fresh one",
            next=f"ckptmgr run {config} --nproc N starts N ranks; or give --run-dir",
        )


def _changes_in(run_dir: str, plan: Plan) -> list[Change]:
    """Return how the configuration differs from the one that the run, if there is one, was last started with."""
    from ckptmgr.experiment.stored_run import read_experiment
    from ckptmgr.run.catalog import Catalog
    from ckptmgr.storage.open import open_storage

    catalog = Catalog(open_storage(run_dir))
    stored = read_experiment(catalog) if catalog.is_run else None
    return [] if stored is None else plan.changes_since(stored.config)
