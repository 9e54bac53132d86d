"""Whether arguments fit what is called: found out before anything is called, and said by name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection
from inspect import Parameter
from typing import Any

from ckptmgr.errors import ConfigError
from ckptmgr.instantiate.targets import Target, spoken

__all__ = ["check_arguments", "suggest_for", "what_it_takes"]

_SHOWN = 12
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def parameters_of(function: Callable[..., Any]) -> list[Parameter] | None:
    """Return the parameters of a call; None for what does not tell, as some classes written in C."""
    try:
        found = list(inspect.signature(function).parameters.values())
        initializer = getattr(function, "__init__", None) if isinstance(function, type) else None
        if initializer not in (None, object.__init__) and _takes_anything(found):
            # A __new__ that hands everything on hides what __init__ takes.
            found = list(inspect.signature(initializer).parameters.values())[1:]
    except (ValueError, TypeError):
        return None
    return found


def _takes_anything(parameters: list[Parameter]) -> bool:
    return bool(parameters) and all(p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in parameters)


def what_it_takes(function: Callable[..., Any]) -> str:
    """Return the arguments of a call in one line."""
    parameters = parameters_of(function)
    if parameters is None:
        return "what it takes is not told"
    if not parameters:
        return "it takes no arguments"
    texts = [_text(parameter) for parameter in parameters]
    return f"it takes {', '.join(texts[:_SHOWN])}{', …' if len(texts) > _SHOWN else ''}"


def suggest_for(error: BaseException, function: Callable[..., Any]) -> str | None:
    """Return what was probably meant, where a call that takes any keyword has refused one after all."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    names = [parameter.name for parameter in parameters_of(function) or [] if parameter.kind in _NAMED]
    near = difflib.get_close_matches(found[1], names, n=1) if found else []
    return f"did you mean {found[1]} -> {near[0]}?" if found and near else None


def _text(parameter: Parameter) -> str:
    stars = "*" * (parameter.kind is Parameter.VAR_POSITIONAL) + "**" * (parameter.kind is Parameter.VAR_KEYWORD)
    if parameter.default is Parameter.empty:
        return f"{stars}{parameter.name}"
    simple = parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
    return f"{parameter.name}={parameter.default!r:.40}" if simple else f"{parameter.name}=…"


def check_arguments(
    function: Callable[..., Any],
    target: Target,
    *,
    n_given: int,
    n_args: int,
    named: Collection[str],
    extra: Collection[str],
    is_partial: bool,
) -> None:
    """Refuse arguments that the call would not take.

    Args:
        function: What is going to be called.
        target: Its place in the configuration.
        n_given: How many arguments come first that the caller gives.
        n_args: How many ``_args_`` follow.
        named: Keys of the configuration.
        extra: Names of arguments that the caller gives.
        is_partial: Whether the rest may come later.

    Raises:
        ConfigError: Names the key, what is unknown, missing or given twice, and what is taken.
    """
    parameters = parameters_of(function)
    if parameters is None:
        return
    check = _Check(function, target, parameters)
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    if n_given + n_args > len(positional) and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        check.refuse_count(len(positional) - n_given, n_args)
    filled = [parameter.name for parameter in positional[: n_given + n_args]]
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters if parameter.kind in _NAMED}
    check.refuse_unknown([name for name in (*named, *extra) if name not in names and not takes_any], named)
    positional_only = {p.name for p in parameters if p.kind is Parameter.POSITIONAL_ONLY} - names
    check.refuse_twice([name for name in named if name in filled[:n_given] and name in names], "is given by ckptmgr")
    check.refuse_twice([name for name in (*named, *extra) if name in filled and name in names], "is in _args_ too")
    if is_partial:
        return
    given = {*filled, *named, *extra} - positional_only | set(filled)
    required = [p for p in parameters if p.default is Parameter.empty and p.kind in (*_POSITIONAL, *_NAMED)]
    check.refuse_missing([parameter.name for parameter in required if parameter.name not in given])


class _Check:
    def __init__(self, function: Callable[..., Any], target: Target, parameters: list[Parameter]) -> None:
        self.target, self.parameters = target, parameters
        self.takes = what_it_takes(function)

    def key_of(self, name: str) -> str:
        return f"{self.target.key}.{name}" if self.target.key else name

    def refuse_unknown(self, names: list[str], named: Collection[str]) -> None:
        if not names:
            return
        first = names[0]
        listed = " and ".join(repr(name) for name in names)
        if first not in named:
            raise ConfigError(
                f"{spoken(self.target.key)}: {self.target.name} does not take {listed}, which ckptmgr gives it",
                why=self.takes,
                next=f"let it take {first!r}",
            )
        if any(p.name == first and p.kind is Parameter.POSITIONAL_ONLY for p in self.parameters):
            raise ConfigError(
                f"{self.key_of(first)}: {self.target.name} takes {first!r} by its position only",
                why=self.takes,
                next=f"write it into the list {self.key_of('_args_')}",
            )
        known = [p.name for p in self.parameters if p.kind in _NAMED and p.name not in named]
        near = {name: difflib.get_close_matches(name, known, n=1) for name in names}
        meant = ", ".join(f"{name} -> {found[0]}" for name, found in near.items() if found)
        removal = " ".join(f"~{self.key_of(name)}" for name in names)
        raise ConfigError(
            f"{self.key_of(first)}: {self.target.name} takes no argument {listed}",
            why=self.takes,
            next=f"did you mean {meant}? Otherwise leave it out: {removal}" if meant else f"leave it out: {removal}",
        )

    def refuse_twice(self, names: list[str], how: str) -> None:
        if names:
            raise ConfigError(
                f"{self.key_of(names[0])}: {self.target.name} would get {names[0]!r} twice",
                why=f"it {how}",
                next=f"leave it out: ~{self.key_of(names[0])}",
            )

    def refuse_count(self, room: int, given: int) -> None:
        raise ConfigError(
            f"{self.key_of('_args_')}: {self.target.name} has room for {max(room, 0)} there, and gets {given}",
            why=self.takes,
            next="leave out what is too much, or give it by name",
        )

    def refuse_missing(self, names: list[str]) -> None:
        if names:
            given = " ".join(f"+{self.key_of(name)}=…" for name in names)
            # An optimizer within a model's arguments, as Hydra's users write it.
            later = f", or let the model call it: +{self.key_of('_partial_')}=true" if names == ["params"] else ""
            raise ConfigError(
                f"{spoken(self.target.key)}: {self.target.name} needs {' and '.join(repr(name) for name in names)}",
                why=self.takes,
                next=f"give it: {given}{later}",
            )
