"""What a cast has done to values is measured against float64, element by element."""

from __future__ import annotations

import pytest
import torch

from ckptmgr.state import cast_loss
from ckptmgr.state.cast_loss import CastLoss, losses_in_words, measure_losses


def loss(values: torch.Tensor, dtype: torch.dtype) -> CastLoss:
    return measure_losses([("x", values, values.to(dtype))]).get("x", CastLoss())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float8_e5m2, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_a_wider_dtype_loses_nothing(before: torch.dtype, after: torch.dtype) -> None:
    assert not loss(torch.randn(100).to(before), after)


def test_values_that_both_dtypes_have_are_no_loss() -> None:
    assert not loss(torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("nan")]), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_rounding_overflow_and_underflow_are_told_apart(dtype: torch.dtype) -> None:
    rounded = torch.tensor([1.03, -3.3, 0.77])
    expected = ((rounded.to(dtype).double() - rounded.double()) / rounded.double()).abs().max().item()
    assert loss(rounded, dtype) == CastLoss(expected)
    beyond = torch.tensor([3.4e38, -3.4e38, 1e-44, -1e-44, 1e-45, 0.0, float("inf"), float("nan")])
    assert loss(beyond, dtype) == CastLoss(noverflown=2, nvanished=3)


def test_long_tensors_are_measured_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).view(10, 100).T
    whole = loss(values, torch.bfloat16)
    monkeypatch.setattr(cast_loss, "_CHUNK", 7)
    assert loss(values, torch.bfloat16) == whole


def test_the_words_name_the_worst_of_each_kind() -> None:
    losses = {"a": CastLoss(0.001), "b": CastLoss(0.003, noverflown=2), "c": CastLoss(nvanished=4)}
    assert losses_in_words(losses) == (
        "values were rounded by up to 0.003 of themselves (in b), 2 values became infinite or no number (most in b), "
        "4 values became zero (most in c)"
    )
    assert losses_in_words({}) == ""
