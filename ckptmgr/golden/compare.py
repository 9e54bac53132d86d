"""Golden samples made again, and the first place where they are not what they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from ckptmgr.errors import GoldenMismatchError
from ckptmgr.golden.run import Chain

__all__ = ["GoldenDifference", "compare_golden", "refuse_differences"]

Tolerance: TypeAlias = Callable[[torch.dtype], tuple[float, float]]
"""From a dtype to the relative tolerance and the absolute one, of elements of that dtype."""

_STAGES = {"preprocessing": "what preprocessing makes of it", "model": "what the model makes of it"}
# The defaults of torch.testing.assert_close.
_SAME_DEVICE = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
# Kernels of another device add in another order.
_ACROSS_DEVICES = {torch.float32: 1e-3, torch.float64: 1e-6, torch.complex64: 1e-3, torch.complex128: 1e-6}
_REDUCED = 2e-2


@dataclass(frozen=True, slots=True)
class GoldenDifference:
    """One golden sample that is not what it was.

    Attributes:
        index: Of the sample, from 0.
        stage: Where it first differs: in what preprocessing makes of it, or in what the model makes of that.
        what: The place and the values, in words.
        raw: The raw input.
    """

    index: int
    stage: Literal["preprocessing", "model"]
    what: str
    raw: Any


def compare_golden(tree: Mapping[str, Any], chain: Chain) -> list[GoldenDifference]:
    """Make every golden sample of a checkpoint again, and compare.

    Preprocessing is compared with what it gave then. The model is given what preprocessing gave *then*, so that a
    difference in the one is not taken for one in the other.

    Args:
        tree: What `record.capture_golden` stored.
        chain: Preprocessor and model as they are now.

    Returns:
        For each sample that differs, the first difference of its first differing stage.
    """
    found: list[GoldenDifference] = []
    of_model = _tolerance(tree["rtol"], tree["atol"], is_elsewhere=chain.device != tree["device"])
    for index, sample in enumerate(tree["samples"]):
        raw, inputs = sample["raw"], sample["inputs"]
        stages: tuple[tuple[Literal["preprocessing", "model"], Callable[[Any], Any], Any, Any, Tolerance], ...] = (
            ("preprocessing", chain.encoded, raw, inputs, _tight),
            ("model", chain.predicted, inputs, sample["output"], of_model),
        )
        for stage, run, given, then, tolerance in stages:
            what = _attempt(run, given, then, tolerance)
            if what is not None:
                found.append(GoldenDifference(index, stage, what, raw))
                break
    return found


def refuse_differences(differences: list[GoldenDifference], *, reference: str, nsamples: int) -> None:
    """Raise if a golden sample is not what it was.

    Raises:
        GoldenMismatchError: Names the first one, its stage, its place and the values.
    """
    if not differences:
        return
    first = differences[0]
    advice = (
        "preprocess as the run that saved did: load_inference without preprocessor= gives the one of the checkpoint"
        if first.stage == "preprocessing"
        else "the weights are those of the checkpoint, so the code of the model has changed: "
        "`ckptmgr show` names the commit that it was trained with"
    )
    raise GoldenMismatchError(
        f"golden sample {first.index} of {reference} no longer gives what it gave, in {_STAGES[first.stage]}",
        why=f"{first.what}; raw input {_short(first.raw)}"
        + (f"; {len(differences)} of {nsamples} samples differ" if nsamples > 1 else ""),
        next=f"{advice}; golden=False loads without this proof",
    )


def _attempt(run: Callable[[Any], Any], given: Any, then: Any, tolerance: Tolerance) -> str | None:
    try:
        now = run(given)
    except Exception as error:
        return f"it raises {type(error).__name__} now: {error}"
    return _difference(then, now, "", tolerance)


def _tolerance(rtol: float | None, atol: float | None, *, is_elsewhere: bool) -> Tolerance:
    def tolerance(dtype: torch.dtype) -> tuple[float, float]:
        if not (dtype.is_floating_point or dtype.is_complex):
            return 0.0, 0.0
        tight = _tight(dtype)
        loose = _ACROSS_DEVICES.get(dtype, _REDUCED) if is_elsewhere else 0.0
        return (
            max(tight[0], loose) if rtol is None else rtol,
            max(tight[1], loose) if atol is None else atol,
        )

    return tolerance


def _tight(dtype: torch.dtype) -> tuple[float, float]:
    return _SAME_DEVICE.get(dtype, (0.0, 0.0))


def _difference(then: Any, now: Any, place: str, tolerance: Tolerance) -> str | None:
    where = place or "the value"
    if isinstance(then, torch.Tensor) and isinstance(now, torch.Tensor):
        return _tensor_difference(then, now, where, tolerance)
    if isinstance(then, dict) and isinstance(now, dict):
        if then.keys() != now.keys():
            return f"{where} had the keys {', '.join(sorted(then))} then, {', '.join(sorted(now))} now"
        return next(
            (w for key in then if (w := _difference(then[key], now[key], f"{place}[{key!r}]", tolerance))), None
        )
    # Earlier versions wrote tuples as lists.
    if isinstance(then, (list, tuple)) and isinstance(now, (list, tuple)):
        if len(then) != len(now):
            return f"{where} had {len(then)} items then, {len(now)} now"
        pairs = enumerate(zip(then, now, strict=True))
        return next((w for i, (a, b) in pairs if (w := _difference(a, b, f"{place}[{i}]", tolerance))), None)
    if isinstance(then, float) and isinstance(now, float):
        return _tensor_difference(
            torch.tensor(then, dtype=torch.float64), torch.tensor(now, dtype=torch.float64), where, tolerance
        )
    if type(then) is not type(now) or then != now:
        return f"{where} was {_short(then)} then, {_short(now)} now"
    return None


def _tensor_difference(then: torch.Tensor, now: torch.Tensor, where: str, tolerance: Tolerance) -> str | None:
    if then.shape != now.shape or then.dtype != now.dtype:
        return f"{where} was {_kind(then)} then, {_kind(now)} now"
    rtol, atol = tolerance(then.dtype)
    wide = torch.complex128 if then.is_complex() else torch.float64 if then.is_floating_point() else then.dtype
    one, other = then.to(wide), now.to(wide)
    close = torch.isclose(other, one, rtol=rtol, atol=atol, equal_nan=True) if rtol or atol else one == other
    if not (rtol or atol) and (one.is_floating_point() or one.is_complex()):
        close |= torch.isnan(one) & torch.isnan(other)
    if bool(close.all()):
        return None
    nwrong = int((~close).sum())
    index = [int(i) for i in (~close).nonzero()[0]]
    element = f"{where}{index if index else ''}"
    values = f"{element} was {one[tuple(index)].item()!r} then, {other[tuple(index)].item()!r} now"
    limits = f", beyond rtol={rtol:g}, atol={atol:g}" if rtol or atol else ""
    return values + limits + (f"; {nwrong} of {close.numel()} elements differ" if close.numel() > 1 else "")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, torch.Tensor) else _kind(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
