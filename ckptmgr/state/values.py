"""Plain containers, tensors and NumPy arrays, restored in place: whoever holds the object sees the restored values."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ckptmgr.state.differences import Differences, describe, tensor_difference
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.trees import copy_into

__all__ = ["ValuesHandler"]

_log = logging.getLogger("ckptmgr")


class ValuesHandler:
    """Captures dicts, lists, deques and sets of plain values, tensors and NumPy arrays; tensors and arrays also on
    their own.

    Restoring makes the container equal to the saved one: keys that the checkpoint lacks are removed. Tensors and arrays
    that are there already are written in place, on their device.
    """

    name = "values"
    version = 1

    def handles(self, value: object) -> bool:
        """Say whether the value is a container that can be changed in place, a tensor or an array."""
        return isinstance(value, (dict, list, deque, set, torch.Tensor)) or type(value) is np.ndarray

    def capture(self, value: Any, names: ParameterNames) -> Any:
        """Return the value itself."""
        return value

    def check(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Compare dtype and shape of tensors and arrays that are restored in place."""
        differences = Differences(
            "the plain state", next="create the tensors with the shape and dtype that they had in the run that saved"
        )
        _compare(value, tree, "", differences)
        differences.raise_if_any()

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Make the live value equal to the saved one."""
        if isinstance(value, dict) and (gone := [key for key in value if key not in tree]):
            listed = ", ".join(map(repr, gone[:8]))
            _log.warning("not in the checkpoint, and so removed from the restored dict: %s", listed)
        _merge(value, tree)

    def backup(self, value: Any, names: ParameterNames) -> Callable[[], None] | None:
        """Return None: a checked restore of plain values cannot fail."""
        return None


def _compare(live: Any, saved: Any, path: str, differences: Differences) -> None:
    where = path or "the value"
    if isinstance(live, (torch.Tensor, np.ndarray)):
        differences.add(tensor_difference(where, live, saved))
    elif path == "" and type(live) is not type(saved):
        differences.add(f"it is {describe(saved)} in the checkpoint, {describe(live)} now")
    elif isinstance(live, dict) and isinstance(saved, dict):
        for key in live.keys() & saved.keys():
            _compare(live[key], saved[key], f"{path}/{key}".lstrip("/"), differences)
    elif _is_sequence(live) and type(live) is type(saved) and len(live) == len(saved):
        for index, (item, other) in enumerate(zip(live, saved, strict=True)):
            _compare(item, other, f"{path}/{index}".lstrip("/"), differences)


def _merge(live: Any, saved: Any) -> Any:
    """Write the saved value into the live one where that can be, and return what should stand there."""
    if isinstance(live, (torch.Tensor, np.ndarray)):
        copy_into(live, saved)
        return live
    if type(live) is not type(saved):
        return saved
    if isinstance(live, dict):
        merged = {key: _merge(live[key], item) if key in live else item for key, item in saved.items()}
        live.clear()
        live.update(merged)
        return live
    if _is_sequence(live):
        items = [_merge(a, b) for a, b in zip(live, saved, strict=True)] if len(live) == len(saved) else list(saved)
        if type(live) is tuple:
            return tuple(items)
        live.clear()
        live.extend(items)
        return live
    if isinstance(live, set):
        live.clear()
        live.update(saved)
        return live
    return saved


def _is_sequence(value: object) -> bool:
    return type(value) in (list, tuple, deque)
