"""What the golden run of version 3 has besides: a tokenizer, and samples of what it and the model make of text.

Never change it: the committed files were written from it.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

SAMPLES = ["to be or not", "To Be"]


def tokenizer() -> Tokenizer:
    words = ["[UNK]", "to", "be", "or", "not"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def predict(model: nn.Module, ids: Any) -> torch.Tensor:
    """Multiply small integers and eighths: exact, whatever the kernels."""
    one_hot = torch.zeros(3)
    one_hot[ids.flatten() % 3] = 1.0
    out: torch.Tensor = model.last(model.first(one_hot))
    return out
