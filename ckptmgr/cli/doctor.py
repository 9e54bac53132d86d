"""``ckptmgr doctor``: what a file or directory is, why it does not load, and what to do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from ckptmgr.cli.arguments import json_option, quiet_option
from ckptmgr.cli.complete import complete_file, complete_reference
from ckptmgr.errors import UsageError

if TYPE_CHECKING:
    from ckptmgr.diagnose.artifact import Artifact, TensorFacts

__all__ = ["command"]

_WRONG, _DAMAGED = 1, 12


def _complete_place(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    complete = complete_reference if "@" in incomplete else complete_file
    return complete(context, parameter, incomplete)


@click.command(name="doctor")
@click.argument("place", metavar="PATH|URL|RUN_DIR[@REF]", shell_complete=_complete_place)
@click.option(
    "--model", metavar="MODULE:NAME", help="Compare it with this model: a class, or a function that builds it."
)
@click.option("--model-arg", "model_args", metavar="NAME=VALUE", multiple=True, help="An argument for the model.")
@click.option(
    "--against", metavar="PATH2", help="Compare it with another file instead.", shell_complete=_complete_place
)
@quiet_option()
@json_option()
@click.pass_context
def command(
    context: click.Context,
    place: str,
    model: str | None,
    model_args: Sequence[str],
    against: str | None,
    as_json: bool,
) -> None:
    """Say what a file or directory is, what is wrong with it, and what loads it. Nothing of it is executed.

    With --model, everything is listed that does not fit, and what would make it fit. Your own code is imported for
    that, from the current directory too, as with `python -m`.

    \b
    ckptmgr doctor last.ckpt --model my_pkg.models:Net --model-arg width=128
    ckptmgr doctor old_weights.pt --against new_weights.safetensors

    Exits with 0 if it was recognised, nothing is wrong with it, and it fits; 1 if not; 10 if nothing is there; 12 if it
    is damaged.
    """
    if model is not None and against is not None:
        raise UsageError("--model and --against were both given", why="it is compared with one thing at a time")
    if model_args and model is None:
        raise UsageError("--model-arg was given without --model", why="it is an argument for the model")
    from ckptmgr.cli.output import print_json
    from ckptmgr.diagnose.diagnosis import diagnose

    artifact = _look(place)
    live, building = None, tuple[str, ...]()
    if model is not None:
        live, building = _live(model, model_args)
    elif against is not None:
        live = _look(against).tensors
        if live is None:
            raise UsageError(f"the tensors of {against} cannot be listed", next=f"ckptmgr doctor {against}")
    diagnosis = diagnose(place, lambda _: artifact, live=live, against=model or against, building=building)
    if as_json:
        from ckptmgr.cli.doctor_json import as_document

        print_json(as_document(diagnosis))
    else:
        from ckptmgr.cli.doctor_text import print_diagnosis

        print_diagnosis(diagnosis)
    if diagnosis.is_damaged:
        context.exit(_DAMAGED)
    if not diagnosis.is_well:
        context.exit(_WRONG)


def _look(place: str) -> Artifact:
    from ckptmgr.diagnose.sniff import sniff

    artifact: Artifact = sniff(place)
    return artifact


def _live(model: str, model_args: Sequence[str]) -> tuple[tuple[TensorFacts, ...], tuple[str, ...]]:
    from ckptmgr.diagnose.live_model import building_lines, model_arguments, model_facts

    arguments = model_arguments(model_args)

    # What the user's code prints is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        return model_facts(model, arguments), building_lines(model, arguments)
