"""Functions: their import path and a digest of their source. The code itself lives with the program."""

from __future__ import annotations

import functools
import types
from typing import Any

from ckptmgr.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from ckptmgr.preprocess.class_names import object_name, source_digest
from ckptmgr.preprocess.encoded import as_tensors
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.parts import Parts
from ckptmgr.preprocess.reading import reading_state

__all__ = ["FunctionKind"]

_NEXT = "write a function at the top of a module, or a dataclass with __call__ for one that has settings"


class FunctionKind:
    """Functions that can be imported, and `functools.partial` of them.

    The tree is ``{"function": name, "source": digest or None}``, of a partial also with ``"arguments": [...]`` and
    ``"keywords": {...}``. The source is the function's own: what it calls is not looked at.
    """

    name = "function"
    version = 1
    changes_in_training = False

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def handles(self, value: object) -> bool:
        """Say whether it is a function, a bound method, or a partial."""
        kinds = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
        return isinstance(value, kinds)

    def capture(self, value: Any) -> dict[str, Any]:
        """Return name and digest.

        Raises:
            UnsupportedStateError: It is a lambda, a local function or a bound method, which nobody can import.
        """
        if isinstance(value, functools.partial):
            tree = self.capture(value.func)
            tree["arguments"] = self._parts.capture(list(value.args), "partial")
            tree["keywords"] = self._parts.capture(dict(value.keywords), "partial")
            return tree
        qualname = getattr(value, "__qualname__", "")
        owner = getattr(value, "__self__", None)
        if "<lambda>" in qualname:
            raise UnsupportedStateError(
                f"the lambda in {getattr(value, '__module__', None)} cannot be stored",
                why="it has no name under which it could be found again",
                next=_NEXT,
            )
        if "<locals>" in qualname:
            raise UnsupportedStateError(
                f"the function {qualname} cannot be stored",
                why="it is made inside of another function, and what it closes over is not known",
                next=_NEXT,
            )
        if (owner is not None and not isinstance(owner, (types.ModuleType, type))) or value.__module__ is None:
            raise UnsupportedStateError(
                f"the method {qualname} cannot be stored",
                why="it belongs to an object, whose state is not stored with it",
                next="pass the object itself, or write a function at the top of a module",
            )
        return {"function": object_name(value), "source": source_digest(value)}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Import the function, and refuse one whose source is another.

        Raises:
            StateMismatchError: The function has changed since.
        """
        with reading_state(self.name):
            name = tree["function"]
            if not isinstance(name, str):
                raise ValueError("the name of the function is no text")
            function = allow(name)
            if not callable(function):
                raise CorruptCheckpointError(f"{name} is no function", next="the checkpoint was altered")
            source = source_digest(function)
            if tree["source"] is not None and source is not None and tree["source"] != source:
                raise StateMismatchError(
                    f"the function {name} is not the one that preprocessed in training",
                    why="its source has changed since",
                    next="check out the code of the run (`ckptmgr show` tells the commit), or pass the function "
                    "yourself if the change means nothing",
                )
            if "arguments" not in tree:
                return function
            arguments = self._parts.build(tree["arguments"], allow)
            return functools.partial(function, *arguments, **self._parts.build(tree["keywords"], allow))

    def is_restorable(self, value: Any) -> bool:
        """Say no: a function is its code."""
        return False

    def restore(self, value: Any, tree: Any) -> None:
        """Refuse."""
        raise StateMismatchError("a function cannot become another", next="call the function of the run that saved")

    def encode(self, value: Any, raw: Any) -> Any:
        """Call the function; adds no batch dimension."""
        return as_tensors(value(raw))
