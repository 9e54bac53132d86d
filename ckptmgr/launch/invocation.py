"""How this process was started: which script, module or entry point, with which arguments, under which launcher."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

__all__ = ["Invocation", "Kind", "current_invocation", "parse_command_line", "torchrun_options"]

Kind: TypeAlias = Literal["script", "module", "entry-point", "command", "stdin", "interactive", "notebook"]

_WITH_VALUE = "WX"
_TORCHRUN_MODULES = ("torch.distributed.run", "torch.distributed.launch", "torch.distributed.elastic.run")


@dataclass(frozen=True, slots=True)
class Invocation:
    """One command line, taken apart.

    Attributes:
        kind: ``script`` (``python train.py``), ``module`` (``python -m``), ``entry-point`` (an installed console
            script), ``command`` (``python -c``), ``stdin``, ``interactive`` or ``notebook``.
        target: The script as typed, the module's or the console script's name; None for the other kinds.
        args: What follows the target.
        flags: The interpreter's own options, one each: ``-u``, ``-Xdev``, ``-Wignore``.
    """

    kind: Kind
    target: str | None = None
    args: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def parse_command_line(argv: Sequence[str]) -> Invocation:
    """Take a Python command line apart as the interpreter does.

    Args:
        argv: Beginning with the interpreter, as in ``sys.orig_argv``.

    Example:
        >>> parse_command_line(["python", "-uW", "error", "-m", "pkg.train", "--lr", "0.1"])
        Invocation(kind='module', target='pkg.train', args=('--lr', '0.1'), flags=('-u', '-Werror'))
    """
    flags: list[str] = []
    rest = list(argv[1:])
    while rest:
        word = rest.pop(0)
        if word == "-":
            return Invocation("stdin", None, tuple(rest), tuple(flags))
        if word == "--" and rest:
            word = rest.pop(0)
        elif word.startswith("--"):
            flags.append(word)
            if word == "--check-hash-based-pycs" and rest:
                flags.append(rest.pop(0))
            continue
        elif word.startswith("-"):
            for position, letter in enumerate(word[1:], start=2):
                if letter not in _WITH_VALUE and letter not in "cm":
                    flags.append(f"-{letter}")
                    continue
                value = word[position:] or (rest.pop(0) if rest else "")
                if letter == "c":
                    return Invocation("command", None, tuple(rest), tuple(flags))
                if letter == "m":
                    return Invocation("module", value, tuple(rest), tuple(flags))
                flags.append(f"-{letter}{value}")
                break
            continue
        return Invocation("script", word, tuple(rest), tuple(flags))
    return Invocation("stdin", None, (), tuple(flags))


def current_invocation() -> Invocation:
    """Describe the start of this process, from the original command line: programs change ``sys.argv``."""
    parsed = parse_command_line(sys.orig_argv)
    if shell := _ipython_shell():
        return Invocation("notebook" if "ZMQ" in shell else "interactive", flags=parsed.flags)
    if parsed.kind == "command" and multiprocessing.parent_process() is not None:
        return _of_spawned_child(parsed.flags)
    if parsed.kind == "stdin" and (hasattr(sys, "ps1") or (sys.stdin is not None and sys.stdin.isatty())):
        return replace(parsed, kind="interactive")
    if parsed.kind == "script" and parsed.target is not None:
        name = _console_script(Path(parsed.target))
        if name is not None:
            return replace(parsed, kind="entry-point", target=name)
    return parsed


def torchrun_options(parent: Sequence[str], worker: Invocation) -> tuple[str, ...] | None:
    """Return the options that torchrun was given; None if the parent process is no torchrun that started this worker.

    Args:
        parent: The parent's command line.
        worker: The start of this process.
    """
    launcher = parse_command_line(parent)
    is_torchrun = (launcher.kind == "module" and launcher.target in _TORCHRUN_MODULES) or (
        launcher.kind == "script" and launcher.target is not None and Path(launcher.target).stem == "torchrun"
    )
    if not is_torchrun or worker.target is None:
        return None
    tail = (worker.target, *worker.args)
    options = list(launcher.args[: -len(tail)])
    if launcher.args[-len(tail) :] != tail:
        return None
    if options[-1:] == ["--"]:
        # It ends the options, and is none.
        options.pop()
    if worker.kind == "module" and (not options or options.pop() not in ("-m", "--module")):
        return None
    return tuple(options)


def _ipython_shell() -> str | None:
    # Scripts may import IPython for its display functions; only a running shell means that there is no script.
    ipython = sys.modules.get("IPython")
    get_ipython = getattr(ipython, "get_ipython", None)
    shell = get_ipython() if callable(get_ipython) else None
    return None if shell is None else type(shell).__name__


def _of_spawned_child(flags: tuple[str, ...]) -> Invocation:
    # multiprocessing runs `python -c "from multiprocessing…"`, imports the parent's main module under another name, and
    # hands over the parent's sys.argv: what to start again is the parent.
    main = sys.modules.get("__mp_main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return Invocation("module", spec.name.removesuffix(".__main__"), tuple(sys.argv[1:]), flags)
    if getattr(main, "__file__", None) and sys.argv:
        return Invocation("script", sys.argv[0], tuple(sys.argv[1:]), flags)
    return Invocation("command", flags=flags)


def _console_script(script: Path) -> str | None:
    # The folder alone is made absolute: the script may be a link into another environment.
    folders = {Path(sysconfig.get_path("scripts")).resolve(), Path(sys.executable).parent.resolve()}
    if script.parent.resolve() not in folders:
        return None
    found = importlib.metadata.entry_points(group="console_scripts", name=script.stem)
    return script.stem if found else None
