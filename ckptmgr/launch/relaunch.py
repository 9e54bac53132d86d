"""From the record of a process start to the command that starts it again; refused where that could not be trusted.

The record comes with the run directory, and that may come from anybody. So nothing of it is executed but a program that
lies in the user's own project, under the interpreter and in the environment of today, in a directory of the project.
Everything else wants ``--allow-command`` from somebody who has read the command.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from ckptmgr.errors import ResumeRefusedError
from ckptmgr.launch.project import find_project_root, why_not_own_code
from ckptmgr.launch.start_record import StartRecord
from ckptmgr.launch.torchrun import end_of_options, torchrun_words, why_not_on_this_machine, why_not_repeated

__all__ = ["RUN_DIR_VARIABLE", "Relaunch", "relaunch_command", "shell_line", "start"]

RUN_DIR_VARIABLE = "CKPTMGR_RUN_DIR"
"""Names the run for the managers in the relaunched program, as RUN_DIR or RUN_DIR@SELECTOR."""

# No option that imports something or names a path: -W imports a dotted category, -X pycache_prefix loads code.
_SAFE_FLAG = re.compile(
    r"-[uOBEIPs]"
    r"|-X(?:faulthandler|dev|utf8(?:=[01])?|importtime|no_debug_ranges|tracemalloc(?:=\d{1,3})?)"
    r"|-W(?:default|error|always|module|once|ignore|d|e|a|m|o|i)(?::[\w .,()-]*(?::[A-Za-z]*)?)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Relaunch:
    """A command that may be executed.

    Attributes:
        argv: Program and arguments; the program is today's interpreter.
        cwd: Where to run it.
        env: What to add to the present environment.
        notes: What differs from the recorded start, for the user to read.
        has_launcher: It is torchrun that is started, and it starts the program.
    """

    argv: tuple[str, ...]
    cwd: Path
    env: dict[str, str]
    notes: tuple[str, ...] = ()
    has_launcher: bool = False

    @property
    def shell_line(self) -> str:
        """The command for a POSIX shell, safe to print and to paste."""
        return f"cd {shell_line([str(self.cwd)])} && {shell_line(self.argv, self.env)}"


def relaunch_command(
    record: StartRecord,
    *,
    run_dir: str,
    cwd: Path,
    selector: str = "latest",
    nproc: int | None = None,
    allow_command: bool = False,
) -> Relaunch:
    """Return the command that goes on with a run.

    Args:
        record: The start to repeat.
        run_dir: The run as the user named it; a local path may be relative to ``cwd``.
        cwd: Where the user is: it decides what the current project is.
        selector: The checkpoint to go on from.
        nproc: On how many processes of this machine; None: as it was started.
        allow_command: The user has read the recorded command and wants it, wherever its program lies.

    Raises:
        ResumeRefusedError: It cannot be repeated, or must not be without ``allow_command``. Names the command.
    """
    location = run_dir if "://" in run_dir else str((cwd / Path(run_dir).expanduser()).resolve())
    env = {RUN_DIR_VARIABLE: location if selector == "latest" else f"{location}@{selector}"}
    _refuse_incomplete(record, env, nproc)
    if nproc is not None:
        _refuse_several_machines(record, env)
    root = find_project_root(cwd)
    try:
        workdir, notes = _working_directory(record, root, allow_command=allow_command)
        launcher, left_out = _launcher(record, nproc, may_restart=selector == "latest", allow_command=allow_command)
        program = _program(record, root, workdir, allow_command=allow_command)
        module = ("-m",) if record.kind == "module" else ()
        ends = end_of_options(record.args) if launcher else ()
        command = (*launcher, *module, *ends, *program)
        if any("\0" in word for word in command):
            raise _NotAllowed("a word of the command holds a NUL character")
        flags, dropped = _interpreter_flags(record, has_launcher=bool(launcher), allow_command=allow_command)
    except _NotAllowed as error:
        raise ResumeRefusedError(
            f"the recorded start of {run_dir} is not repeated without being asked",
            why=error.args[0],
            next="read the recorded command, and if you want it, add --allow-command: " + shell_line(record.argv, env)
            if not allow_command
            else "start it by hand: " + shell_line(record.argv, env),
        ) from error
    notes += [*left_out, *dropped]
    return Relaunch((sys.executable, *flags, *command), workdir, env, tuple(notes), has_launcher=bool(launcher))


def start(relaunch: Relaunch) -> NoReturn:
    """Become the relaunched process. Where that is possible, signals and the exit status need no forwarding."""
    environ = {**os.environ, **relaunch.env}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.chdir(relaunch.cwd)
        os.execve(relaunch.argv[0], relaunch.argv, environ)
    sys.exit(_run_child(relaunch, environ))


def shell_line(argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Quote a command for a POSIX shell. Control characters are spelled out: they could hide what is printed."""
    assignments = [f"{name}={_quote(value)}" for name, value in (env or {}).items()]
    return " ".join((*assignments, *map(_quote, argv)))


class _NotAllowed(Exception):
    """Why a recorded command is not repeated as it is."""


def _refuse_incomplete(record: StartRecord, env: Mapping[str, str], nproc: int | None) -> None:
    run_dir = env[RUN_DIR_VARIABLE]
    if record.kind in ("command", "stdin", "interactive", "notebook") or record.target is None:
        source = {
            "command": "python -c",
            "stdin": "a program on standard input",
            "interactive": "an interactive session",
            "notebook": "a notebook",
        }.get(record.kind, record.kind)
        raise ResumeRefusedError(
            f"{run_dir} was started from {source}",
            why="its code is not in a file, so there is nothing to start again",
            next=f"run the code again with {shell_line([], env)} in its environment,"
            f" or with CheckpointManager({run_dir!r}) or Checkpointer({run_dir!r}, state=…) in it",
        )
    if record.is_redacted:
        # --allow-command cannot help: with a placeholder for a secret the program would fail late, or worse, not fail.
        raise ResumeRefusedError(
            f"{run_dir} was started with arguments that were not recorded",
            why="they held secrets, or bytes that are no text, and were taken out",
            next=f"fill them in and run: {shell_line(record.argv, env)}",
        )
    if nproc is None and record.launcher is None and "TORCHELASTIC_RUN_ID" in record.topology:
        raise ResumeRefusedError(
            f"{run_dir} was started by a launcher that was not recognised",
            why=f"it ran {record.topology.get('WORLD_SIZE', 'several')} ranks; one process would not be the same job",
            next=f"start it as before, with {shell_line([], env)} in its environment; each rank ran:"
            f" {shell_line(record.argv)}; --nproc N starts N processes of this machine instead",
        )


def _refuse_several_machines(record: StartRecord, env: Mapping[str, str]) -> None:
    reason = why_not_on_this_machine(record.launcher or ())
    if reason is not None:
        raise ResumeRefusedError(
            f"{env[RUN_DIR_VARIABLE]} was started on several machines, and --nproc is about this one",
            why=reason,
            next=f"start it on each machine as before: {shell_line(record.argv, env)}",
        )


def _launcher(
    record: StartRecord, nproc: int | None, *, may_restart: bool, allow_command: bool
) -> tuple[tuple[str, ...], list[str]]:
    if nproc == 1 or (nproc is None and record.launcher is None):
        return (), []
    if nproc is not None:
        words, left_out = torchrun_words(nproc, record.launcher or (), may_restart=may_restart)
        return words, [f"left out torchrun's options: {shell_line(left_out)}"] if left_out else []
    recorded = record.launcher or ()
    unsafe = None if allow_command else why_not_repeated(recorded)
    if unsafe is not None:
        raise _NotAllowed(f"torchrun's option {_quote(unsafe)} is not one that is repeated without being asked")
    return ("-m", "torch.distributed.run", *recorded), []


def _working_directory(record: StartRecord, root: Path, *, allow_command: bool) -> tuple[Path, list[str]]:
    candidates = [Path(record.cwd)]
    if record.cwd_in_project is not None and not Path(record.cwd_in_project).is_absolute():
        candidates.insert(0, root / record.cwd_in_project)
    for folder in candidates:
        try:
            if folder.is_absolute() and folder.is_dir() and (allow_command or why_not_own_code(folder, root) is None):
                return folder.resolve(), []
        except (OSError, ValueError):
            continue
    return root, [f"the recorded working directory {_quote(record.cwd)} is not in this project; running in {root}"]


def _program(record: StartRecord, root: Path, workdir: Path, *, allow_command: bool) -> tuple[str, ...]:
    target = record.target or ""
    if record.kind == "module":
        _check_module(target, root, [str(workdir), *sys.path], allow_command=allow_command)
    elif record.kind == "entry-point":
        target = _console_script(target, root, allow_command=allow_command)
    else:
        target = _script(record, root, workdir, allow_command=allow_command)
    return (target, *record.args)


def _script(record: StartRecord, root: Path, workdir: Path, *, allow_command: bool) -> str:
    candidates = [Path(path) for path in (record.script, record.target) if path and Path(path).is_absolute()]
    if record.script_in_project is not None and not Path(record.script_in_project).is_absolute():
        candidates.insert(0, root / record.script_in_project)
    reasons = []
    for script in candidates:
        try:
            reason = None if allow_command and script.exists() else why_not_own_code(script, root)
            if reason is None and not allow_command and script.is_dir():
                reason = why_not_own_code(script / "__main__.py", root)
        except (OSError, ValueError) as error:
            reason = f"{_quote(str(script))}: {error}"
        if reason is None:
            # As it was typed, absolute or not: programs print sys.argv[0], and some act on it.
            is_absolute = Path(record.target or "").is_absolute()
            return str(script) if is_absolute else os.path.relpath(script.resolve(), workdir)
        reasons.append(reason)
    raise _NotAllowed("; ".join(dict.fromkeys(reasons)) or "the record does not say where its script lies")


def _check_module(
    name: str, root: Path, search: Sequence[str], *, allow_command: bool, is_program: bool = True
) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise _NotAllowed(f"{_quote(name)} is no name of a module")
    if allow_command:
        return
    for spec in _specs(name, search, is_program=is_program):
        if spec.origin is not None and spec.has_location:
            reason = why_not_own_code(Path(spec.origin), root)
            if reason is not None:
                raise _NotAllowed(f"module {name}: {reason}")
        elif spec.submodule_search_locations is None:
            raise _NotAllowed(f"module {name} belongs to Python itself")


def _specs(name: str, search: Sequence[str], *, is_program: bool) -> list[ModuleSpec]:
    # Every package on the way is executed too, so each is looked at. Nothing is imported to find them.
    top, *inner = name.split(".")
    spec = PathFinder.find_spec(top, list(search))
    if spec is None:
        # Editable installs bring finders of their own. Finding a top-level module imports nothing.
        spec = find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    specs = [spec]
    found = top
    while spec is not None and (inner or (is_program and spec.submodule_search_locations is not None)):
        part = inner.pop(0) if inner else "__main__"
        found = f"{found}.{part}"
        spec = PathFinder.find_spec(found, list(spec.submodule_search_locations or ()))
        specs.append(spec)
    present = [spec for spec in specs if spec is not None]
    if len(present) < len(specs):
        raise _NotAllowed(f"module {found} is not found")
    return present


def _console_script(name: str, root: Path, *, allow_command: bool) -> str:
    found = [point for point in entry_points(group="console_scripts") if point.name == name]
    script = Path(sysconfig.get_path("scripts")) / name
    if not found or not script.is_file():
        raise _NotAllowed(f"the command {_quote(name)} is not installed in this environment")
    _check_module(found[0].module, root, sys.path, allow_command=allow_command, is_program=False)
    return str(script)


def _interpreter_flags(
    record: StartRecord, *, has_launcher: bool, allow_command: bool
) -> tuple[tuple[str, ...], list[str]]:
    if record.launcher is not None:
        return (), []  # They belonged to the workers, and torchrun had set them.
    safe = tuple(flag for flag in record.interpreter_flags if allow_command or _SAFE_FLAG.fullmatch(flag))
    # torchrun starts the workers, and gives them none but its own, -u.
    kept = () if has_launcher else safe
    dropped = [flag for flag in record.interpreter_flags if flag not in kept and not (has_launcher and flag == "-u")]
    return kept, [f"left out interpreter options: {shell_line(dropped)}"] if dropped else []


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    spelled = "".join(f"\\{char}" if char in "\\'" else char if char.isprintable() else _escape(char) for char in word)
    return f"$'{spelled}'"


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x80 else f"\\U{ord(char):08x}"


def _run_child(relaunch: Relaunch, environ: Mapping[str, str]) -> int:
    process = subprocess.Popen(relaunch.argv, cwd=relaunch.cwd, env=dict(environ))
    # Ctrl-C reaches the whole console group; the child decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = process.wait()
    return 128 - status if status < 0 else status
