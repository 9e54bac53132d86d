"""What an allowed name stands for, and whether it is what may be built there."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ckptmgr.errors import ConfigError, NotAllowedError
from ckptmgr.instantiate.allow_list import AllowList, is_factory
from ckptmgr.instantiate.resolve import resolve
from ckptmgr.instantiate.targets import Target, advice_for, check_targets, how_to_allow, spoken

__all__ = ["check_result", "load_target", "spoken_base"]

Base = type | tuple[type, ...] | None


def load_target(target: Target, allow: AllowList, *, base: Base = None, base_name: str = "") -> Callable[..., Any]:
    """Import what a configuration names, and check that it may be called there.

    Args:
        target: The name, and its place.
        allow: Checked before the import, by the name; and after it, by where the thing is defined.
        base: What a class must be, or derive from. What a function makes is checked when it has made it.
        base_name: How messages call `base`; by default its own name.

    Returns:
        A class, or a function that is declared with `factory` or allowed by its exact name.

    Raises:
        NotAllowedError: The name is not allowed, or means something that is not.
        ConfigError: It cannot be imported, is nothing to build with, or is of the wrong kind.
    """
    check_targets([target], allow)
    found = resolve(target, allow)
    _check_kind(found, target)
    if not allow.names_exactly(target.name):
        _check_home(found, target, allow)
        if not isinstance(found, type) and not is_factory(found):
            raise NotAllowedError(
                f"{spoken(target.key)}: {target.name!r} is a function that is not declared",
                why="a pattern allows classes, and functions that say that configurations may call them",
                next=f"decorate it with @ckptmgr.factory; or name it exactly, {how_to_allow(target.name, allow)}",
            )
    if isinstance(found, type):
        _check_class(found, target, base, base_name)
    return found  # type: ignore[no-any-return]


def _check_kind(found: object, target: Target) -> None:
    kind = None
    advice = "name a class, or a function that is declared with @ckptmgr.factory"
    if isinstance(found, ModuleType):
        kind, advice = "a module", f"name a class in it: {target.name}.…"
    elif isinstance(found, functools.partial):
        kind = "a functools.partial"
        advice = "write a function around it, decorate that with @ckptmgr.factory, and name it"
    elif not isinstance(found, type) and not inspect.isroutine(found):
        kind = f"an object of type {type(found).__name__}"
    if kind is not None:
        raise ConfigError(
            f"{spoken(target.key)}: {target.name!r} is {kind}, and nothing can be built with it", next=advice
        )


def _check_home(found: Any, target: Target, allow: AllowList) -> None:
    home = _home_of(found)
    owner = getattr(found, "__self__", None)
    if allow.covers(found, home) and (not isinstance(owner, type) or allow.covers(owner, _home_of(owner))):
        return
    if home == target.name or allow.source_of(home) is not None:
        raise NotAllowedError(
            f"{spoken(target.key)}: {target.name!r} is not allowed",
            why="of its package only those classes are built in that were reviewed: it is none of them",
            next=how_to_allow(target.name, allow),
        )
    raise NotAllowedError(
        f"{spoken(target.key)}: {target.name!r} is not allowed",
        why=f"it is {home.removeprefix('None.')}, defined elsewhere, and nobody has allowed that; it was not called",
        next=advice_for(home if home.partition(".")[0] in sys.stdlib_module_names else target.name, allow),
    )


def _home_of(found: object) -> str:
    name = getattr(found, "__qualname__", None) or getattr(found, "__name__", "?")
    return f"{getattr(found, '__module__', None)}.{name}"


def _check_class(found: type, target: Target, base: Base, base_name: str) -> None:
    if base is not None and not _is_subclass(found, base):
        _refuse(target, base, base_name, f"{target.name} is not")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(
            f"{spoken(target.key)}: {target.name} is abstract",
            why=f"it leaves open: {missing}",
            next="name a class that derives from it",
        )


def _is_subclass(found: type, base: type | tuple[type, ...]) -> bool:
    # Such a class chooses the class of its instances: the manager becomes a callback of the Lightning in use.
    chooses = any("__new__" in vars(cls) for cls in found.__mro__ if cls.__module__.startswith("ckptmgr."))
    return issubclass(found, base) or chooses


def check_result(made: object, target: Target, base: Base, base_name: str) -> None:
    """Refuse what a function or class has made, where it is of the wrong kind."""
    if base is not None and not isinstance(made, base):
        _refuse(target, base, base_name, f"{target.name} has made an object of type {type(made).__name__}")


def spoken_base(base: type | tuple[type, ...], base_name: str) -> str:
    """Return what messages call a base class."""
    bases = base if isinstance(base, tuple) else (base,)
    return base_name or " or ".join(f"{cls.__name__} of {cls.__module__.partition('.')[0]}" for cls in bases)


def _refuse(target: Target, base: type | tuple[type, ...], base_name: str, but: str) -> None:
    wanted = spoken_base(base, base_name)
    article = "" if wanted.startswith(("a ", "an ", "the ")) else "an " if wanted[:1].lower() in "aeiou" else "a "
    raise ConfigError(
        f"{spoken(target.key)} must be {article}{wanted}; {but}", next=f"name {article}{wanted} in _target_"
    )
