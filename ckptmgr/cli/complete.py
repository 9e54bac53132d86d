"""What a shell may put where a command wants a run, a checkpoint or a file."""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage

__all__ = ["complete_checkpoint", "complete_directory", "complete_file", "complete_reference"]

_MAX_CHECKPOINTS = 50
"""A run may have thousands, and a shell waits for the answer."""


def complete_directory(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Let the shell complete a directory."""
    return [CompletionItem(incomplete, type="dir")]


def complete_file(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Let the shell complete a file."""
    return [CompletionItem(incomplete, type="file")]


def complete_reference(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete ``RUN_DIR@…`` from what a local run holds, and a directory where there is no ``@`` yet."""
    run_dir, at, begun = incomplete.rpartition("@")
    if not at or "/" in begun:
        return complete_directory(context, parameter, incomplete)
    if "://" in run_dir:
        return []  # No key press reaches for the network.
    try:
        catalog = Catalog(open_storage(run_dir))
        found = [item for item in _selectors(catalog) if item[0].startswith(begun)] if catalog.is_run else []
    except (CkptmgrError, OSError):
        return []
    return [CompletionItem(f"{run_dir}@{selector}", help=what) for selector, what in found]


def complete_checkpoint(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete ``RUN_DIR@…`` as `complete_reference`, and before that a directory or a file."""
    _, at, begun = incomplete.rpartition("@")
    if not at or "/" in begun:
        return complete_file(context, parameter, incomplete)
    return complete_reference(context, parameter, incomplete)


def _selectors(catalog: Catalog) -> Iterator[tuple[str, str]]:
    newest = list(reversed(catalog.on_line))[:_MAX_CHECKPOINTS]
    steps: dict[str, str] = {}
    tags: dict[str, str] = {}
    is_monitored = False
    for id in newest:
        try:
            manifest, facts = catalog.manifest(id), catalog.facts(id)
        except CorruptCheckpointError:
            continue
        is_monitored |= manifest.monitor is not None
        steps.setdefault(str(id.step), manifest.reason)
        for tag in sorted(facts.tags):
            tags.setdefault(tag, f"step {id.step}")
    if steps:
        yield "latest", f"step {next(iter(steps))}"
    if is_monitored:
        yield "best", "by the monitored metric"
    yield from tags.items()
    yield from steps.items()
