"""Vocabularies and statistics as plain containers: dicts, lists, sets, counters, arrays and tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.preprocess.encoded import cannot_encode
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.parts import Parts, has_parts
from ckptmgr.preprocess.reading import reading_state
from ckptmgr.state.trees import copied_tree

__all__ = ["ValuesKind", "is_vocabulary"]

_CONTAINERS = (dict, OrderedDict, Counter, defaultdict, list, tuple, set, frozenset, deque)


class ValuesKind:
    """Containers of plain values, of arrays, and of other preprocessors. The tree is the value itself.

    A vocabulary (a dict of token to id, or a list of tokens) encodes a list of tokens; a token that it lacks is an
    error, never a silent replacement.

    Args:
        unknown: An entry of the vocabulary that stands for tokens that it lacks. Register such a kind with
            `kinds.register_kind`; it then handles the vocabularies that have this entry.
    """

    version = 1
    changes_in_training = False

    def __init__(self, parts: Parts, *, unknown: str | None = None) -> None:
        self.name = "values" if unknown is None else "values-with-unknown"
        self._parts = parts
        self._unknown = unknown

    def handles(self, value: object) -> bool:
        """Say whether it is a container, an array or a tensor."""
        if self._unknown is not None:
            return type(value) in (dict, OrderedDict, list, tuple) and self._unknown in value  # type: ignore[operator]
        return type(value) in _CONTAINERS or isinstance(value, (np.ndarray, torch.Tensor))

    def capture(self, value: Any) -> Any:
        """Return the value, with what is no plain value in it captured too."""
        return self._parts.capture(value, "preprocessor")

    def build(self, tree: Any, allow: Allow) -> Any:
        """Return a copy of the value."""
        with reading_state(self.name):
            return self._parts.build(copied_tree(tree), allow)

    def is_restorable(self, value: Any) -> bool:
        """Say whether the container can change."""
        return type(value) in (dict, OrderedDict, Counter, defaultdict, list, set, deque)

    def restore(self, value: Any, tree: Any) -> None:
        """Make the container equal to the saved one.

        Raises:
            StateMismatchError: It is of another type, cannot change, or the saved one holds objects.
        """
        if not self.is_restorable(value) or type(value) is not type(tree) or has_parts(tree):
            raise StateMismatchError(
                f"a {type(value).__name__} cannot become the saved {type(tree).__name__} in place",
                next="use the preprocessor of the checkpoint: ckptmgr.load_inference(...).preprocessor",
            )
        saved = copied_tree(tree)
        value.clear()
        if isinstance(value, dict):
            for key, item in saved.items():
                value[key] = item
        elif isinstance(value, set):
            value.update(saved)
        else:
            value.extend(saved)

    def encode(self, value: Any, raw: Any) -> torch.Tensor:
        """Return the ids of a list of tokens as int64 ``[1, L]``.

        Raises:
            UsageError: The value is no vocabulary, the input no list of tokens, or a token is not in the vocabulary.
        """
        if not is_vocabulary(value):
            raise cannot_encode(f"a {type(value).__name__} of values", "it is no vocabulary, but numbers and settings")
        if not isinstance(raw, (list, tuple)) or not all(isinstance(token, str) for token in raw):
            raise cannot_encode(
                "a vocabulary", f"it has ids for tokens, and got a {type(raw).__name__} that is not yet split into them"
            )
        ids = value if isinstance(value, Mapping) else {token: index for index, token in enumerate(value)}
        unknown = [token for token in raw if token not in ids]
        if unknown and self._unknown is None:
            listed = ", ".join(map(repr, dict.fromkeys(unknown[:5])))
            raise UsageError(
                f"the vocabulary has no token {listed}",
                why=f"it holds {len(ids)} tokens; replacing a token without being told gives wrong predictions",
                next="split and normalise the text as in training, or register "
                "ValuesKind(..., unknown='<unk>') to say which entry stands for unknown tokens",
            )
        return torch.tensor([[ids.get(token, ids.get(self._unknown)) for token in raw]], dtype=torch.int64)


def is_vocabulary(value: Any) -> bool:
    """Say whether it maps tokens to ids: a dict of text to number, or a list of different texts."""
    # A counter maps tokens to numbers too, but they are no ids.
    if isinstance(value, dict) and not isinstance(value, Counter):
        return bool(value) and all(type(key) is str and type(item) is int for key, item in value.items())
    is_list = type(value) in (list, tuple) and bool(value)
    return is_list and all(type(token) is str for token in value) and len(set(value)) == len(value)
