"""The tensors of the user's own model, built from what he names on the command line.

Naming code there is permission enough to run it, as with ``python -m``: the current directory can be imported from.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.errors import CkptmgrError, UsageError

__all__ = [
    "build_model",
    "building_lines",
    "call_named",
    "facts_of_module",
    "model_arguments",
    "model_facts",
    "named_object",
]

_EXAMPLE = "--model my_pkg.models:Net, or --model my_pkg.models:build with --model-arg width=8"
_ONLY_BUILD = "name what builds the model, and nothing else"
_MAX_MESSAGE = 600


def model_facts(factory: Any, arguments: Mapping[str, Any] | None = None) -> tuple[TensorFacts, ...]:
    """Return the tensors that a model's state dict has.

    Args:
        factory: ``pkg.module:name`` of a class or function that returns a module, or of a module; or a module itself.
        arguments: Keyword arguments for it.

    Raises:
        UsageError: There is no such thing, it fails, or what it returns is no module.
    """
    return facts_of_module(build_model(factory, arguments) if isinstance(factory, str) else factory)


def build_model(factory: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Build a module, on the meta device where that works: without memory, however large it is.

    Raises:
        UsageError: As `model_facts`.
    """
    import torch
    from torch import nn

    target = named_object(factory)
    if isinstance(target, nn.Module):
        _refuse_arguments(factory, arguments)
        return target
    if not callable(target):
        raise UsageError(
            f"{factory!r} is no model", why=f"it is of type {type(target).__name__}, and not callable", next=_EXAMPLE
        )
    rng = torch.get_rng_state()
    try:
        with torch.device("meta"):
            built = target(**dict(arguments or {}))
    except Exception:
        # It may compute with its weights, or load some: then it needs real ones.
        torch.set_rng_state(rng)
        built = _called(target, factory, arguments)
    except SystemExit as error:
        raise _failed(f"{factory!r} ended the process", error, _ONLY_BUILD) from error
    if not isinstance(built, nn.Module):
        raise UsageError(
            f"{factory!r} returned no module",
            why=f"it returned {type(built).__module__}.{type(built).__qualname__}",
            next="name a class of torch.nn.Module, or a function that returns an instance of one",
        )
    return built


def call_named(factory: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Import what ``pkg.module:name`` names and call it; a module, and what cannot be called, is returned as it is.

    Raises:
        UsageError: There is no such thing, it fails, or arguments are given to what is not called.
    """
    from torch import nn

    target = named_object(factory)
    if callable(target) and not isinstance(target, nn.Module):
        return _called(target, factory, arguments)
    _refuse_arguments(factory, arguments)
    return target


def _refuse_arguments(factory: str, arguments: Mapping[str, Any] | None) -> None:
    if arguments:
        raise UsageError(f"{factory!r} is an object already", why="arguments are for a class or a function")


def _called(target: Any, factory: str, arguments: Mapping[str, Any] | None) -> Any:
    try:
        return target(**dict(arguments or {}))
    except Exception as error:
        raise _failed(
            f"{factory!r} failed", error, "correct it, or give it arguments: --model-arg NAME=VALUE"
        ) from error
    except SystemExit as error:
        raise _failed(f"{factory!r} ended the process", error, _ONLY_BUILD) from error


def facts_of_module(module: Any) -> tuple[TensorFacts, ...]:
    """Return the tensors of a module's state dict, by its own names, with their ties.

    Raises:
        UsageError: Its state dict cannot be taken.
    """
    import torch

    from ckptmgr.state.names import WrapperPrefixes

    prefixes = WrapperPrefixes(module)
    first: dict[int, str] = {}
    facts = []
    try:
        state = module.state_dict(keep_vars=True)
    except Exception as error:
        raise _failed("the model gives no state dict", error, "correct its state_dict") from error
    for key, item in state.items():
        if not isinstance(item, torch.Tensor):
            continue
        name = prefixes.own_name(key)
        if torch.nn.parameter.is_lazy(item):
            raise UsageError(
                f"the model's {name!r} is not initialised",
                why="it is lazy: its shape is known only after the first batch",
                next="name a function that builds the model, runs one batch through it, and returns it",
            )
        # Tensors on the meta device have no memory to compare: one tensor is one object.
        tied_to = first.setdefault(id(item), name)
        dtype = str(item.dtype).removeprefix("torch.")
        facts.append(TensorFacts(name, dtype, tuple(item.shape), tied_to if tied_to != name else None))
    return tuple(facts)


def building_lines(factory: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lines of Python that build a model as `model_facts` does.

    Example:
        >>> building_lines("torch.nn:Linear", {"in_features": 2, "out_features": 3})
        ('import torch.nn', 'model = torch.nn.Linear(in_features=2, out_features=3)')
    """
    from torch import nn

    place, _, name = factory.partition(":")
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    call = "" if isinstance(named_object(factory), nn.Module) else f"({given})"
    return (f"import {place}", f"model = {place}.{name}{call}")


def model_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Return keyword arguments from ``name=value`` or from whole JSON objects; a value that is JSON is read as such.

    Raises:
        UsageError: One is neither, or a name is given twice.

    Example:
        >>> model_arguments(["width=8", "act=relu", '{"depth": 2}'])
        {'width': 8, 'act': 'relu', 'depth': 2}
    """
    arguments: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if text.lstrip().startswith("{"):
            more = _json(text)
            if not isinstance(more, dict):
                raise UsageError(f"--model-arg {text!r} is no JSON object", next="--model-arg '{\"width\": 8}'")
        elif sign and name.isidentifier():
            more = {name: _json(value)}
        else:
            raise UsageError(f"--model-arg {text!r}", why="it is NAME=VALUE, or a JSON object", next=_EXAMPLE)
        for key in more:
            if key in arguments:
                raise UsageError(f"--model-arg gives {key!r} twice", why="one of the values would be lost")
        arguments.update(more)
    return arguments


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def named_object(factory: str) -> Any:
    """Import what ``pkg.module:name`` names.

    Raises:
        UsageError: There is no such thing, or importing it fails.
    """
    place, colon, name = factory.partition(":")
    if not colon or not all(part.isidentifier() for part in (*place.split("."), *name.split("."))):
        raise UsageError(f"--model {factory!r}", why="it is MODULE:NAME, as Python writes them", next=_EXAMPLE)
    found: Any = _imported(place)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            near = get_close_matches(part, [it for it in dir(found) if not it.startswith("_")], n=3)
            raise UsageError(
                f"there is no {part!r} in {place if isinstance(found, ModuleType) else name}",
                why=f"it has {', '.join(near)}" if near else None,
                next=f"--model {place}:{near[0]}" if near else _EXAMPLE,
            ) from error
    return found


def _imported(place: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        # Of the program `ckptmgr` the first entry is the directory of the script; as with `python -m`, it is this one.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except CkptmgrError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {error.name!r}",
                why=f"it was looked for in {here}, and where Python looks for packages",
                next="change to the directory that holds it, or install it (pip install -e .)",
            ) from error
        missing = (error.name or "").partition(".")[0]
        raise _failed(f"importing {place} failed", error, f"install {missing!r}") from error
    except (Exception, SystemExit) as error:
        raise _failed(f"importing {place} failed", error, f"`python -c 'import {place}'` shows it") from error


def _failed(what: str, error: BaseException, advice: str) -> UsageError:
    text = " ".join(str(error).split())[:_MAX_MESSAGE]
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return UsageError(what, why=f"{told}{_where(error)}", next=advice)


def _where(error: BaseException) -> str:
    """Return the last line of the user's own code that an error came through, in brackets."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({_short(error.filename)}:{error.lineno})"
    own = str(Path(__file__))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_library = "site-packages" in frame.filename or Path(frame.filename).parent.name == "importlib"
        if not is_library and not frame.filename.startswith("<") and frame.filename != own:
            return f" ({_short(frame.filename)}:{frame.lineno})"
    return ""


def _short(filename: str) -> str:
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return filename
