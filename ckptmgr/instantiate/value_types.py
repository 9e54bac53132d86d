"""Whether a plain value fits the annotation of the argument that it is for, where that says something definite.

Most classes do not check what they are given, and fail hours later or not at all. Only annotations made of plain types
are looked at: a wrong guess about anything richer would refuse what is right.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ckptmgr.errors import ConfigError
from ckptmgr.instantiate.targets import Target

__all__ = ["check_types"]

_PLAIN: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    # A whole number is a float to everybody but the type system.
    float: (float, int),
    str: (str,),
    type(None): (type(None),),
}


def check_types(function: Callable[..., Any], target: Target, named: Mapping[str, object]) -> None:
    """Refuse a plain value where the annotation admits only plain values of other types.

    Args:
        function: What is going to be called.
        target: Its place in the configuration.
        named: The configuration's arguments, before what is in them is built.

    Raises:
        ConfigError: Names the key, what was given and what is wanted.
    """
    hints = _hints(function)
    for name, value in named.items():
        wanted = hints.get(name)
        if not isinstance(value, (bool, int, float, str)) or wanted is None or _admits(wanted, value):
            continue
        key = f"{target.key}.{name}" if target.key else name
        raise ConfigError(
            f"{key}: {target.name} was given {value!r}, of type {type(value).__name__}",
            why=f"it takes {_spoken(wanted)}",
            next=f"for example {key}={_example(wanted)}",
        )


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    initializer = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    try:
        return typing.get_type_hints(inspect.unwrap(initializer))
    except Exception:
        # Annotations may name what exists for type checkers only. Then nothing is known.
        return {}


def _admits(wanted: Any, value: object) -> bool:
    """Say whether an annotation admits a value; anything that is not made of plain types admits everything."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_admits(choice, value) for choice in typing.get_args(wanted))
    if origin is typing.Literal:
        return value in typing.get_args(wanted)
    # An annotation can be anything, also what has no hash: `sizes: [int]`.
    if not isinstance(wanted, type) or wanted not in _PLAIN:
        return True
    # True is an int in Python, and a slip in a configuration.
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, _PLAIN[wanted])


def _spoken(wanted: Any) -> str:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_spoken(choice) for choice in typing.get_args(wanted))
    if typing.get_origin(wanted) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(wanted)))
    return "null" if wanted is type(None) else f"a {wanted.__name__}" if wanted is not int else "an int"


def _example(wanted: Any) -> str:
    choices = typing.get_args(wanted) or (wanted,)
    if typing.get_origin(wanted) is typing.Literal:
        return str(choices[0])
    return {bool: "true", int: "1", float: "0.1", str: "text"}.get(choices[0], "null")
