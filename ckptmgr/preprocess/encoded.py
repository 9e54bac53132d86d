"""What a preprocessor gives, as what a model takes: tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import UsageError

__all__ = ["as_tensors", "batch_of_one", "cannot_encode"]


def as_tensors(value: Any) -> Any:
    """Turn NumPy arrays and numbers in a value into tensors, in dicts, lists and tuples too; adds no dimension.

    What is no number stays as it is.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # A copy: what a preprocessor keeps must not change with what the model does to its input.
        return torch.from_numpy(np.array(value, order="C", dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return torch.tensor(value.item(), dtype=torch.from_numpy(np.zeros(1, value.dtype)).dtype)
    if isinstance(value, dict):
        return {key: as_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_tensors(item) for item in value)
    return value


def batch_of_one(rows: Any) -> torch.Tensor:
    """Turn a table (dense, sparse, or a frame) into a float32 tensor of its shape."""
    if hasattr(rows, "toarray"):
        rows = rows.toarray()
    elif (pandas := sys.modules.get("pandas")) is not None and isinstance(rows, (pandas.DataFrame, pandas.Series)):
        rows = rows.to_numpy()
    array = np.asarray(rows)
    if array.dtype.kind not in "biuf":
        raise UsageError(
            f"the preprocessor gives values of the NumPy type {array.dtype}, which are no input of a model",
            next="pass encode=, a function of the preprocessor and the raw input that returns tensors",
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def cannot_encode(what: str, why: str) -> UsageError:
    """Return the error for a preprocessor that does not say by itself how it is used."""
    return UsageError(
        f"nothing says how {what} turns a raw input into what the model takes",
        why=why,
        next="pass encode=, a function of the preprocessor and the raw input that returns tensors",
    )
