"""Which run a manager goes on in: what the script says, unless ``ckptmgr resume`` says otherwise."""

from __future__ import annotations

import difflib
import os

from ckptmgr.errors import CheckpointNotFoundError, UsageError
from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE
from ckptmgr.run.reference import parse_reference

__all__ = ["STRICT_VARIABLE", "hint_at_choice", "requested_run"]

STRICT_VARIABLE = "CKPTMGR_STRICT_ENVIRONMENT"
"""Set to anything but 0, it has the same effect as ``strict_environment=True`` of a manager."""

_CHOICES = ("auto", "must", "never")


def requested_run(
    run_dir: str | os.PathLike[str] | None, resume: str, *, takes_references: bool = True
) -> tuple[str | None, str]:
    """Return the run directory and the resume choice in force: ``ckptmgr resume`` overrides what the script says.

    Args:
        run_dir: As the script says.
        resume: As the script says.
        takes_references: Whether ``resume`` may name a checkpoint of another run.

    Raises:
        UsageError: One of them cannot be meant as it was given.
    """
    if not isinstance(resume, str) or not resume:
        raise UsageError(
            f"resume={resume!r}",
            why="it is 'auto', 'must', 'never', or names a checkpoint of the run: 'best', a step, a tag, an id",
            next="a step is given as text too, such as resume='1200'",
        )
    if not takes_references and any(mark in resume for mark in "/@\\"):
        raise UsageError(
            f"resume={resume!r} names a checkpoint of another run",
            why="this run would begin in the middle of that one's data",
            next=f"once resume() has returned 0, ckpt.restore({resume!r}) begins with its weights and optimizer; "
            f"`ckptmgr resume {resume} --to RUN_DIR` copies all of it",
        )
    if run_dir is not None:
        run_dir = _checked_run_dir(run_dir)
    override = os.environ.get(RUN_DIR_VARIABLE)
    if override:
        reference = parse_reference(override)
        # A run that was killed before its first save has nothing to resume, and starts again.
        return reference.run_dir, "auto" if reference.selector == "latest" else reference.selector
    return run_dir, resume


def hint_at_choice(error: CheckpointNotFoundError, resume: str) -> CheckpointNotFoundError:
    """Return the error about a ``resume=`` that names nothing, with the word that was probably meant."""
    near = difflib.get_close_matches(resume.lower(), _CHOICES, n=1)
    if not near or resume in _CHOICES:
        return error
    return type(error)(error.what, why=error.why, next=f"did you mean resume={near[0]!r}? Otherwise, {error.next}")


def _checked_run_dir(run_dir: object) -> str:
    path = os.fspath(run_dir) if isinstance(run_dir, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise UsageError(
            f"{run_dir!r} is no run directory",
            why="it is a path or a URL, as text or as a pathlib.Path",
            next="give one directory for each training run, such as 'runs/digits'",
        )
    reference = parse_reference(path)
    if reference.run_dir != path:
        raise UsageError(
            f"{path!r} names a checkpoint, not a run directory",
            why="what stands after the last @ chooses a checkpoint of a run",
            next=f"give run_dir={reference.run_dir!r}, resume={reference.selector!r}, or a name without @",
        )
    return path
