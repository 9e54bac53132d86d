"""From an allowed name to what it stands for: imports the name's own modules, and nothing that they happen to hold."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from ckptmgr.errors import CkptmgrError, ConfigError, NotAllowedError
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.project_file import run_directory_around
from ckptmgr.instantiate.targets import Target, spoken

__all__ = ["one_line", "resolve", "where_raised"]

_NEAR = 3
_MAX_MESSAGE = 600


def resolve(target: Target, allow: AllowList) -> Any:
    """Return what an allowed name stands for.

    Raises:
        ConfigError: There is no such thing, or importing it failed.
        NotAllowedError: The name leads through a module into another package, or into a run directory.
    """
    first, *rest = target.name.split(".")
    found: Any = _import(first, target)
    for place, part in enumerate(rest):
        parent = ".".join([first, *rest[:place]])
        is_last = place == len(rest) - 1
        if isinstance(found, ModuleType):
            found = _from_module(found, parent, part, is_last, target)
        elif isinstance(found, type):
            found = _attribute(found, parent, part, target)
        else:
            raise ConfigError(
                f"{spoken(target.key)}: {target.name!r} does not name a class",
                why=f"{parent} is of type {type(found).__name__}, and a name leads through modules and classes",
                next="name the class itself",
            )
        if isinstance(found, ModuleType) and not is_last:
            _check_crossing(found, f"{parent}.{part}", rest[place + 1 :], target, allow)
    return found


def _from_module(module: ModuleType, parent: str, part: str, is_last: bool, target: Target) -> Any:
    full = f"{parent}.{part}"
    # A package often offers a class under the name of its module: at the end of a name the class is meant.
    if is_last and isinstance(_peek(module, part, target), type):
        return _peek(module, part, target)
    if hasattr(module, "__path__") and _spec_exists(full, target):
        return _import(full, target)
    return _attribute(module, parent, part, target)


def _peek(module: ModuleType, part: str, target: Target) -> Any:
    try:
        return getattr(module, part, None)
    except Exception as error:
        raise _import_failed(f"{module.__name__}.{part}", target, error) from error


def _attribute(owner: Any, parent: str, part: str, target: Target) -> Any:
    try:
        return getattr(owner, part)
    except AttributeError as error:
        kind = "module" if isinstance(owner, ModuleType) else "class"
        near = difflib.get_close_matches(part, _names_in(owner), n=_NEAR)
        raise ConfigError(
            f"{spoken(target.key)}: there is no {part!r} in the {kind} {parent}",
            why=_what_is_in(owner),
            next=f"did you mean {' or '.join(f'{parent}.{name}' for name in near)}?"
            if near
            else "name a class that is there",
        ) from error
    except Exception as error:
        raise _import_failed(f"{parent}.{part}", target, error) from error


def _names_in(owner: Any) -> list[str]:
    names = set(vars(owner)) | set(getattr(owner, "__all__", ()))
    return sorted(name for name in names if isinstance(name, str) and not name.startswith("_"))


def _what_is_in(owner: Any) -> str | None:
    root = (getattr(owner, "__name__", "") if isinstance(owner, ModuleType) else owner.__module__).partition(".")[0]
    held = {name: vars(owner).get(name) for name in _names_in(owner)}
    classes = [n for n, cls in held.items() if isinstance(cls, type) and cls.__module__.partition(".")[0] == root]
    if not classes:
        return "it holds no classes of its own"
    return f"its classes are {', '.join(classes[:12])}{', …' if len(classes) > 12 else ''}"


def _check_crossing(module: ModuleType, reached: str, rest: list[str], target: Target, allow: AllowList) -> None:
    """Refuse to go on in a module that an allowed one only holds: ``my_pkg.os.system`` is ``os.system``."""
    real = getattr(module, "__name__", reached)
    if real == reached or allow.names_exactly(target.name):
        return
    name = ".".join([real, *rest])
    if allow.source_of(name) is None:
        raise NotAllowedError(
            f"{spoken(target.key)}: {target.name!r} is not allowed",
            why=f"{reached} is the module {real}, so the name means {name}, which nobody has allowed",
            next="name a class that is defined in what you allow",
        )


def _spec_exists(name: str, target: Target) -> bool:
    """Return whether there is such a module. Its parent is imported already, so this executes nothing."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return False
    if spec is None:
        return False
    for place in (spec.origin, *(spec.submodule_search_locations or ())):
        run = run_directory_around(Path(place)) if place and Path(place).is_absolute() else None
        if run is not None:
            raise NotAllowedError(
                f"{spoken(target.key)}: {target.name!r} is not imported",
                why=f"{name} lies in the run directory {run}, and what came with a run is never executed",
                next="change to the project that holds your own code, and start from there",
            )
    return True


def _import(name: str, target: Target) -> ModuleType:
    if not _spec_exists(name, target):
        parent, _, last = name.rpartition(".")
        start = sys.path[0] if sys.path and sys.path[0] else "."
        place = f"the package {parent}" if parent else f"Python's search path, which begins with {start}"
        near = difflib.get_close_matches(last, _top_level_names(), n=_NEAR, cutoff=0.75) if not parent else []
        hint = f"did you mean {' or '.join(near)}? Otherwise " if near else ""
        raise ConfigError(
            f"{spoken(target.key)}: {target.name!r} is not importable",
            why=f"there is no module {last!r} in {place}",
            next=f"{hint}start from the directory that holds it, or install it (pip install -e .)",
        )
    try:
        return importlib.import_module(name)
    except CkptmgrError:
        raise
    except (Exception, SystemExit) as error:
        raise _import_failed(name, target, error) from error


def _top_level_names() -> list[str]:
    names = {name for name in sys.modules if "." not in name}
    for entry in sys.path[:2]:
        try:
            names.update(path.stem for path in Path(entry or ".").iterdir() if path.suffix in ("", ".py"))
        except OSError:
            continue
    return sorted(name for name in names if name.isidentifier() and not name.startswith("_"))


def _import_failed(name: str, target: Target, error: BaseException) -> ConfigError:
    if isinstance(error, SystemExit):
        why = f"it ends the process when it is imported (exit code {error.code})"
        advice = 'put what a script does below `if __name__ == "__main__":`'
    elif isinstance(error, SyntaxError):
        why = f"{type(error).__name__}: {error.msg} ({_place(error.filename, error.lineno)})"
        advice = "correct the file"
    else:
        why = f"{one_line(error)}{where_raised(error)}"
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        advice = f"install {missing!r}, or correct the import" if missing else "correct it"
    return ConfigError(
        f"{spoken(target.key)}: importing {name} failed",
        why=why,
        next=f"{advice}; `python -c 'import {name}'` shows it",
    )


def one_line(error: BaseException) -> str:
    """Return an exception's type and message, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MAX_MESSAGE]}" if text else type(error).__name__


def where_raised(error: BaseException) -> str:
    """Return the line of the deepest frame outside of Python's own machinery, in brackets; empty if there is none."""
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<frozen", own)) and Path(frame.filename).parent.name != "importlib":
            return f" ({_place(frame.filename, frame.lineno)})"
    return ""


def _place(filename: str | None, line: int | None) -> str:
    if filename is None:
        return "unknown place"
    try:
        shown = Path(filename).relative_to(Path.cwd())
    except (ValueError, OSError):
        shown = Path(filename)
    return f"{shown}, line {line}"
