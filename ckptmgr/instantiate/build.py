"""Builds the objects of a configuration, after everything in it was checked."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ckptmgr.errors import CkptmgrError, ConfigError, Preempted, UsageError
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.load import Base, check_result, load_target, spoken_base
from ckptmgr.instantiate.resolve import one_line, where_raised
from ckptmgr.instantiate.signature import check_arguments, suggest_for
from ckptmgr.instantiate.targets import Target, check_targets, find_targets, is_list, spoken
from ckptmgr.instantiate.value_types import check_types

__all__ = ["build", "check_build", "load_target"]

_RESERVED = re.compile(r"_[a-z]+_")
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Call:
    """One object to be built: what is called, and with what."""

    target: Target
    function: Callable[..., Any]
    args: list[object]
    named: dict[str, object]
    is_partial: bool


def build(
    tree: object,
    *,
    key: str,
    allow: AllowList,
    base: Base = None,
    base_name: str = "",
    args: Sequence[object] = (),
    extra: Mapping[str, object] = _NOTHING,
) -> Any:
    """Build what a part of a configuration describes: every ``_target_`` in it, the inner ones first.

    Everything is checked before anything is built: all names, all imports, all signatures.

    Args:
        tree: Plain dicts, lists and scalars. A dict with ``_target_`` is an object: its other keys are arguments,
            ``_args_`` is a list of positional ones, and with ``_partial_: true`` the call is left to whoever gets it.
        key: Where it stands in the configuration.
        allow: What may be named.
        base: What the outermost object must be. Of a list, each element.
        base_name: How messages call `base`.
        args: Positional arguments of the outermost object, before ``_args_``.
        extra: Keyword arguments of the outermost object.

    Raises:
        NotAllowedError: A name is not allowed. Nothing was imported.
        ConfigError: Something does not fit, or a constructor raised; then that is the cause.
    """
    return _make(_plan_all(tree, key, allow, base, base_name, len(args), extra), base, base_name, args, extra)


def check_build(
    tree: object,
    *,
    key: str,
    allow: AllowList,
    base: Base = None,
    base_name: str = "",
    n_args: int = 0,
    extra: Mapping[str, object] = _NOTHING,
) -> None:
    """Check what `build` checks before it builds, and build nothing. What is named is imported.

    Args:
        tree: As for `build`.
        key: As for `build`.
        allow: As for `build`.
        base: As for `build`.
        base_name: As for `build`.
        n_args: How many positional arguments there will be.
        extra: Keyword arguments; only their names are looked at.
    """
    _plan_all(tree, key, allow, base, base_name, n_args, extra)


def _plan_all(
    tree: object, key: str, allow: AllowList, base: Base, base_name: str, n_args: int, extra: Mapping[str, object]
) -> object:
    check_targets(find_targets(tree, key), allow)
    if base is not None and is_list(tree):
        return [
            _plan(
                _expect_target(node, _below(key, number), base, base_name), _below(key, number), allow, base, base_name
            )
            for number, node in enumerate(tree)
        ]
    if base is not None or n_args or extra:
        _expect_target(tree, key, base, base_name)
    return _plan(tree, key, allow, base, base_name, n_args, extra)


def _expect_target(tree: object, key: str, base: Base, base_name: str) -> object:
    if isinstance(tree, Mapping) and "_target_" in tree:
        return tree
    wanted = spoken_base(base, base_name) if base is not None else "an object"
    found = "a dict without _target_" if isinstance(tree, Mapping) else f"{tree!r:.80}, of type {type(tree).__name__}"
    raise ConfigError(
        f"{spoken(key)}: there is nothing to build",
        why=f"{wanted} is wanted here, and this is {found}",
        next="write the class and its arguments: _target_: my_pkg.Class",
    )


def _plan(
    node: object,
    key: str,
    allow: AllowList,
    base: Base = None,
    base_name: str = "",
    n_args: int = 0,
    extra: Mapping[str, object] = _NOTHING,
) -> object:
    if isinstance(node, Mapping):
        if "_target_" not in node:
            _check_plain(node, key)
            return {name: _plan(value, _below(key, name), allow) for name, value in node.items()}
        target = Target(key, node["_target_"])
        inner_args, named, is_partial = _read_node(node, target)
        if is_partial and base is not None:
            raise ConfigError(
                f"{_below(key, '_partial_')}: nobody would call it later",
                why=f"{spoken_base(base, base_name)} is wanted here",
                next=f"leave it out: ~{_below(key, '_partial_')}",
            )
        function = load_target(target, allow, base=base, base_name=base_name)
        check_arguments(
            function,
            target,
            n_given=n_args,
            n_args=len(inner_args),
            named=named,
            extra=[name for name in extra if name not in named],
            is_partial=is_partial,
        )
        _check_not_given_twice(named, extra, target)
        check_types(function, target, named)
        return _Call(
            target,
            function,
            [_plan(value, _below(key, f"_args_.{number}"), allow) for number, value in enumerate(inner_args)],
            {name: _plan(value, _below(key, name), allow) for name, value in named.items()},
            is_partial,
        )
    if is_list(node):
        return [_plan(value, _below(key, number), allow) for number, value in enumerate(node)]
    return node


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _check_plain(node: Mapping[Any, object], key: str) -> None:
    for name in node:
        if not isinstance(name, str) or _RESERVED.fullmatch(name) is None:
            continue
        if name in ("_args_", "_partial_") or difflib.get_close_matches(name, ["_target_"]):
            raise ConfigError(
                f"{_below(key, name)}: there is no _target_ beside it",
                why="only what has a _target_ is built",
                next="did you mean _target_?" if name not in ("_args_", "_partial_") else "add _target_",
            )


def _read_node(node: Mapping[Any, object], target: Target) -> tuple[list[object], dict[str, object], bool]:
    args, is_partial = node.get("_args_", []), node.get("_partial_", False)
    if not is_list(args):
        raise ConfigError(f"{_below(target.key, '_args_')} is not a list", next="write _args_: [1, 2]")
    if not isinstance(is_partial, bool):
        raise ConfigError(f"{_below(target.key, '_partial_')} is neither true nor false", next="write _partial_: true")
    if node.get("_recursive_", True) is not True:
        raise ConfigError(
            f"{_below(target.key, '_recursive_')}: Hydra's switch is not supported",
            why="every _target_ is built, the inner ones first, so it would mean something else here",
            next="let the inner one be left to the outer with _partial_: true",
        )
    named: dict[str, object] = {}
    for name, value in node.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"{spoken(target.key)}: {name!r} cannot be the name of an argument of {target.name}",
                why=f"it is of type {type(name).__name__}",
                next="put it into a dict that is an argument",
            )
        if name in ("_target_", "_args_", "_partial_", "_recursive_", "_convert_"):
            continue
        if _RESERVED.fullmatch(name):
            near = difflib.get_close_matches(name, ["_args_", "_partial_"], n=1)
            raise ConfigError(
                f"{_below(target.key, name)}: there is no such key beside _target_",
                next=f"did you mean {near[0]}?" if near else "use _args_, _partial_, or the names of arguments",
            )
        named[name] = value
    return list(args), named, is_partial


def _check_not_given_twice(named: Mapping[str, object], extra: Mapping[str, object], target: Target) -> None:
    both = [name for name in named if name in extra]
    if both:
        raise ConfigError(
            f"{_below(target.key, both[0])}: {target.name} would get {both[0]!r} twice",
            why="it is given by ckptmgr",
            next=f"leave it out: ~{_below(target.key, both[0])}",
        )


def _make(
    plan: object,
    base: Base = None,
    base_name: str = "",
    args: Sequence[object] = (),
    extra: Mapping[str, object] = _NOTHING,
) -> Any:
    if isinstance(plan, dict):
        return {name: _make(value) for name, value in plan.items()}
    if isinstance(plan, list):
        return [_make(value, base, base_name) for value in plan]
    if not isinstance(plan, _Call):
        return plan
    positional = [*args, *(_make(value) for value in plan.args)]
    named = {**{name: _make(value) for name, value in plan.named.items()}, **extra}
    if plan.is_partial:
        return functools.partial(plan.function, *positional, **named)
    made = _call(plan, positional, named)
    check_result(made, plan.target, base, base_name)
    return made


def _call(plan: _Call, args: list[object], named: dict[str, object]) -> Any:
    target = plan.target
    try:
        return plan.function(*args, **named)
    except Preempted:
        raise
    except UsageError as error:
        raise ConfigError(
            f"building {spoken(target.key)} ({target.name}) failed: {error.what}", why=error.why, next=error.next
        ) from error
    except CkptmgrError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"building {spoken(target.key)} ({target.name}) failed",
            why=f"{one_line(error)}{where_raised(error)}",
            next=suggest_for(error, plan.function) or "correct the arguments, or the class",
        ) from error
