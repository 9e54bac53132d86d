"""What a checkpoint was written with, from its manifest and the start record of its attempt, and what there is now."""

from __future__ import annotations

from pathlib import Path

from ckptmgr.errors import CkptmgrError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.format.manifest import Manifest
from ckptmgr.launch.git import GitState, read_git_state
from ckptmgr.launch.project import find_project_root
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.run.environment import recorded_versions
from ckptmgr.run.lineage import read_attempt_record
from ckptmgr.storage.protocol import Storage

__all__ = ["environment_now", "environment_then"]

_GIT_TIMEOUT_S = 5.0


def environment_then(storage: Storage, manifest: Manifest) -> dict[str, str]:
    """Return what is recorded of the process that wrote a checkpoint. What cannot be read is left out.

    Args:
        storage: The run's root.
        manifest: The checkpoint's.

    Returns:
        Package → version, with ``python``, ``cuda`` and ``machine``; and ``git.commit`` and ``git.changes`` where the
        program is that of the current project, so that they mean anything here.
    """
    record = _start_record(storage, manifest.attempt)
    found = {**(record.versions if record is not None else {}), **manifest.environment}
    # What was imported says what it was made of; this process is no later state of that.
    found = {name: version for name, version in found.items() if not name.startswith("source.")}
    if record is not None and Path(record.project_root).name == _project().name:
        found |= _git_facts(record.git)
    return found


def environment_now(*, ignore: Path | None = None) -> dict[str, str]:
    """Return the same of this process and of the project in the current directory.

    Args:
        ignore: A run directory, whose files do not make the work tree another one.
    """
    root = _project()
    found = recorded_versions()
    # A repository can name programs that git runs (filters). What came with a run directory is never executed.
    if not any((folder / RUN_MARKER).exists() for folder in (root, *root.parents)):
        found |= _git_facts(read_git_state(root, ignore=ignore and ignore.absolute(), timeout_s=_GIT_TIMEOUT_S))
    return found


def _start_record(storage: Storage, attempt: int) -> StartRecord | None:
    try:
        return read_attempt_record(storage, attempt, "start", StartRecord)
    except (CkptmgrError, FileNotFoundError):
        return None


def _git_facts(git: GitState | None) -> dict[str, str]:
    if git is None or git.commit is None:
        return {}
    return {"git.commit": git.commit[:12], "git.changes": (git.diff_digest or "none")[:12]}


def _project() -> Path:
    try:
        return find_project_root(Path.cwd())
    except OSError:
        return Path("/")
