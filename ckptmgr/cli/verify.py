"""``ckptmgr verify``: read everything, compare every digest, name what is damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import click

from ckptmgr.cli.arguments import OpenRun, json_option, open_run, quiet_option, run_dir_argument
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, FormatVersionError, UsageError
from ckptmgr.format.layout import ATTEMPTS, RUN_MARKER, CheckpointId
from ckptmgr.progress import progress
from ckptmgr.run.verify import Damage, verify_checkpoint

__all__ = ["command"]


@dataclass(frozen=True, slots=True)
class _Verdict:
    checkpoint: CheckpointId
    nbytes: int
    damages: list[Damage]
    unreadable: FormatVersionError | None = None

    @property
    def word(self) -> str:
        return "damaged" if self.damages else "not readable by this version" if self.unreadable else "whole"


@click.command(name="verify")
@run_dir_argument("RUN_DIR[@REF]")
@click.option("--golden", is_flag=True, help="Also run the golden samples of the checkpoint again.")
@click.option("--model", metavar="MODULE:NAME", help="For --golden: a class or function that builds the model.")
@click.option("--model-arg", "model_args", metavar="NAME=VALUE", multiple=True, help="An argument for the model.")
@click.option("--allow", multiple=True, metavar="PATTERN", help="For --golden: code that the checkpoint may name.")
@quiet_option()
@json_option()
def command(
    reference: str, golden: bool, model: str | None, model_args: Sequence[str], allow: Sequence[str], as_json: bool
) -> None:
    """Recompute every digest of a checkpoint (RUN_DIR@REF), or of a whole run (RUN_DIR).

    With --golden, preprocessing and model of the checkpoint (RUN_DIR: the newest one) are built and run on its golden
    samples: by the run's configuration, or by --model, which is imported, from the current directory too.

    Exits with 12 if something is damaged, with 1 if a golden sample no longer gives what it gave. Changes nothing.
    """
    if not golden and (model is not None or model_args or allow):
        raise UsageError("--model and --allow were given without --golden", why="digests need no model")
    if model_args and model is None:
        raise UsageError("--model-arg was given without --model", why="it is an argument for the model")
    run = open_run(reference)
    chosen = _chosen(run)
    verdicts = [_verify(run, id, f"{position} of {len(chosen)}") for position, id in enumerate(chosen, start=1)]
    records = _damaged_records(run) if run.selector is None else []
    if as_json:
        _print_json(run, verdicts, records)
    else:
        _print_tables(verdicts, records)
    if records or any(verdict.damages for verdict in verdicts):
        raise _error(run, verdicts, records)
    for verdict in verdicts:
        if verdict.unreadable is not None:
            raise verdict.unreadable
    if golden:
        _check_golden(run, model, model_args, allow)


def _check_golden(run: OpenRun, model: str | None, model_args: Sequence[str], allow: Sequence[str]) -> None:
    from functools import partial

    from ckptmgr.cli.output import note
    from ckptmgr.diagnose.live_model import model_arguments, named_object
    from ckptmgr.inference import load_inference

    factory = None if model is None else named_object(model)
    if factory is not None and model_args:
        factory = partial(factory, **model_arguments(model_args))
    loaded = load_inference(f"{run.run_dir}@{run.selector or 'latest'}", model=factory, allow=allow)
    if loaded.ngolden is None:
        raise CheckpointNotFoundError(
            f"{loaded.reference} has no golden samples",
            why="none were given to the manager that saved it",
            next="CheckpointManager(..., golden=[raw input, ...]), or Checkpointer(..., golden=[...])",
        )
    note(f"{loaded.ngolden} golden samples give what they gave")


def _chosen(run: OpenRun) -> list[CheckpointId]:
    if run.selector is not None:
        return [run.catalog.resolve(run.selector).id]
    if not run.catalog.committed:
        raise CheckpointNotFoundError(
            f"nothing to verify in {run.catalog.storage.url}",
            why="no checkpoint was committed" + (", only cut-off saves are there" if run.catalog.torn else ""),
            next=f"ckptmgr show {run.run_dir} tells how its attempts ended",
        )
    return run.catalog.committed


def _verify(run: OpenRun, id: CheckpointId, position: str) -> _Verdict:
    try:
        nbytes = run.catalog.manifest(id).nbytes
    except CorruptCheckpointError:
        nbytes = 0
    except FormatVersionError as error:
        return _Verdict(id, 0, [], error)
    with progress(f"verifying step {id.step} ({position})", nbytes) as advance:
        return _Verdict(id, nbytes, verify_checkpoint(run.catalog, id, advance))


def _damaged_records(run: OpenRun) -> list[Damage]:
    from ckptmgr.cli.listing import explain, read_attempts

    damages = []
    for attempt in read_attempts(run.catalog):
        folder = f"{ATTEMPTS}{attempt.number:06d}"
        damages += [
            Damage(folder, explain(error)) for error in attempt.problems if isinstance(error, CorruptCheckpointError)
        ]
    for path, name in ((RUN_MARKER, "marker"), (ATTEMPTS, "line")):
        try:
            getattr(run.catalog, name)
        except CorruptCheckpointError as error:
            damages.append(Damage(path, explain(error)))
        except FormatVersionError:
            continue
    return damages


def _print_json(run: OpenRun, verdicts: Sequence[_Verdict], records: Sequence[Damage]) -> None:
    from ckptmgr.cli.output import print_json

    print_json(
        {
            "run_dir": run.catalog.storage.url,
            "checkpoints": [
                {
                    "id": str(verdict.checkpoint),
                    "step": verdict.checkpoint.step,
                    "nbytes": verdict.nbytes,
                    "is_whole": verdict.word == "whole",
                    "damages": [dataclasses.asdict(damage) for damage in verdict.damages],
                }
                for verdict in verdicts
            ],
            "records": [dataclasses.asdict(damage) for damage in records],
        }
    )


def _print_tables(verdicts: Sequence[_Verdict], records: Sequence[Damage]) -> None:
    from ckptmgr.cli.output import format_nbytes, print_table

    print_table(
        ["step", "checkpoint", "size", "verdict"],
        [
            [str(verdict.checkpoint.step), str(verdict.checkpoint), format_nbytes(verdict.nbytes), verdict.word]
            for verdict in verdicts
        ],
        right=["step", "size"],
    )
    damages = [damage for verdict in verdicts for damage in verdict.damages] + list(records)
    if damages:
        print()
        print_table(
            ["tensor", "file", "damage"],
            [[damage.tensor or "", damage.path, damage.problem] for damage in damages],
        )


def _error(run: OpenRun, verdicts: Sequence[_Verdict], records: Sequence[Damage]) -> CorruptCheckpointError:
    damaged = [verdict for verdict in verdicts if verdict.damages]
    whole = [verdict.checkpoint for verdict in verdicts if verdict.word == "whole"]
    first = damaged[0].damages[0] if damaged else records[0]
    if damaged:
        counted = (
            f"{len(damaged)} of {len(verdicts)} checkpoints"
            if len(verdicts) > 1
            else f"step {damaged[0].checkpoint.step}"
        )
    else:
        counted = "no checkpoint, but a record of the run"
    if whole:
        advice = f"step {max(whole).step} is whole: {run.run_dir}@{max(whole)}"
    else:
        advice = f"`ckptmgr verify {run.run_dir}` looks for a checkpoint that is whole"
    return CorruptCheckpointError(
        f"damaged: {counted} in {run.catalog.storage.url}",
        why=f"{f'{first.tensor} in ' if first.tensor else ''}{first.path}: {first.problem}",
        next=advice,
    )
