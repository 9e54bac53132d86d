"""Which handler captures and restores which object: the registry, and how to add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from ckptmgr.errors import UnsupportedStateError, UsageError
from ckptmgr.state.entry import EntryScope, TensorScope
from ckptmgr.state.module import ModuleHandler
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import OptimizerHandler
from ckptmgr.state.stateful import GeneratorHandler, GradScalerHandler, SchedulerHandler, StatefulHandler
from ckptmgr.state.values import ValuesHandler

__all__ = [
    "ENTRY_POINT_GROUP",
    "REGISTRY",
    "HandlerRegistry",
    "RestoresWithBackup",
    "StateHandler",
    "fingerprint_of",
    "register_handler",
    "scopes_of",
]

ENTRY_POINT_GROUP = "ckptmgr.state_handlers"


@runtime_checkable
class StateHandler(Protocol):
    """Captures and restores one kind of object.

    A tree is made of nested dicts, lists and tuples of tensors, NumPy arrays and plain values. The name is recorded in
    the manifest, so it stays the same forever; the version grows when the tree's form changes.
    """

    name: str
    version: int

    def handles(self, value: object) -> bool:
        """Say whether this handler is for the value."""

    def capture(self, value: Any, names: ParameterNames) -> Any:
        """Return the value's state as a tree that refers to the live tensors; copies nothing."""

    def check(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Raise StateMismatchError, naming all that does not fit, if `restore` could not succeed. Changes nothing."""

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Put the state into the live value; the tree has been checked and its tensors may be taken over."""


@runtime_checkable
class RestoresWithBackup(Protocol):
    """What a handler may add, to be undone more cheaply than by a copy of all that it captures."""

    def backup(self, value: Any, names: ParameterNames) -> Callable[[], None] | None:
        """Return what undoes a restore of this value, or None if a checked restore of it cannot fail."""


_BUILT_IN: tuple[StateHandler, ...] = (
    ModuleHandler(),
    OptimizerHandler(),
    SchedulerHandler(),
    GradScalerHandler(),
    GeneratorHandler(),
    StatefulHandler(),
    ValuesHandler(),
)


def scopes_of(handler: StateHandler, value: object) -> tuple[EntryScope, Mapping[str, TensorScope]]:
    """Return what an entry is to the ranks of a job, the same on all or each rank's own; and which tensors differ.

    A handler may have an attribute ``scope`` and a method ``tensor_scopes(value)``. Without them each rank has its own:
    that is never wrong, only larger.
    """
    tensor_scopes = getattr(handler, "tensor_scopes", None)
    return getattr(handler, "scope", "per-rank"), {} if tensor_scopes is None else tensor_scopes(value)


def fingerprint_of(handler: StateHandler, tree: Any) -> str | None:
    """Return the digest of what an entry does, from a handler that has a method ``fingerprint(tree)``; else None."""
    fingerprint = getattr(handler, "fingerprint", None)
    return None if fingerprint is None else fingerprint(tree)


class HandlerRegistry:
    """Finds the handler of a value: registered ones first (the latest of them first), then the built-in ones.

    Of the built-in ones, a handler whose attribute ``entries`` has the entry's name comes first.

    The first capture freezes it: a handler that came later would save a run's later checkpoints in another form than
    its earlier ones.
    """

    def __init__(self) -> None:
        self._registered: list[StateHandler] = []
        self._built_in: tuple[StateHandler, ...] = _BUILT_IN
        self._is_frozen = False
        self._has_entry_points = False

    def build_in(self, handler: StateHandler) -> None:
        """Add a handler of a room above this one: it is always there, and may be added before and after `freeze`."""
        if all(type(handler) is not type(known) for known in self._built_in):
            self._built_in = (handler, *self._built_in)

    def register(self, handler: StateHandler) -> None:
        """Add a handler.

        Raises:
            UsageError: Something has been captured already, the name is taken, or the object is no handler.
        """
        if any(handler is known for known in self._registered):
            return
        if not isinstance(handler, StateHandler):
            raise UsageError(
                f"{handler!r} is not a state handler",
                why="a handler has name, version, handles, capture, check and restore",
                next="see ckptmgr.state.handlers.StateHandler",
            )
        if self._is_frozen:
            raise UsageError(
                f"the handler {handler.name!r} comes too late",
                why="state has been captured already; the checkpoints of a run must not change their form",
                next="register handlers before the first Checkpointer or CheckpointManager is used",
            )
        if any(handler.name == known.name for known in (*self._registered, *self._built_in)):
            raise UsageError(
                f"the name {handler.name!r} of a state handler is taken",
                why="the name says in a manifest which handler restores an entry",
                next="give the handler another name",
            )
        self._registered.append(handler)

    def freeze(self) -> None:
        """Accept no further handlers."""
        self._load_entry_points()
        self._is_frozen = True

    def find(self, name: str, value: object) -> StateHandler:
        """Return the handler for a value.

        Args:
            name: The value's entry, for the message.
            value: The live value.

        Raises:
            UnsupportedStateError: Nobody handles it. Says how to register a handler.
        """
        self._load_entry_points()
        for handler in reversed(self._registered):
            if handler.handles(value):
                return handler
        for handler in self._built_in:
            if name in getattr(handler, "entries", ()) or handler.handles(value):
                return handler
        raise _unsupported(name, value)

    def _load_entry_points(self) -> None:
        if self._has_entry_points or self._is_frozen:
            return
        self._has_entry_points = True
        by_call, self._registered = self._registered, []
        # Installed packages first, so that a handler that the program itself registers wins.
        for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
            handler = entry_point.load()
            self.register(handler() if isinstance(handler, type) else handler)
        for handler in by_call:
            self.register(handler)


REGISTRY = HandlerRegistry()
"""The handlers of this process."""


def register_handler(handler: StateHandler) -> None:
    """Add a handler for a kind of object that ckptmgr does not know, before anything is captured.

    Raises:
        UsageError: Something has been captured already, the name is taken, or the object is no handler.
    """
    REGISTRY.register(handler)


def _unsupported(name: str, value: object) -> UnsupportedStateError:
    kind = type(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, tuple, frozenset)):
        return UnsupportedStateError(
            f"state[{name!r}] is a {kind.__qualname__}, which cannot be restored in place",
            why="ckptmgr puts restored values into the objects that it was given; this one cannot change",
            next=f"put it into a dict and use it from there: state={{..., 'counters': {{{name!r}: {name}}}}}",
        )
    return UnsupportedStateError(
        f"state[{name!r}] is a {kind.__module__}.{kind.__qualname__}, which no handler can store",
        why="checkpoints hold tensors and plain values only, never pickled objects, so that they load anywhere",
        next="give the object state_dict() and load_state_dict(), or register a handler with "
        "ckptmgr.register_handler(...) before the first save",
    )
