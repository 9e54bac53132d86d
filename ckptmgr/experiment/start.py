"""Starting an experiment: where it runs, what is recorded of it, and training it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ckptmgr.config.changes import Change
from ckptmgr.experiment.plan import Plan
from ckptmgr.launch.experiment import Experiment, ExperimentRecord, building_experiment, document_digest
from ckptmgr.launch.redact import redact_argv, redact_text, secret_values
from ckptmgr.launch.run_directory import default_run_dir
from ckptmgr.run.reference import Reference

__all__ = ["check", "choose_run_dir", "train"]


def check(plan: Plan, *, nproc: int | None = None) -> None:
    """Import everything that an experiment names and check that it can be built. Nothing is built.

    Args:
        plan: The experiment.
        nproc: By how many ranks it would be trained; None: by those of this job.

    Raises:
        ConfigError, NotAllowedError: Something cannot be built. Names the key.
    """
    _kind_module(plan).check(plan, nproc=nproc)


def choose_run_dir(plan: Plan, *, source: str) -> str:
    """Return where an experiment runs: what the configuration says, else a fresh directory below ``runs/``.

    Args:
        plan: The experiment.
        source: The configuration's path: names the run where the configuration does not.
    """
    if plan.tree["run_dir"] is not None:
        return str(plan.tree["run_dir"])
    fresh = default_run_dir(str(Path.cwd()), name=plan.tree["name"] or Path(source).stem)
    return os.path.relpath(fresh)


def train(
    plan: Plan,
    *,
    run_dir: str,
    resume: str = "auto",
    fork_from: Reference | None = None,
    source: str | None = None,
    overrides: Sequence[str] = (),
    changes: Sequence[Change] = (),
) -> None:
    """Build an experiment and train it to its end, in this process.

    Args:
        plan: The experiment.
        run_dir: Where it runs.
        resume: As the manager's.
        fork_from: A checkpoint of another run, which is first copied into a new run at ``run_dir``.
        source: The configuration as it was named; None where it is the run's own.
        overrides: As they were typed.
        changes: How it differs from the run's last start.

    Raises:
        ConfigError: Something cannot be built. Nothing was claimed.
        StateMismatchError: The checkpoint does not fit what was built. Nothing was claimed.
        Preempted: The process was told to stop; the state is saved.
    """
    experiment = _experiment(plan, source, overrides, changes)
    with building_experiment(experiment):
        _kind_module(plan).train(plan, run_dir=run_dir, resume=resume, fork_from=fork_from)


def _kind_module(plan: Plan) -> Any:
    # Imported here: they import torch, and what cannot be meant should be told before that.
    return import_module(f"ckptmgr.experiment.{'with_lightning' if plan.kind == 'lightning' else 'with_a_loop'}")


def _experiment(plan: Plan, source: str | None, overrides: Sequence[str], changes: Sequence[Change]) -> Experiment:
    stored = plan.stored
    secrets = secret_values(os.environ)
    return Experiment(
        config=stored.config,
        resolved=stored.resolved,
        record=ExperimentRecord(
            source=None if source is None else redact_text(source, secrets),
            config_digest=document_digest(stored.config.encode()),
            resolved_digest=document_digest(stored.resolved.encode()),
            overrides=redact_argv(overrides, os.environ).argv,
            changes=tuple(map(str, changes)),
            redacted=stored.redacted,
        ),
    )
