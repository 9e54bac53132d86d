"""Which run directory is used where none was given."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping

__all__ = ["absolute", "default_run_dir", "job_name"]

_INTERACTIVE = ("bash", "interactive")


def absolute(run_dir: str) -> str:
    """Return a local path from the root, so that it means the same after a change of directory; a URL as it is."""
    return run_dir if "://" in run_dir else os.path.abspath(os.path.expanduser(run_dir))  # noqa: PTH100, PTH111


def default_run_dir(root: str, environment: Mapping[str, str] | None = None, *, name: str | None = None) -> str:
    """Return a fresh directory below ``<root>/runs``, or that of the job if the launcher says that this is one.

    Args:
        root: Path or URL: the Trainer's ``default_root_dir``.
        environment: By default that of this process.
        name: The experiment's, put in front.
    """
    environment = os.environ if environment is None else environment
    job = job_name(environment)
    if job is None:
        job = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    return absolute(f"{root.rstrip('/')}/runs/{f'{name}-' if name else ''}{job}")


def job_name(environment: Mapping[str, str]) -> str | None:
    """Return a name that stays the same when the launcher starts this job again; None if there is no such launcher."""
    if job := environment.get("SLURM_JOB_ID"):
        # All work in an interactive allocation has one job id.
        if environment.get("SLURM_JOB_NAME") in _INTERACTIVE:
            return None
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{array}-{task}" if array and task else f"slurm-{job}"
    elastic = environment.get("TORCHELASTIC_RUN_ID")
    # torchrun's default id, which every job shares.
    return None if elastic in (None, "", "none") else f"elastic-{elastic}"
