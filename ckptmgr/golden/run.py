"""From a raw input to what the model takes, and on to the prediction: plain trees of CPU tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptmgr.errors import UsageError
from ckptmgr.golden.quiet import quiet_evaluation
from ckptmgr.preprocess.kinds import find_kind
from ckptmgr.state.names import unwrapped_module
from ckptmgr.state.trees import copied_tree

__all__ = ["Chain"]

_UNUSUAL = (torch.float16, torch.bfloat16, torch.float64)


class Chain:
    """A preprocessor and a model, one after the other.

    Args:
        model: A module, wrapped or not, in any mode; or, with ``predict``, anything.
        preprocessor: What belongs to it; None where raw input is what the model takes.
        encode: ``encode(preprocessor, raw)``; by default what the preprocessor's kind does.
        predict: ``predict(model, inputs)``; by default the model is called.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Any = None,
        *,
        encode: Callable[[Any, Any], Any] | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        # DDP would send buffers around, and compiled code would be compiled once more for eval mode.
        self._model = unwrapped_module(model) if isinstance(model, nn.Module) else model
        self._preprocessor = preprocessor
        self._encode = encode
        self._predict = predict

    @property
    def device(self) -> str:
        """The kind of device that the model is on."""
        parameter = next(self._model.parameters(), None) if isinstance(self._model, nn.Module) else None
        return "cpu" if parameter is None else parameter.device.type

    def encoded(self, raw: Any) -> Any:
        """Preprocess one raw input. Leaves no trace in the preprocessor, nor in the raw input."""
        with quiet_evaluation(self._preprocessor):
            return to_plain(self._raw_to_inputs(copied_tree(raw)), "what preprocessing returned")

    def predicted(self, inputs: Any) -> Any:
        """Predict from what `encoded` returned. Leaves no trace in the model, nor in its inputs."""
        with quiet_evaluation(self._model):
            return to_plain(self._inputs_to_output(copied_tree(inputs)), "what the model returned")

    def __call__(self, raw: Any) -> Any:
        """Return the prediction for one raw input, where the model and the preprocessor are, as they are."""
        with torch.no_grad():
            return self._inputs_to_output(self._raw_to_inputs(raw))

    def _raw_to_inputs(self, raw: Any) -> Any:
        if self._encode is not None:
            return self._encode(self._preprocessor, raw)
        if self._preprocessor is not None:
            return find_kind(self._preprocessor).encode(self._preprocessor, raw)
        return _as_tensor(raw)

    def _inputs_to_output(self, inputs: Any) -> Any:
        inputs = _placed(inputs, self._model)
        if self._predict is not None:
            return self._predict(self._model, inputs)
        if isinstance(inputs, Mapping):
            return self._model(**inputs)
        return self._model(*inputs) if isinstance(inputs, tuple) else self._model(inputs)


def to_plain(value: Any, what: str) -> Any:
    """Return nested containers as dicts, tuples and lists, and tensors as copies on the CPU: whole ones, if sharded.

    Args:
        value: Tensors, arrays, plain values, and containers of them; also classes that are mappings or sequences.
        what: For the message.

    Raises:
        UsageError: It holds something else.
    """
    if isinstance(value, torch.Tensor):
        whole = getattr(value, "full_tensor", None)
        tensor = value if whole is None else whole()
        return tensor.detach().to("cpu", copy=True).to_dense().contiguous()
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "biufc" else np.array(value).tolist()
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, what) for key, item in value.items()}
    if isinstance(value, tuple):
        # A model takes a tuple as several arguments, and a list as one.
        return tuple(to_plain(item, what) for item in value)
    if isinstance(value, Sequence):
        return [to_plain(item, what) for item in value]
    raise UsageError(
        f"{what} holds a {type(value).__module__}.{type(value).__qualname__}",
        why="golden samples are tensors, plain values, and dicts, tuples and lists of them",
        next="give Golden(..., encode=...) or Golden(..., predict=...), which return these",
    )


def _as_tensor(raw: Any) -> Any:
    if isinstance(raw, (torch.Tensor, Mapping, tuple)):
        return raw
    try:
        tensor = torch.as_tensor(raw)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"a raw input is a {type(raw).__qualname__}, and nothing says how it becomes what the model takes",
            why="there is no preprocessor",
            next="give preprocessor=..., or Golden(samples, encode=lambda preprocessor, raw: ...)",
        ) from error
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _placed(value: Any, model: Any) -> Any:
    """Bring tensors to the model's device, and floating-point ones to its precision where that is not the usual one."""
    if not isinstance(model, nn.Module):
        return value
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return value

    def place(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            is_cast = item.is_floating_point() and parameter.dtype in _UNUSUAL
            return item.to(parameter.device, parameter.dtype if is_cast else item.dtype)
        if isinstance(item, Mapping):
            return {key: place(inner) for key, inner in item.items()}
        if isinstance(item, tuple):
            return tuple(place(inner) for inner in item)
        if isinstance(item, list):
            return [place(inner) for inner in item]
        return item

    return place(value)
