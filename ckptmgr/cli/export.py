"""``ckptmgr export``: one checkpoint as files that other tools read."""

from __future__ import annotations

import dataclasses

import click

from ckptmgr.cli.arguments import json_option, quiet_option, run_dir_argument
from ckptmgr.cli.complete import complete_file

__all__ = ["command"]

_FORMATS = ("safetensors", "huggingface", "lightning", "state-dict")
_SHOWN = 5


@click.command(name="export")
@run_dir_argument("RUN_DIR[@REF]")
@click.argument("target", metavar="TARGET", shell_complete=complete_file)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(_FORMATS),
    help="By default as TARGET ends: .ckpt lightning, .pt or .pth state-dict, anything else safetensors.",
)
@click.option("--entry", metavar="NAME", help="The module, where there are several.")
@click.option("--strip-prefix", metavar="PREFIX", help="Only what begins so, without it: model. for self.model.")
@click.option("--max-shard-size", metavar="SIZE", help="Cut safetensors into files of at most this size: 2GB.")
@click.option("--force", is_flag=True, help="Write over what is there.")
@quiet_option()
@json_option()
def command(
    reference: str,
    target: str,
    format_name: str | None,
    entry: str | None,
    strip_prefix: str | None,
    max_shard_size: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as files that other tools read.

    \b
    safetensors   TARGET is a directory, or one file that ends in .safetensors
    huggingface   the same, with the config and tokenizer files of an imported model
    lightning     a .ckpt that Lightning resumes from and loads, without ckptmgr
    state-dict    the plain state dict, for torch.load(weights_only=True)

    Tied weights are written once in safetensors, under their first name. Every byte is checked against its digest;
    a target appears whole or not at all.
    """
    from typing import cast

    from ckptmgr.interop.export import Format, export_checkpoint

    exported = export_checkpoint(
        reference,
        target,
        format=cast(Format, format_name or _format_of(target)),
        entry=entry,
        strip_prefix=strip_prefix,
        max_shard_size=max_shard_size,
        force=force,
    )
    if as_json:
        from ckptmgr.cli.output import print_json

        print_json(dataclasses.asdict(exported))
        return
    from ckptmgr.cli.output import note

    print(f"exported {exported.reference} to {exported.target}")
    if exported.tied:
        note("tied, and written once: " + _listed([f"{name} is {first}" for name, first in exported.tied.items()]))
    if exported.left_out:
        note(f"not written: {_listed(exported.left_out)}")
    for text in exported.notes:
        note(f"note: {text}")


def _format_of(target: str) -> str:
    if target.endswith(".ckpt"):
        return "lightning"
    return "state-dict" if target.endswith((".pt", ".pth", ".bin")) else "safetensors"


def _listed(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", … {more} more" if more > 0 else "")
