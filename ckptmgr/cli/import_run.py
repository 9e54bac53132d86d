"""``ckptmgr import``: a new run from what another tool has saved."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

import click

from ckptmgr.cli.arguments import json_option, quiet_option
from ckptmgr.cli.complete import complete_directory, complete_file
from ckptmgr.errors import UsageError

__all__ = ["command"]


@click.command(name="import")
@click.argument("source", metavar="SOURCE", shell_complete=complete_file)
@click.argument("run_dir", metavar="RUN_DIR", shell_complete=complete_directory)
@click.option("--key", metavar="KEY", help="Where the state dict stands in the file: state_dict, or ema.model.")
@click.option("--model", metavar="MODULE:NAME", help="Builds the model: names the optimizer's parameters exactly.")
@click.option("--model-arg", "model_args", metavar="NAME=VALUE", multiple=True, help="An argument for the model.")
@click.option("--allow", metavar="PKG.CLASS", multiple=True, help="A class that the file may use. Repeatable.")
@click.option("--weights-only", is_flag=True, help="Take the weights alone.")
@click.option("--step", type=click.IntRange(min=0), help="Optimizer updates completed, where SOURCE does not say.")
@quiet_option()
@json_option()
def command(
    source: str,
    run_dir: str,
    key: str | None,
    model: str | None,
    model_args: Sequence[str],
    allow: tuple[str, ...],
    weights_only: bool,
    step: int | None,
    as_json: bool,
) -> None:
    """Make a new run of what another tool has saved.

    \b
    a .ckpt of Lightning                   a Trainer with a CheckpointManager in RUN_DIR goes on from it
    a file of torch.save                   a state dict, or a dict that holds one
    a whole pickled module                 its parameters and buffers; its class is not needed
    safetensors                            a file, or a directory with an index
    torch.distributed.checkpoint           a directory
    Accelerate, transformers' Trainer      what save_state and the Trainer write
    a Hugging Face model directory         with its config and tokenizer files

    Nothing in a file is executed. What it needs besides tensors and plain values is listed, and loaded only if it is
    allowed by name; with --weights-only the tensors are read without it. What the file does not hold, or what had to
    be guessed, is said.
    """
    from ckptmgr.diagnose.live_model import model_arguments
    from ckptmgr.interop.import_run import import_run

    if model_args and model is None:
        raise UsageError("--model-arg was given without --model", why="it is an argument for the model")
    arguments = model_arguments(model_args)
    with contextlib.redirect_stdout(sys.stderr):
        # What the user's code prints is no part of the answer.
        imported = import_run(
            source,
            run_dir,
            key=key,
            model=model,
            model_arguments=arguments,
            allow=allow,
            weights_only=weights_only,
            step=step,
        )
    if as_json:
        from ckptmgr.cli.output import print_json

        print_json(dataclasses.asdict(imported))
        return
    from ckptmgr.cli.output import note

    print(f"imported {imported.source}, {imported.what}, as {imported.reference}: {', '.join(imported.entries)}")
    for text in imported.notes:
        note(f"note: {text}")
