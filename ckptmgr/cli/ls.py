"""``ckptmgr ls``: the checkpoints of a run, or the runs of a directory."""

from __future__ import annotations

import dataclasses

import click

from ckptmgr.cli.arguments import json_option, open_run, quiet_option, refuse_configuration, run_dir_argument
from ckptmgr.cli.listing import CheckpointSummary, list_run
from ckptmgr.cli.runs import list_runs
from ckptmgr.run.discover import holds_run
from ckptmgr.run.life import life_of
from ckptmgr.run.reference import URL_PREFIX, parse_reference
from ckptmgr.storage.open import open_storage

__all__ = ["command"]

_WORDS = {"unknown": "in an unknown state"}


@click.command(name="ls")
@run_dir_argument("RUN_DIR|DIR_OF_RUNS")
@quiet_option()
@json_option()
def command(reference: str, as_json: bool) -> None:
    """List the checkpoints of a run, or the runs below a directory, the newest first.

    A run is running (its process lives on this host), finished, failed, preempted, crashed (its process was on this
    host, and is gone without a word), or unknown: it ran on another host, and has recorded no end.

    Checkpoints that are not on the line were written by an attempt that a later one went back behind, or by a process
    that had already lost the run.
    """
    from ckptmgr.cli.output import format_age, format_metrics, format_nbytes, note, print_json, print_table

    place = parse_reference(reference)
    refuse_configuration(place.run_dir)
    storage = open_storage(place.run_dir)
    if place.run_dir == reference.removeprefix(URL_PREFIX) and not holds_run(storage):
        list_runs(storage, as_json=as_json)
        return
    run = open_run(reference, command="ls")
    listing = list_run(run.catalog)
    life = life_of(run.catalog)
    if as_json:
        print_json(
            {
                "run_dir": run.catalog.storage.url,
                "run_id": listing.run_id,
                "state": life.state,
                "detail": life.detail,
                "problem": listing.problem,
                "checkpoints": [
                    dataclasses.asdict(summary) | {"is_intact": summary.problem is None}
                    for summary in listing.checkpoints
                ],
                "torn": listing.torn,
            }
        )
        return
    if listing.checkpoints:
        has_several_ranks = any((summary.world_size or 1) > 1 for summary in listing.checkpoints)
        print_table(
            ["step", "epoch", "age", "size", "attempt", "ranks", "reason", "metrics", "tags", "state"],
            [
                [
                    str(summary.step),
                    "" if summary.epoch is None else str(summary.epoch),
                    "" if summary.created_at is None else format_age(summary.created_at),
                    "" if summary.nbytes is None else format_nbytes(summary.nbytes),
                    str(summary.attempt),
                    str(summary.world_size or "") if has_several_ranks else "",
                    summary.reason or "",
                    format_metrics(summary.metrics),
                    " ".join(summary.tags),
                    _state(summary),
                ]
                for summary in listing.checkpoints
            ],
            right=["step", "epoch", "age", "size", "attempt", "ranks"],
        )
    else:
        note(f"no checkpoint was committed in {run.catalog.storage.url} yet")
    note(f"the run is {_WORDS.get(life.state, life.state)}" + (f": {life.detail}" if life.detail else ""))
    for id in listing.torn:
        note(f"{id}: a save that was cut off, or is under way; it does not count")
    if listing.problem:
        note(f"which checkpoint is the latest cannot be told: {listing.problem}")


def _state(summary: CheckpointSummary) -> str:
    marks = []
    if summary.is_latest:
        marks.append("latest")
    if summary.best_of is not None:
        marks.append(f"best {summary.best_of}")
    if summary.is_on_line is False:
        marks.append("not on the line")
    if summary.problem is not None:
        marks.append(f"damaged: {summary.problem}")
    return ", ".join(marks)
