"""What is recorded of each process start, so that a run can be explained later and started again.

Torch is not imported for it, and nothing secret is in it: arguments are redacted, and of the environment only a few
variables of launchers are kept.
"""

from __future__ import annotations

import getpass
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.format.record import FORMAT_VERSION
from ckptmgr.launch.experiment import ExperimentRecord, current_experiment
from ckptmgr.launch.git import GitState, read_git_state
from ckptmgr.launch.invocation import Invocation, Kind, current_invocation, torchrun_options
from ckptmgr.launch.project import find_project_root, path_in_project
from ckptmgr.launch.redact import redact_argv, redact_text, secret_values
from ckptmgr.run.clock import utc_now
from ckptmgr.run.environment import recorded_versions

__all__ = ["StartRecord", "describe_start"]

MAX_ARGS_LENGTH = 256 * 1024
_TOPOLOGY_VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)


class StartRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """``start.json`` of an attempt. Read back, it is a claim of whoever wrote the directory: see `relaunch`.

    Attributes:
        kind, target, args, interpreter_flags: As in `Invocation`; ``args`` redacted.
        is_redacted: ``args`` or ``launcher`` are not what was typed: something secret was taken out, or could not be
            stored.
        launcher: torchrun's options, redacted; None where no torchrun was recognised.
        script: Real path of the script; None for the kinds without one.
        script_in_project: The same, relative to ``project_root``.
        cwd, cwd_in_project: Where it was started; likewise.
        project_root: Nearest directory with a ``pyproject.toml`` or ``.git``, upwards from the script or ``cwd``.
        executable: The interpreter. Never used to start anything.
        versions: Of Python and of the packages that matter.
        topology: Variables that launchers set: ranks, job numbers.
        experiment: The configuration that this start was built from, if there is one.
        fork_of: For the attempt that a fork begins with: the parent's checkpoint. The rest then tells how the parent's
            training was started, and which process copied it.
    """

    version: int
    started_at: str
    kind: Kind
    target: str | None = None
    args: tuple[str, ...] = ()
    interpreter_flags: tuple[str, ...] = ()
    is_redacted: bool = False
    launcher: tuple[str, ...] | None = None
    script: str | None = None
    script_in_project: str | None = None
    cwd: str
    cwd_in_project: str | None = None
    project_root: str
    executable: str
    versions: dict[str, str]
    git: GitState | None = None
    host: str
    pid: int
    user: str | None = None
    platform: str
    cpu_count: int | None = None
    topology: dict[str, str] = {}
    experiment: ExperimentRecord | None = None
    fork_of: str | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line as one would type it today, interpreter first; for people, not for execution."""
        flags = ("python", *self.interpreter_flags)
        if self.launcher is not None:
            if self.kind == "module" and self.target == "ckptmgr" and "--nproc" in self.args:
                # It had started torchrun itself.
                return ("ckptmgr", *self.args)
            module = ("-m",) if self.kind == "module" else ()
            return ("torchrun", *self.launcher, *module, self.target or "?", *self.args)
        if self.kind == "entry-point":
            return (self.target or "?", *self.args)
        if self.kind in ("script", "module"):
            return (*flags, *(("-m",) if self.kind == "module" else ()), self.target or "?", *self.args)
        return (*flags, {"command": "-c", "stdin": "-"}.get(self.kind, f"<{self.kind}>"), *self.args)


def describe_start(*, run_dir: str | None = None) -> StartRecord:
    """Describe the start of this process. Never fails: what cannot be found out is left out.

    Args:
        run_dir: The run that is being started. Its own files do not make the work tree dirty.
    """
    invocation = current_invocation()
    options = torchrun_options(_parent_command_line(), invocation) if "TORCHELASTIC_RUN_ID" in os.environ else None
    args, args_changed = _storable(invocation.args)
    launcher, launcher_changed = _storable(options or ())
    script = _main_script(invocation)
    cwd = _starting_directory(invocation, script)
    root = find_project_root(script.parent if script and invocation.kind == "script" else cwd)
    experiment = current_experiment()
    return StartRecord(
        version=FORMAT_VERSION,
        started_at=utc_now(),
        kind=invocation.kind,
        target=None if invocation.target is None else _text(invocation.target),
        args=args,
        interpreter_flags=_storable(invocation.flags)[0],
        is_redacted=args_changed or launcher_changed,
        launcher=None if options is None else launcher,
        script=None if script is None else _text(str(script)),
        script_in_project=None if script is None else path_in_project(script, root),
        cwd=_text(str(cwd)),
        cwd_in_project=path_in_project(cwd, root),
        project_root=_text(str(root)),
        executable=_text(sys.executable or ""),
        versions=recorded_versions(),
        git=_git_state(root, run_dir),
        host=socket.gethostname(),
        pid=os.getpid(),
        user=_user(),
        platform=platform.platform(),
        cpu_count=_cpu_count(),
        topology=_topology(os.environ),
        experiment=None if experiment is None else experiment.record,
    )


def _git_state(root: Path, run_dir: str | None) -> GitState | None:
    # A repository can name programs that git runs (filters). What came with a run directory is never executed.
    if any((folder / RUN_MARKER).exists() for folder in (root, *root.parents)):
        return None
    return read_git_state(root, ignore=None if run_dir is None or "://" in run_dir else Path(run_dir).resolve())


def _storable(words: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    fitting: list[str] = []
    length = 0
    for word in words:
        length += len(word)
        if length > MAX_ARGS_LENGTH:
            break
        fitting.append(word)
    redacted = redact_argv(fitting, os.environ)
    texts = tuple(_text(word) for word in redacted.argv)
    if len(fitting) < len(words):
        return (*texts, f"[{len(words) - len(fitting)} more arguments]"), True
    return texts, redacted.is_redacted or texts != redacted.argv


def _text(value: str) -> str:
    # Bytes of a command line that are not UTF-8 are lone surrogates in Python, which JSON cannot hold.
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _main_script(invocation: Invocation) -> Path | None:
    if invocation.kind not in ("script", "module"):
        return None
    # Absolute since Python 3.9, so it survives a change of directory before this is called.
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).resolve() if file else None


def _starting_directory(invocation: Invocation, script: Path | None) -> Path:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if invocation.kind == "script" and file and invocation.target and not Path(invocation.target).is_absolute():
        # `__file__` is the starting directory, joined with the script as it was typed.
        before = str(file).removesuffix(os.sep + invocation.target)
        if before != file and Path(before).is_dir():
            return Path(before).resolve()
    try:
        return Path.cwd()
    except FileNotFoundError:
        return script.parent if script else Path(os.sep)


def _parent_command_line() -> list[str]:
    try:
        data = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in data.split(b"\0")[:-1]]


def _topology(environ: Mapping[str, str]) -> dict[str, str]:
    secrets = secret_values(environ)
    return {name: _text(redact_text(environ[name], secrets))[:200] for name in _TOPOLOGY_VARIABLES if name in environ}


def _user() -> str | None:
    try:
        return _text(getpass.getuser())
    except (OSError, KeyError, ImportError):
        # A container may run under a number that has no name.
        return None


def _cpu_count() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
