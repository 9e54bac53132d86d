"""``ckptmgr prune``: delete what no policy keeps, and say of each checkpoint why it stays or goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ckptmgr.cli.arguments import OpenRun, json_option, open_run, quiet_option, run_dir_argument
from ckptmgr.cli.keep_options import Keep, chosen_policies
from ckptmgr.errors import CkptmgrError
from ckptmgr.format.manifest import metric_to_value
from ckptmgr.run.life import refuse_if_in_use
from ckptmgr.run.upkeep import Verdict, has_leftovers, judge, prune_run

__all__ = ["command"]


@click.command(name="prune")
@run_dir_argument("RUN_DIR")
@click.option("--keep-last", type=int, metavar="N", help="Keep the newest N.")
@click.option(
    "--keep-best",
    multiple=True,
    metavar="METRIC[:K[:MODE]]",
    help="Keep the K best (default 1) by a metric; MODE is min or max. May be repeated.",
)
@click.option("--keep-every", metavar="N|Nep", help="Keep one for each N steps, or, with ep, for each N epochs.")
@click.option("--keep-within", metavar="AGE", help="Keep what is at most so much older than the newest: 36h, 7d.")
@click.option(
    "--budget",
    metavar="SIZE",
    help="Keep no more than fits: 50GB. First what is tagged and the newest, then best, last, every, within; "
    "without other options the best one and as many of the newest as fit.",
)
@click.option("--abandoned", is_flag=True, help="Delete what is not on the line, too, unless it is tagged.")
@click.option("--dry-run", is_flag=True, help="Print what would become of each checkpoint, and touch nothing.")
@click.option("--yes", is_flag=True, help="Do not ask. Without a terminal nobody is asked.")
@click.option("--force", is_flag=True, help="The process on another host that might be training is known to be gone.")
@quiet_option()
@json_option()
def command(
    reference: str,
    keep_last: int | None,
    keep_best: Sequence[str],
    keep_every: str | None,
    keep_within: str | None,
    budget: str | None,
    abandoned: bool,
    dry_run: bool,
    yes: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Delete the checkpoints of a run that no option keeps.

    Without options, keeps what a manager keeps by default: the last 3, and the best one by the metric that the run
    monitors. The newest checkpoint and every tagged one always stay, and so does what is not on the line, such as what
    was saved before somebody went back to an older step.

    Refuses (exit code 11) while somebody trains in the run. A process that starts to train meanwhile wins.
    """
    from ckptmgr.cli.output import note, print_json

    run = open_run(reference, command="prune")
    policy, words = chosen_policies(
        run.catalog,
        Keep(last=keep_last, best=tuple(keep_best), every=keep_every, within=keep_within, budget=budget),
    )
    verdicts = judge(run.catalog, policy, abandoned=abandoned)
    drop = [verdict.id for verdict in verdicts if not verdict.is_kept]
    if not as_json:
        _print_table(verdicts)
        note(f"kept: {words}")
        for id in run.catalog.torn:
            note(f"{id}: a save that was cut off, or is under way; {'would be' if dry_run else 'is'} cleared away")
    if not dry_run and (drop or has_leftovers(run.catalog)):
        refuse_if_in_use(run.catalog, force=force)
        if drop and not (yes or as_json):
            _confirm(f"delete {_amount(verdicts)} of {run.catalog.storage.url}?")
        prune_run(run.catalog, drop, force=force)
    if as_json:
        print_json(_document(run, verdicts, words, dry_run=dry_run))
    elif drop:
        note(f"{'would delete' if dry_run else 'deleted'} {_amount(verdicts)}")
    else:
        note("nothing to delete")


def _print_table(verdicts: Sequence[Verdict]) -> None:
    from ckptmgr.cli.output import format_metrics, format_nbytes, print_table

    print_table(
        ["step", "id", "size", "age", "metrics", "verdict", "reasons"],
        [
            [
                str(verdict.id.step),
                str(verdict.id),
                "" if verdict.facts is None else format_nbytes(verdict.facts.nbytes),
                "" if verdict.facts is None else _age(verdict.facts.created_at),
                ""
                if verdict.facts is None
                else format_metrics({name: metric_to_value(value) for name, value in verdict.facts.metrics.items()}),
                "keep" if verdict.is_kept else "drop",
                ", ".join(verdict.reasons),
            ]
            for verdict in verdicts
        ],
        right=["step", "size", "age"],
    )


def _age(created_at: float | None) -> str:
    from datetime import UTC, datetime

    from ckptmgr.cli.output import format_age

    return "?" if created_at is None else format_age(datetime.fromtimestamp(created_at, UTC).isoformat())


def _document(run: OpenRun, verdicts: Sequence[Verdict], words: str, *, dry_run: bool) -> dict[str, object]:
    dropped = [verdict for verdict in verdicts if not verdict.is_kept]
    return {
        "run_dir": run.catalog.storage.url,
        "dry_run": dry_run,
        "kept": words,
        "checkpoints": [
            {
                "id": str(verdict.id),
                "step": verdict.id.step,
                "is_kept": verdict.is_kept,
                "reasons": list(verdict.reasons),
                "nbytes": None if verdict.facts is None else verdict.facts.nbytes,
                "metrics": {}
                if verdict.facts is None
                else {name: metric_to_value(value) for name, value in verdict.facts.metrics.items()},
                "tags": [] if verdict.facts is None else sorted(verdict.facts.tags),
            }
            for verdict in verdicts
        ],
        "torn": [str(id) for id in run.catalog.torn],
        "deleted": [] if dry_run else [str(verdict.id) for verdict in dropped],
        "nbytes": sum(verdict.facts.nbytes for verdict in dropped if verdict.facts is not None),
    }


def _amount(verdicts: Sequence[Verdict]) -> str:
    from ckptmgr.cli.output import format_nbytes

    dropped = [verdict.facts for verdict in verdicts if not verdict.is_kept]
    nbytes = sum(facts.nbytes for facts in dropped if facts is not None)
    return f"{len(dropped)} checkpoint{'' if len(dropped) == 1 else 's'}, {format_nbytes(nbytes)}"


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        return
    if not click.confirm(question, err=True):
        raise CkptmgrError("nothing was deleted", why="the question was not answered with y", next="--yes asks nothing")
