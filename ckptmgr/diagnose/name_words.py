"""Names of tensors taken apart: which part of the model, which of its layers, which of its tensors; and how akin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

__all__ = ["Split", "likeness", "split_name", "words_of"]

_LEAF = re.compile(r"(.+)_(weight|bias)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

# Words of which authors use several for one thing. To the left what is written, to the right what it is counted as.
_SAME = {
    "q": "query", "wq": "query", "k": "key", "wk": "key", "v": "value", "wv": "value", "wo": "output",
    "o": "output", "out": "output", "attn": "attention", "att": "attention", "mha": "attention",
    "ln": "norm", "layernorm": "norm", "rmsnorm": "norm", "bn": "norm", "batchnorm": "norm", "gn": "norm",
    "emb": "embedding", "embed": "embedding", "embeddings": "embedding", "embedder": "embedding",
    "wte": "token_embedding", "wpe": "position_embedding", "tok": "token", "word": "token", "pos": "position",
    "h": "layer", "layers": "layer", "blocks": "layer", "block": "layer", "resblocks": "layer",
    "fc": "linear", "dense": "linear", "lin": "linear", "proj": "linear", "projection": "linear",
    "enc": "encoder", "dec": "decoder", "mlp": "ffn", "feedforward": "ffn", "cls": "classifier",
    "conv1d": "conv", "conv2d": "conv", "downsample": "shortcut", "gamma": "weight", "beta": "bias",
    "kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var",
}  # fmt: skip
_LEAST = 3


class Split:
    """A tensor's name, taken apart.

    Attributes:
        skeleton: The parts of its module's name, with ``*`` for each number.
        numbers: What stands for the stars.
        leaf: What the module calls it: ``weight``; ``in_proj_weight`` is the ``weight`` of ``in_proj``.
        joint: What lies between module and leaf: ``.``, or ``_`` where they are one part of the name.
    """

    __slots__ = ("joint", "leaf", "numbers", "skeleton")

    def __init__(self, name: str) -> None:
        *module, leaf = name.split(".")
        self.joint = "."
        if found := _LEAF.fullmatch(leaf):
            module.append(found[1])
            leaf, self.joint = found[2], "_"
        self.leaf = leaf
        self.numbers = tuple(part for part in module if _is_number(part))
        self.skeleton = tuple("*" if _is_number(part) else part for part in module)


def split_name(name: str) -> Split:
    """Take a tensor's name apart."""
    return Split(name)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= 9


@lru_cache(maxsize=65536)
def words_of(part: str) -> tuple[str, ...]:
    """Return the words of one part of a name, such as those of ``queryProj_1``: ``query``, ``linear``, ``1``."""
    whole = _SAME.get(part.lower())
    found = (whole,) if whole else tuple(_SAME.get(word.lower(), word.lower()) for word in _WORD.findall(part))
    return tuple(word for counted in found for word in counted.split("_")) or (part.lower(),)


def likeness(one: Sequence[str], other: Sequence[str]) -> float:
    """Return how akin two names are, from 0 to 1: shared words, of which the last parts count most.

    Args:
        one: Its parts.
        other: Its parts.
    """
    first, second = _weighted(one), _weighted(other)
    total = sum(first.values()) + sum(second.values())
    if not total:
        return 1.0
    shared = 0.0
    rest: list[str] = []
    for word, weight in first.items():
        if word in second:
            shared += weight + second[word]
        else:
            rest.append(word)
    for word in rest:
        begun = next((it for it in second if it not in first and _is_begun(word, it)), None)
        if begun is not None:
            shared += 0.7 * min(first[word], second[begun]) * 2
    return min(1.0, shared / total)


def _weighted(parts: Iterable[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    weight = 1.0
    for part in reversed([part for part in parts if part != "*"]):
        for word in words_of(part):
            weights.setdefault(word, weight)
        weight *= 0.6
    return weights


def _is_begun(one: str, other: str) -> bool:
    return min(len(one), len(other)) >= _LEAST and (one.startswith(other) or other.startswith(one))
