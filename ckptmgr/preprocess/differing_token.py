"""The first raw sample that two preprocessors turn into different tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptmgr.preprocess.class_names import is_a
from ckptmgr.preprocess.kinds import find_kind

__all__ = ["DifferingToken", "first_differing_token"]

_MAX_SAMPLE = 80


@dataclass(frozen=True, slots=True)
class DifferingToken:
    """Where two preprocessors part.

    Attributes:
        sample_index: Which of the samples, from 0.
        sample: The raw input.
        position: Which token of it, from 0; for a tensor the flat index of the element.
        saved: Text and id of the token by the checkpoint's preprocessor; the text is None where ids have none, the id
            is None where it gives fewer tokens.
        live: The same by the live one.
    """

    sample_index: int
    sample: Any
    position: int
    saved: tuple[str | None, int | float | None]
    live: tuple[str | None, int | float | None]

    def __str__(self) -> str:
        sample = repr(self.sample)
        sample = sample if len(sample) <= _MAX_SAMPLE else f"{sample[:_MAX_SAMPLE]}…"
        return (
            f"sample {self.sample_index}, {sample}: token {self.position} is {_said(self.saved)} in the checkpoint, "
            f"{_said(self.live)} now"
        )


def first_differing_token(saved_value: Any, live_value: Any, samples: Sequence[Any]) -> DifferingToken | None:
    """Encode samples with both preprocessors, and return the first token that differs.

    Args:
        saved_value: The preprocessor of the checkpoint, built.
        live_value: The live one.
        samples: Raw inputs.

    Returns:
        None if all samples are encoded alike.

    Raises:
        UsageError: One of them does not know how to encode a sample.
    """
    saved_kind, live_kind = find_kind(saved_value), find_kind(live_value)
    for index, sample in enumerate(samples):
        saved = _numbers(saved_kind.encode(saved_value, sample))
        live = _numbers(live_kind.encode(live_value, sample))
        for position in range(max(len(saved), len(live))):
            one = saved[position] if position < len(saved) else None
            other = live[position] if position < len(live) else None
            if one != other and not (one != one and other != other):
                texts = _text(saved_value, one), _text(live_value, other)
                return DifferingToken(index, sample, position, (texts[0], one), (texts[1], other))
    return None


def _numbers(encoded: Any) -> list[Any]:
    if isinstance(encoded, dict):
        encoded = encoded.get("input_ids", next(iter(encoded.values()), torch.empty(0)))
    if isinstance(encoded, (list, tuple)):
        return [number for item in encoded for number in _numbers(item)]
    return encoded.reshape(-1).tolist() if isinstance(encoded, torch.Tensor) else [encoded]


def _text(value: Any, number: Any) -> str | None:
    if type(number) is not int:
        return None
    text: Any = None
    if is_a(value, "tokenizers", "Tokenizer"):
        text = value.id_to_token(number)
    elif is_a(value, "sentencepiece", "SentencePieceProcessor"):
        text = value.id_to_piece(number) if 0 <= number < value.get_piece_size() else None
    elif is_a(value, "transformers", "PreTrainedTokenizerBase"):
        text = value.convert_ids_to_tokens(number)
    elif isinstance(value, dict):
        text = next((token for token, own in value.items() if own == number), None)
    elif isinstance(value, (list, tuple)) and 0 <= number < len(value):
        text = value[number]
    return text if isinstance(text, str) else None


def _said(token: tuple[str | None, int | float | None]) -> str:
    text, number = token
    if number is None:
        return "missing"
    return f"{number}" if text is None else f"{text!r} (id {number})"
