"""What is not as it was at the checkpoint that training goes on from: told once, graded, before anything is claimed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptmgr.diagnose.drift import Drift, drift_lines, grade, refuse_drift
from ckptmgr.diagnose.recorded_code import compare_code, recorded_classes
from ckptmgr.diagnose.then_and_now import environment_now, environment_then
from ckptmgr.launch.requested import STRICT_VARIABLE
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.storage.protocol import Storage

__all__ = ["drift_since", "tell_code_drift", "tell_drift"]

_log = logging.getLogger("ckptmgr")


def drift_since(storage: Storage, loaded: LoadedCheckpoint, classes: Mapping[str, str | None]) -> list[Drift]:
    """Return how this process differs from the one that wrote a checkpoint, the likeliest cause of a failure first.

    Args:
        storage: The run's root.
        loaded: The checkpoint.
        classes: The code of the live modules: class → digest of its source.
    """
    then = environment_then(storage, loaded.manifest)
    now = environment_now(ignore=None if "://" in loaded.run_dir else Path(loaded.run_dir))
    code = compare_code(recorded_classes(loaded.manifest), classes)
    return grade({**then, **code.then}, {**now, **code.now}, code.reasons)


def tell_code_drift(loaded: LoadedCheckpoint, classes: Mapping[str, str | None]) -> None:
    """Log which classes of a checkpoint's modules are not found any more, or are not what they were.

    Args:
        loaded: The checkpoint.
        classes: The code of the live modules: class → digest of its source.
    """
    code = compare_code(recorded_classes(loaded.manifest), classes)
    if drifts := grade(code.then, code.now, code.reasons):
        _tell(loaded, drifts)


def tell_drift(storage: Storage, loaded: LoadedCheckpoint, classes: Mapping[str, str | None], *, strict: bool) -> None:
    """Log how this process differs from the one that wrote a checkpoint; nothing where it does not.

    Args:
        storage: The run's root.
        loaded: The checkpoint that training goes on from.
        classes: The code of the live modules: class → digest of its source.
        strict: Refuse to go on where a difference may matter.

    Raises:
        EnvironmentDriftError: With ``strict``, something is graded above info.
    """
    drifts = drift_since(storage, loaded, classes)
    if strict or os.environ.get(STRICT_VARIABLE, "") not in ("", "0"):
        refuse_drift(drifts, loaded.reference)
    if drifts:
        _tell(loaded, drifts)


def _tell(loaded: LoadedCheckpoint, drifts: Sequence[Drift]) -> None:
    level = logging.INFO if all(drift.grade == "info" for drift in drifts) else logging.WARNING
    lines = "\n  ".join(drift_lines(drifts))
    _log.log(level, "not as it was when step %d was saved:\n  %s", loaded.manifest.step, lines)
