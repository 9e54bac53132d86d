"""What the user gives as ``golden=``: raw inputs, and how they become predictions where that is not obvious."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

from ckptmgr.errors import UsageError
from ckptmgr.state.sources import module_of

__all__ = ["MAX_SAMPLES", "Golden", "as_golden", "described_function"]

MAX_SAMPLES = 64


class Golden:
    """A few raw inputs whose predictions are kept with each checkpoint.

    At a save each is preprocessed and given to the model, in eval mode, without gradients and with random numbers that
    are the same each time. Raw input, what preprocessing made of it, and the prediction are stored. Whoever loads the
    checkpoint can do the same again and compare.

    Args:
        samples: Raw inputs, as users of the model will have them: text, plain values, arrays, tensors. 1 to 64.
        encode: ``encode(preprocessor, raw)`` returns what the model takes. By default what the kind of the preprocessor
            does: a tokenizer encodes, an estimator transforms, a callable is called.
        predict: ``predict(model, inputs)`` returns the prediction: a tensor, or dicts, tuples and lists of tensors and
            plain values. By default the model is called: with keywords if ``inputs`` is a dict, with several arguments
            if it is a tuple, else with the one argument.
        rtol: Relative tolerance of predictions; by default that of their dtype.
        atol: Absolute tolerance of predictions, in their units; by default that of their dtype.

    Raises:
        UsageError: There are no samples, or too many, or a tolerance is negative.
    """

    def __init__(
        self,
        samples: Iterable[Any],
        *,
        encode: Callable[[Any, Any], Any] | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        if isinstance(samples, (str, bytes, Mapping)) or not isinstance(samples, Iterable):
            raise UsageError(
                f"golden samples are given as {type(samples).__name__}",
                why="they are a list of raw inputs, even if there is only one",
                next="golden=[raw, ...]",
            )
        self.samples = list(samples)
        if not 1 <= len(self.samples) <= MAX_SAMPLES:
            raise UsageError(
                f"{len(self.samples)} golden samples",
                why=f"they are run at every save, so there are 1 to {MAX_SAMPLES} of them",
                next="choose a few that show what the model is for",
            )
        for name, function in (("encode", encode), ("predict", predict)):
            if function is not None and not callable(function):
                raise UsageError(f"Golden({name}={function!r}) is no function")
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
                raise UsageError(f"Golden({name}={tolerance!r})", why="a tolerance is a number from 0 on")
        self.encode, self.predict, self.rtol, self.atol = encode, predict, rtol, atol


def as_golden(value: Golden | Iterable[Any] | None) -> Golden | None:
    """Return what the argument ``golden`` of a manager means: samples alone need no `Golden` around them.

    Raises:
        UsageError: It means nothing.
    """
    return value if value is None or isinstance(value, Golden) else Golden(value)


def described_function(function: Callable[..., Any] | None) -> dict[str, str | None] | None:
    """Return where a function comes from, and a digest of its source; it is never imported by it without being asked.

    Returns:
        ``name``: ``module:qualified name``. ``source``: SHA-256 of its source text, 32 hex digits; None where there is
        none to be had.
    """
    if function is None:
        return None
    inner = inspect.unwrap(function)
    while isinstance(inner, partial) and not inner.args and not inner.keywords:
        # As `_partial_: true` of a configuration makes it.
        inner = inspect.unwrap(inner.func)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    # What a partial does, its function says.
    sourced = inspect.unwrap(inner.func) if isinstance(inner, partial) else named
    try:
        source = sha256(inspect.getsource(sourced).encode()).hexdigest()[:32]
    except (OSError, TypeError):
        source = None
    return {"name": f"{module_of(named)}:{named.__qualname__}", "source": source}
