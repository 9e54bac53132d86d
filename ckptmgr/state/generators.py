"""Find the random number generators that data loading draws from besides the global ones.

A data set may keep ``self.rng = numpy.random.default_rng(0)``, a transform a ``random.Random``, a sampler the
``torch.Generator`` that it was given, a module a global of its own. Their states belong to the position in the data.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.rng import AnyGenerator, capture_generator, is_generator, restore_generator

__all__ = ["capture_generators", "find_generators", "restore_generators"]

# Bounds of the search: it runs once per epoch, and data sets hold lists of a million file names.
_MAX_OBJECTS = 4000
_MAX_DEPTH = 8
_MAX_ITEMS = 256

_LEAVES = (
    str, bytes, bytearray, memoryview, int, float, complex, bool, type(None), type, range,
    types.ModuleType, types.CodeType, types.BuiltinFunctionType, torch.Tensor, np.ndarray, np.generic,
)  # fmt: skip
_LIBRARIES = frozenset({"torch", "numpy", "random", "builtins", "multiprocessing", "threading"})


def find_generators(roots: Mapping[str, object]) -> dict[str, AnyGenerator]:
    """Return the generator objects that are reachable from ``roots``, by path.

    Follows attributes, slots, lists, tuples, dict values, ``functools.partial``, closures and defaults of functions,
    and the module globals that functions and methods name. Breadth first, at most 8 deep, 4000 objects and 256 items
    per container. The global generators of Python, NumPy and torch are left out.

    Args:
        roots: Objects to start from; the keys begin the paths.

    Returns:
        ``{"dataset.transform.rng": generator, ...}``; one path for each generator, the same in every process that
        builds the same objects.
    """
    global_ones = {id(getattr(random, "_inst", None)), id(getattr(np.random.mtrand, "_rand", None))}
    global_ones.add(id(torch.default_generator))
    found: dict[str, AnyGenerator] = {}
    seen: set[int] = set()
    # The queue keeps what it names alive, so that no id is used twice during the search.
    kept: list[object] = []
    queue: deque[tuple[str, object, int]] = deque((name, value, 0) for name, value in roots.items())
    while queue and len(seen) < _MAX_OBJECTS:
        path, value, depth = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen or id(value) in global_ones:
            continue
        seen.add(id(value))
        kept.append(value)
        if is_generator(value):
            found[path] = value  # type: ignore[assignment]
        elif depth < _MAX_DEPTH:
            queue.extend((f"{path}{step}", child, depth + 1) for step, child in _children(value))
    return found


def capture_generators(generators: Mapping[str, AnyGenerator]) -> dict[str, Any]:
    """Return the state of each generator as a plain tree, by path."""
    return {path: capture_generator(generator) for path, generator in generators.items()}


def restore_generators(generators: Mapping[str, AnyGenerator], trees: Mapping[str, Any]) -> list[str]:
    """Put generators back into their captured states, in place.

    Args:
        generators: The live ones, by path.
        trees: What :func:`capture_generators` returned.

    Returns:
        One sentence for each path that only one side has.

    Raises:
        StateMismatchError: A generator is of another kind than the saved one. Names its path.
    """
    for path, generator in generators.items():
        if path in trees:
            try:
                restore_generator(generator, trees[path])
            except StateMismatchError as cause:
                raise StateMismatchError(f"{path}: {cause.what}", why=cause.why, next=cause.next) from cause
    return [
        *(f"the generator {path} has no state in the checkpoint" for path in generators.keys() - trees.keys()),
        *(f"the generator {path} of the checkpoint is not there" for path in trees.keys() - generators.keys()),
    ]


def _children(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for _, (key, item) in zip(range(_MAX_ITEMS), value.items(), strict=False):
            yield f"[{key!r}]", item
        return
    if isinstance(value, list | tuple):
        for i, item in enumerate(value[:_MAX_ITEMS]):
            yield f"[{i}]", item
        return
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
        return
    if isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
        return
    if isinstance(value, types.FunctionType):
        yield from _children_of_function(value)
        return
    for name, item in vars(value).items() if hasattr(value, "__dict__") else ():
        yield f".{name}", item
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            # A slot may be empty, and its name is mangled when it begins with two underscores.
            item = getattr(value, name, None)
            if item is not None:
                yield f".{name}", item
        if cls.__module__.split(".")[0] in _LIBRARIES:
            continue
        for member in vars(cls).values():
            function = getattr(member, "__func__", member)
            if isinstance(function, types.FunctionType):
                yield from _globals_of(function, function.__code__)


def _children_of_function(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    if function.__module__ is not None and function.__module__.split(".")[0] in _LIBRARIES:
        return
    yield ".__defaults__", function.__defaults__
    yield ".__kwdefaults__", function.__kwdefaults__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:
            # A variable that the enclosing function has not set yet.
            continue
    yield from _globals_of(function, function.__code__)


def _globals_of(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, object]]:
    for name in code.co_names:
        if name in function.__globals__:
            yield f":{name}", function.__globals__[name]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(function, constant)
