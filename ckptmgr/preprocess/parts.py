"""Values that hold other preprocessors: enums, classes, functions and nested objects, inside of plain containers.

In a tree each of them is a dict with one key that starts with ``ckptmgr:``. Everything else stays as it is.
"""

from __future__ import annotations

import datetime
import enum
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.format.tree import MAX_DEPTH
from ckptmgr.preprocess.class_names import class_name, object_name
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reviewed import resolve_class
from ckptmgr.state.stored_file import StoredFile

__all__ = ["Parts", "has_parts"]

_MARK = "ckptmgr:"
_PART, _ENUM, _TYPE, _PAIRS = "ckptmgr:part", "ckptmgr:enum", "ckptmgr:type", "ckptmgr:pairs"
_LEAVES = (
    bool, int, float, complex, str, bytes, bytearray, type(None), range, slice, torch.dtype, torch.Size, torch.device,
    datetime.date, datetime.time, datetime.timedelta, pathlib.PurePath, np.generic, StoredFile,
)  # fmt: skip


class Parts:
    """Captures and builds what stands inside of another preprocessor.

    Args:
        capture: Captures a nested preprocessor: `kinds.capture_preprocessor`.
        build: Builds one: `kinds.build_preprocessor`.
    """

    def __init__(self, capture: Callable[[Any], Any], build: Callable[[Any, Allow], Any]) -> None:
        self._capture = capture
        self._build = build

    def capture(self, value: Any, where: str) -> Any:
        """Return a value as a tree.

        Args:
            value: Plain values, containers of them, and preprocessors.
            where: Where it stands, for messages.

        Raises:
            UnsupportedStateError: Something in it has no stored form. Names where.
        """
        return self._captured(value, where, 0)

    def build(self, tree: Any, allow: Allow) -> Any:
        """Return the value that a tree stands for.

        Raises:
            CorruptCheckpointError: It does not follow the form.
            NotAllowedError: It names code that nobody allows.
        """
        kind = type(tree)
        if kind in (list, tuple):
            return kind(self.build(item, allow) for item in tree)
        if kind not in (dict, OrderedDict):
            return tree
        if len(tree) == 1 and isinstance(mark := next(iter(tree)), str) and mark.startswith(_MARK):
            return self._built(mark, tree[mark], allow)
        return kind((key, self.build(item, allow)) for key, item in tree.items())

    def _captured(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnsupportedStateError(
                f"{where} is nested deeper than {MAX_DEPTH} levels",
                why="no honest preprocessor is; a container that holds itself would never end",
                next="store references by name instead of the objects themselves",
            )
        kind = type(value)
        if isinstance(value, enum.Enum):
            return {_ENUM: [object_name(kind), value.name]}
        if kind in (set, frozenset, Counter, defaultdict, deque) or isinstance(
            value, (*_LEAVES, torch.Tensor, np.ndarray)
        ):
            return value
        if kind in (list, tuple):
            return kind(self._captured(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value))
        if kind in (dict, OrderedDict):
            return self._dict(value, where, depth)
        if isinstance(value, type):
            return {_TYPE: object_name(value)}
        try:
            return {_PART: self._capture(value)}
        except UnsupportedStateError as error:
            raise UnsupportedStateError(
                f"{where} is a {class_name(value)}, which cannot be stored: {error.what}",
                why=error.why,
                next=error.next,
            ) from error

    def _dict(self, value: Any, where: str, depth: int) -> Any:
        if any(isinstance(key, type) for key in value):
            pairs = [
                [self._captured(k, where, depth + 1), self._captured(v, where, depth + 1)] for k, v in value.items()
            ]
            return {_PAIRS: pairs}
        if any(isinstance(key, str) and key.startswith(_MARK) for key in value):
            raise UnsupportedStateError(
                f"{where} has a key that starts with {_MARK!r}",
                why="such keys mark what is no plain value",
                next="rename the key",
            )
        kind = type(value)
        return kind((key, self._captured(item, f"{where}.{key}", depth + 1)) for key, item in value.items())

    def _built(self, mark: str, content: Any, allow: Allow) -> Any:
        if mark == _PART:
            return self._build(content, allow)
        if mark == _TYPE:
            return resolve_class(content, allow)
        if mark == _PAIRS:
            return {self.build(key, allow): self.build(item, allow) for key, item in content}
        if mark == _ENUM:
            name, member = content
            cls = resolve_class(name, allow)
            if not issubclass(cls, enum.Enum):
                raise ValueError(f"{name} is no enum")
            return cls[member]
        raise CorruptCheckpointError(
            f"the preprocessor of the checkpoint holds {mark!r}, which this version does not know",
            next="load it with the version of ckptmgr that the run used",
        )


def has_parts(tree: Any) -> bool:
    """Say whether a captured tree holds anything but plain containers and values."""
    if isinstance(tree, dict):
        return any((isinstance(key, str) and key.startswith(_MARK)) or has_parts(item) for key, item in tree.items())
    return isinstance(tree, (list, tuple)) and any(map(has_parts, tree))
