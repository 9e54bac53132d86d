"""Arguments and options that commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from ckptmgr.cli.complete import complete_reference
from ckptmgr.errors import UsageError
from ckptmgr.progress import set_quiet
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reference import URL_PREFIX, parse_reference
from ckptmgr.storage.open import open_storage

__all__ = ["OpenRun", "json_option", "open_run", "quiet_option", "refuse_configuration", "run_dir_argument"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that a command was given.

    Attributes:
        run_dir: As it was typed, without the selector.
        selector: What was typed after the ``@``; None where nothing was.
        catalog: What the run holds.
    """

    run_dir: str
    selector: str | None
    catalog: Catalog


def run_dir_argument(metavar: str) -> Callable[[F], F]:
    """The argument that names a run, or a checkpoint of it."""
    return click.argument("reference", metavar=metavar, shell_complete=complete_reference)


def json_option() -> Callable[[F], F]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def quiet_option() -> Callable[[F], F]:
    """``--quiet``."""
    return click.option(
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_quiet,
        help="Print nothing on stderr but errors.",
    )


def _set_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    set_quiet(value)
    if value:
        logger = logging.getLogger("ckptmgr")
        context.call_on_close(partial(logger.setLevel, logger.level))
        context.call_on_close(partial(set_quiet, False))
        logger.setLevel(logging.ERROR)


def open_run(text: str, *, command: str | None = None) -> OpenRun:
    """Open the run that an argument names.

    Args:
        text: ``RUN_DIR`` or ``RUN_DIR@SELECTOR``.
        command: The command, where it takes no selector.

    Raises:
        RunNotFoundError: There is no run.
        UsageError: A selector was given to a command that takes none, or a configuration instead of a run.
    """
    reference = parse_reference(text)
    selector = None if reference.run_dir == text.removeprefix(URL_PREFIX) else reference.selector
    if command is not None and selector is not None:
        raise UsageError(
            f"ckptmgr {command} was given the checkpoint {text!r}",
            why="it is about a whole run",
            next=f"ckptmgr {command} {reference.run_dir}",
        )
    refuse_configuration(reference.run_dir)
    return OpenRun(reference.run_dir, selector, Catalog.of_existing_run(open_storage(reference.run_dir)))


def refuse_configuration(run_dir: str) -> None:
    """Refuse a configuration that was given where a run is meant.

    Raises:
        UsageError: It is a YAML file.
    """
    if run_dir.endswith((".yaml", ".yml")) and Path(run_dir).is_file():
        raise UsageError(f"{run_dir} is a configuration, not a run", next=f"ckptmgr run {run_dir} starts one from it")
