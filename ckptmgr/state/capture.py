"""Live objects to state trees and back: capture, the first capture's proof, check, restore.

A restore verifies everything before it changes anything. Objects that run code of their own while they load are
restored first, each with a way back; what cannot fail any more comes last.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pathlib
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.format.tree import Path, format_path
from ckptmgr.state.codec import EntryEncoder, decode_entry
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.handlers import (
    REGISTRY,
    HandlerRegistry,
    RestoresWithBackup,
    StateHandler,
    fingerprint_of,
    scopes_of,
)
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.renamed_entries import in_live_names
from ckptmgr.state.sources import class_sources
from ckptmgr.state.trees import copied_tree

__all__ = ["CapturedEntry", "capture_state", "check_state", "dry_check", "restore_state"]

_log = logging.getLogger("ckptmgr")


def capture_state(state: Mapping[str, object], *, registry: HandlerRegistry = REGISTRY) -> list[CapturedEntry]:
    """Turn the live objects into trees that refer to the live tensors; nothing is copied.

    Args:
        state: The objects by entry name.
        registry: Where handlers are found; accepts no further ones from now on.

    Raises:
        UnsupportedStateError: An object that no handler can store. Names its entry and type.
    """
    registry.freeze()
    names = ParameterNames.of_state(state)
    entries: list[CapturedEntry] = []
    for name, value in state.items():
        handler = registry.find(name, value)
        try:
            tree = handler.capture(value, names)
        except UnsupportedStateError as error:
            raise UnsupportedStateError(f"state[{name!r}]: {error.what}", why=error.why, next=error.next) from error
        scope, tensor_scopes = scopes_of(handler, value)
        mark = fingerprint_of(handler, tree)
        classes = class_sources(value) if isinstance(value, torch.nn.Module) else {}
        entries.append(CapturedEntry(name, handler.name, handler.version, tree, scope, tensor_scopes, mark, classes))
    return entries


def dry_check(entries: Iterable[CapturedEntry]) -> None:
    """Prove, before hours of training, that everything captured can be stored and comes back as it is.

    Args:
        entries: The first capture.

    Raises:
        UnsupportedStateError: A value that cannot be stored, or would come back as another. Names its path and type.
    """
    for entry in entries:
        encoder = EntryEncoder(entry)
        document = json.loads(json.dumps(encoder.tree, allow_nan=False))
        # Nothing is copied for this: a tensor's name stands for the live tensor.
        decoded = decode_entry(document, encoder.live_tensor, encoder.content)
        path = _first_difference(entry.tree, decoded, (entry.name,))
        if path is not None:
            raise UnsupportedStateError(
                f"{format_path(path)} would come back from a checkpoint as another value",
                why="the value does not survive being encoded and decoded; its type has state that is not stored",
                next="convert it to plain values, or register a handler with ckptmgr.register_handler(...)",
            )


def check_state(
    state: Mapping[str, object],
    entries: Mapping[str, CapturedEntry] | Iterable[CapturedEntry],
    *,
    registry: HandlerRegistry = REGISTRY,
) -> None:
    """Check that every entry fits its live object, and that each has its counterpart. Changes nothing.

    A module whose names differ from the checkpoint's by a prefix alone fits, if one rule matches all of them.

    Raises:
        StateMismatchError: Something does not fit; tells everything that does not, in all entries.
    """
    saved = in_live_names(state, _by_name(entries)).entries
    names = ParameterNames.of_state(state)
    found: list[StateMismatchError] = []
    missing, unexpected = sorted(state.keys() - saved.keys()), sorted(saved.keys() - state.keys())
    if missing or unexpected:
        why = [f"the checkpoint has no {', '.join(map(repr, missing))}"] if missing else []
        if unexpected:
            why.append(f"the live state has no {', '.join(map(repr, unexpected))}")
        found.append(
            StateMismatchError(
                "the entries of the checkpoint are not those of the live state",
                why="; ".join(why),
                next="give the same entries as in the run that saved; for some of them, such as a model to "
                "predict with, use a Checkpointer of another directory, and its restore('RUN_DIR@best')",
            )
        )
    for name, value in state.items():
        if name in saved:
            try:
                _check_entry(registry.find(name, value), value, saved[name], names)
            except StateMismatchError as error:
                found.append(StateMismatchError(f"{name!r}: {error.what}", why=error.why, next=error.next))
    if len(found) == 1:
        raise found[0]
    if found:
        raise StateMismatchError(
            f"{len(found)} parts of the checkpoint do not fit the live state",
            why="\n        ".join(f"{error.what}: {error.why}" for error in found),
            next=found[0].next,
        )


def restore_state(
    state: Mapping[str, object],
    entries: Mapping[str, CapturedEntry] | Iterable[CapturedEntry],
    *,
    registry: HandlerRegistry = REGISTRY,
) -> None:
    """Verify, then put every entry into its live object. A restore that fails leaves the objects as they were.

    Args:
        state: The live objects by entry name.
        entries: What `codec.load_entries` gave. Their tensors are taken over, so entries are restored once.
        registry: Where handlers are found.

    Raises:
        StateMismatchError: Something does not fit, or an object refused its state (the cause is chained).
    """
    renamed = in_live_names(state, _by_name(entries))
    saved = renamed.entries
    check_state(state, saved, registry=registry)
    names = ParameterNames.of_state(state)
    undoable: list[tuple[str, Callable[[], None]]] = []
    certain: list[str] = []
    for name, value in state.items():
        undo = _backup(registry.find(name, value), value, names)
        if undo is None:
            certain.append(name)
        else:
            undoable.append((name, undo))
    done: list[tuple[str, Callable[[], None]]] = []
    for name, undo in (*undoable, *((name, _nothing) for name in certain)):
        done.append((name, undo))
        try:
            registry.find(name, state[name]).restore(state[name], saved[name].tree, names)
        except BaseException as error:
            failed = _undo(done)
            if not isinstance(error, Exception):
                raise
            raise StateMismatchError(
                f"{name!r} refused its state from the checkpoint",
                why=f"{type(error).__name__}: {error}"
                + (f"; putting back the state before also failed for {', '.join(failed)}" if failed else ""),
                next="make its load_state_dict accept what its state_dict gave"
                + (
                    "; start the process anew, for these objects are half restored"
                    if failed
                    else "; nothing was changed"
                ),
            ) from error
    for level, note in renamed.notes:
        _log.log(level, "%s", note)


def _nothing() -> None:
    """Undo nothing."""


def _undo(done: list[tuple[str, Callable[[], None]]]) -> list[str]:
    """Undo in reverse; return the names of entries that could not be put back."""
    failed: list[str] = []
    for name, undo in reversed(done):
        try:
            undo()
        except Exception:
            failed.append(repr(name))
    return failed


def _backup(handler: StateHandler, value: object, names: ParameterNames) -> Callable[[], None] | None:
    if isinstance(handler, RestoresWithBackup):
        return handler.backup(value, names)
    tree = copied_tree(handler.capture(value, names))
    return lambda: handler.restore(value, tree, names)


def _check_entry(handler: StateHandler, value: object, entry: CapturedEntry, names: ParameterNames) -> None:
    kind = type(value).__qualname__
    if entry.handler == "dcp":
        raise StateMismatchError(
            "it was saved through PyTorch's DCP",
            why="what DCP saves is a state dict, which it loads onto any ranks by itself",
            next="load it with torch.distributed.checkpoint.load(..., storage_reader=ckptmgr.topology.CheckpointReader("
            "reference), planner=ckptmgr.topology.LoadPlanner())",
        )
    if handler.name != entry.handler:
        raise StateMismatchError(
            f"it was captured by the handler {entry.handler!r}, and is a {kind} now, for {handler.name!r}",
            why="an entry is restored by the handler that captured it",
            next="give the same kind of object under this name, or register the handler that the run used",
        )
    if handler.version != entry.version:
        raise StateMismatchError(
            f"it was captured by version {entry.version} of the handler {entry.handler!r}",
            why=f"this program has version {handler.version}",
            next="use the version of ckptmgr, or of the package with the handler, that the run used",
        )
    try:
        handler.check(value, entry.tree, names)
    except UnsupportedStateError as error:
        # It is about the live object: one without memory, say, or of which nobody knows what its state is.
        raise StateMismatchError(error.what, why=error.why, next=error.next) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StateMismatchError(
            f"what the checkpoint holds is no state of a {kind}",
            why=f"{type(error).__name__}: {error}",
            next="the entry was written by another version, or altered; resume from another checkpoint",
        ) from error


def _by_name(entries: Mapping[str, CapturedEntry] | Iterable[CapturedEntry]) -> dict[str, CapturedEntry]:
    if isinstance(entries, Mapping):
        return dict(entries)
    return {entry.name: entry for entry in entries}


def _first_difference(value: Any, decoded: Any, path: Path) -> Path | None:
    """Return the path of the first value that came back as another, tensors and large arrays aside."""
    if isinstance(value, torch.Tensor):
        return None if isinstance(decoded, torch.Tensor) else path
    if isinstance(value, np.ndarray) and isinstance(decoded, np.ndarray):
        return None if decoded.size == 0 or _same_array(value, decoded) else path
    if type(value) is not type(decoded) and not isinstance(value, pathlib.PurePath):
        return path
    if isinstance(value, dict):
        if len(value) != len(decoded):
            return path
        for (key, item), (other_key, other) in zip(value.items(), decoded.items(), strict=True):
            if _first_difference(key, other_key, (*path, key)) is not None:
                return (*path, key)
            if (found := _first_difference(item, other, (*path, key))) is not None:
                return found
        return None
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return _first_difference(vars(value), vars(decoded), path)
    if isinstance(value, (list, tuple, deque)) and not isinstance(value, torch.Size):
        if len(value) != len(decoded):
            return path
        pairs = enumerate(zip(value, decoded, strict=True))
        return next((found for i, (a, b) in pairs if (found := _first_difference(a, b, (*path, i)))), None)
    return None if _same_leaf(value, decoded) else path


def _same_leaf(value: Any, decoded: Any) -> bool:
    if isinstance(value, float):
        return (math.isnan(value) and math.isnan(decoded)) or (
            value == decoded and math.copysign(1, value) == math.copysign(1, decoded)
        )
    if isinstance(value, np.generic):
        return bool(value.dtype == decoded.dtype and value.tobytes() == decoded.tobytes())
    if isinstance(value, (set, frozenset, complex)):
        # Equal by text, for a nan in them is not equal to itself.
        return bool(value == decoded) or sorted(map(repr, _members(value))) == sorted(map(repr, _members(decoded)))
    # Containers of other kinds compare with nan inside by identity and fail; their text does not.
    return bool(value == decoded) or repr(value) == repr(decoded)


def _members(value: Any) -> Iterable[Any]:
    return (value,) if isinstance(value, complex) else value


def _same_array(value: np.ndarray[Any, Any], decoded: np.ndarray[Any, Any]) -> bool:
    same_kind = value.dtype == decoded.dtype and value.shape == decoded.shape
    return bool(same_kind and value.tobytes() == decoded.tobytes())
