"""A preprocessor as an entry of the state: captured with the model, and never silently replaced by another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.preprocess.differences import first_differences
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import capture_preprocessor, find_kind, is_known_only_here, kind_of_name
from ckptmgr.preprocess.parts import has_parts
from ckptmgr.preprocess.readable import is_contained, readable
from ckptmgr.preprocess.reviewed import is_same_class
from ckptmgr.state.entry import EntryScope
from ckptmgr.state.handlers import REGISTRY
from ckptmgr.state.module import ModuleHandler
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.trees import copied_tree

__all__ = ["PREPROCESSOR", "PreprocessorHandler"]

PREPROCESSOR = "preprocessor"
"""Name of the entry that holds what belongs to the model, whatever its type."""

_NEXT = (
    "go on with the preprocessor of the checkpoint: ckptmgr.load_inference(...).preprocessor; or, knowingly, with the "
    'live one: leave it out with Selection.without("preprocessor")'
)
_MODULE = ModuleHandler()
_log = logging.getLogger("ckptmgr")


class PreprocessorHandler:
    """Captures preprocessors of every kind, and restores them where that changes nothing that was decided.

    A frozen preprocessor is compared: equal is fine, one that only lacks what the checkpoint has (an unfitted
    estimator, an empty vocabulary) is filled in place, and one that contradicts the checkpoint is refused. A
    preprocessor whose state changes in training is restored like a model.

    Attributes:
        entries: Names of entries that are preprocessors whatever their type.
    """

    name = "preprocessor"
    version = 1
    scope: EntryScope = "replicated"
    entries = frozenset({PREPROCESSOR})

    def handles(self, value: object) -> bool:
        """Say whether it is a preprocessor of a library of which no other handler knows, such as a tokenizer."""
        return is_known_only_here(value)

    def capture(self, value: Any, names: ParameterNames) -> dict[str, Any]:
        """Return the preprocessor with its kind and class."""
        return capture_preprocessor(value)

    def fingerprint(self, tree: Any) -> str:
        """Return the digest of what the preprocessor does: of its kind, class and state."""
        return fingerprint({name: tree[name] for name in ("kind", "class", "state")})

    def check(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Refuse a live preprocessor that contradicts the checkpoint's, and say where."""
        kind = find_kind(value)
        saved_kind = kind_of_name(tree["kind"], tree["kind_version"])
        live = capture_preprocessor(value)
        if saved_kind.name != kind.name or not is_same_class(value, tree["class"]):
            raise _another(first_differences({"class": tree["class"]}, {"class": live["class"]}))
        if None not in (tree["source"], live["source"]) and tree["source"] != live["source"]:
            _log.warning("the source of the preprocessor's class %s has changed since the checkpoint", live["class"])
        if isinstance(value, nn.Module) and kind.changes_in_training:
            _check_module(value, tree["state"], live["state"], names)
        elif not kind.changes_in_training:
            saved_state, live_state = _nameless(tree), _nameless(live)
            if fingerprint(saved_state) == fingerprint(live_state):
                return
            # What holds other preprocessors is built, and not filled: that would need leave to import their code.
            can_be_filled = kind.is_restorable(value) and not has_parts(saved_state)
            if not (can_be_filled and is_contained(readable(live_state), readable(saved_state))):
                raise _another(first_differences(saved_state, live_state))

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Put the state into the live preprocessor, unless it has it already."""
        kind = find_kind(value)
        if kind.changes_in_training or fingerprint(kind.capture(value)) != fingerprint(tree["state"]):
            kind.restore(value, tree["state"])

    def backup(self, value: Any, names: ParameterNames) -> Callable[[], None] | None:
        """Return what puts a preprocessor back, from a copy of its state; None if it cannot change at all."""
        kind = find_kind(value)
        if not kind.is_restorable(value):
            return None
        tree = copied_tree(kind.capture(value))
        return lambda: kind.restore(value, tree)


def _check_module(value: nn.Module, saved: Any, live: Any, names: ParameterNames) -> None:
    """Compare the structure of a module, and its attributes where they say what it does."""
    _MODULE.check(value, saved["state"], names)
    differences = first_differences(saved["modules"], live["modules"])
    if not differences:
        return
    if not any(parameter.requires_grad for parameter in value.parameters()):
        raise _another(differences)
    # An attribute of a module that is trained may count what it has seen, so a difference is no contradiction.
    _log.warning("attributes of the preprocessor are not those of the checkpoint: %s", "; ".join(differences))


def _nameless(tree: Any) -> Any:
    """Return the state without the class, which has been compared, and which a library may have moved since."""
    state = tree["state"]
    if type(state) is not dict or state.get("class") != tree["class"]:
        return state
    return {key: item for key, item in state.items() if key != "class"}


def _another(differences: list[str]) -> StateMismatchError:
    return StateMismatchError(
        "the preprocessor of the checkpoint is not the live one",
        why="\n        ".join(differences),
        next=_NEXT,
    )


# Whoever can save a preprocessor has imported this room.
REGISTRY.build_in(PreprocessorHandler())
