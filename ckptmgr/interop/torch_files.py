"""Files of ``torch.save`` that anybody can load with ``weights_only=True``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.format.tree import format_path

__all__ = ["save_restricted"]

# What torch's restricted loader makes without being told to.
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, torch.Tensor, torch.dtype, torch.device)


def save_restricted(value: Any, file: BinaryIO) -> None:
    """Write a value with ``torch.save``.

    Raises:
        UnsupportedStateError: The restricted loader would refuse something in it. Names its place and type.
        OSError: The file cannot be written.
    """
    _refuse_objects(value, ())
    writer = _Writer(file)
    torch.save(value, writer)  # type: ignore[arg-type]
    if writer.error is not None:
        raise writer.error


def _refuse_objects(value: Any, path: tuple[object, ...]) -> None:
    if value is None or isinstance(value, _PLAIN):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_objects(key, (*path, "a key"))
            _refuse_objects(item, (*path, key))
        return
    if isinstance(value, list | tuple | set):
        for index, item in enumerate(value):
            _refuse_objects(item, (*path, index))
        return
    raise UnsupportedStateError(
        f"{format_path(path)} is a {type(value).__module__}.{type(value).__qualname__}",
        why="torch.load(weights_only=True) takes tensors and plain values only",
        next="export the weights alone: --format safetensors, or --format state-dict",
    )


class _Writer(io.RawIOBase):
    """Keeps the first error of a file: torch would say something of its own archive instead."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""
