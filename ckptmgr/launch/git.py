"""The state of the code under git: commit, branch, and a digest of what is not committed. Absent git is no error."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

import msgspec

__all__ = ["GitState", "read_git_state"]

# No user's pager, hook, file-system monitor, external diff or prompt may run, and no lock may be taken.
_COMMAND = ("git", "-c", "core.fsmonitor=false", "-c", "core.quotepath=false")
_QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_PAGER": "cat", "LC_ALL": "C"}


class GitState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a clone of the repository needs to be the code that ran.

    Attributes:
        commit: Full hash; None before the first commit.
        branch: Its short name; None on a detached head.
        is_dirty: Tracked files differ from the commit, or untracked ones lie beside them; None if that took too long.
        diff_digest: SHA-256 over ``git diff HEAD`` and the names of untracked files; None for a clean tree.
    """

    commit: str | None = None
    branch: str | None = None
    is_dirty: bool | None = None
    diff_digest: str | None = None


def read_git_state(folder: Path, *, ignore: Path | None = None, timeout_s: float = 10.0) -> GitState | None:
    """Describe the repository around a directory; None if there is none, or no git, or git does not answer in time.

    Args:
        folder: A directory within the work tree.
        ignore: A directory whose untracked files do not count: the run that is being recorded.
        timeout_s: For everything together. In seconds.
    """
    deadline = time.monotonic() + timeout_s
    top = _git(folder, deadline, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    root = Path(os.fsdecode(top.rstrip(b"\n")))
    commit = _text(_git(root, deadline, "rev-parse", "--verify", "--quiet", "HEAD"))
    branch = _text(_git(root, deadline, "symbolic-ref", "--short", "--quiet", "HEAD"))
    diff = _git(root, deadline, "diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD") if commit else b""
    untracked = _git(root, deadline, "ls-files", "--others", "--exclude-standard", "--directory", "-z")
    if diff is None or untracked is None:
        return GitState(commit=commit, branch=branch)
    names = [name for name in untracked.split(b"\0") if name and not _holds(root / os.fsdecode(name), ignore)]
    is_dirty = bool(diff or names)
    digest = hashlib.sha256(b"\0".join((diff, *sorted(names)))).hexdigest() if is_dirty else None
    return GitState(commit=commit, branch=branch, is_dirty=is_dirty, diff_digest=digest)


def _holds(path: Path, inner: Path | None) -> bool:
    return inner is not None and path in (inner, *inner.parents)


def _text(output: bytes | None) -> str | None:
    return (output or b"").decode(errors="replace").strip() or None


def _git(folder: Path, deadline: float, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            [*_COMMAND, "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_QUIET},
            timeout=max(0.0, deadline - time.monotonic()),
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
