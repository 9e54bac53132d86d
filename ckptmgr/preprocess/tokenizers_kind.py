"""Hugging Face's ``tokenizers.Tokenizer``: its own ``tokenizer.json``."""

from __future__ import annotations

from typing import Any

import torch

from ckptmgr.errors import UnsupportedStateError, UsageError
from ckptmgr.preprocess.class_names import is_a
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import library, reading_state
from ckptmgr.preprocess.stored_files import checked_file
from ckptmgr.state.stored_file import StoredFile

__all__ = ["TokenizersKind"]

_FILE = "tokenizer.json"


class TokenizersKind:
    """Tokenizers with everything that belongs to them: normalizer, vocabulary, merges, truncation, padding.

    The tree is ``{"file": StoredFile("tokenizer.json"), "encode_special_tokens": bool}``.
    """

    name = "tokenizers"
    version = 1
    changes_in_training = False

    def handles(self, value: object) -> bool:
        """Say whether it is a tokenizer of that library."""
        return is_a(value, "tokenizers", "Tokenizer")

    def capture(self, value: Any) -> dict[str, Any]:
        """Return the tokenizer's JSON."""
        try:
            text = value.to_str()
        except Exception as error:
            raise UnsupportedStateError(
                "the tokenizer cannot be stored",
                why=f"{error}; a part that was written in Python has no stored form",
                next="build it from the library's own normalizers, pre-tokenizers and decoders",
            ) from error
        settings = {"encode_special_tokens": bool(getattr(value, "encode_special_tokens", False))}
        return {"file": StoredFile(_FILE, text.encode()), **settings}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make the tokenizer of the JSON."""
        with reading_state(self.name):
            text = checked_file(tree["file"], name=_FILE).content.decode()
            tokenizer = library("tokenizers", extra="ckptmgr[tokenizers]").Tokenizer.from_str(text)
            _set_special(tokenizer, tree)
            return tokenizer

    def is_restorable(self, value: Any) -> bool:
        """Say yes: a tokenizer takes another's JSON in place."""
        return True

    def restore(self, value: Any, tree: Any) -> None:
        """Put the JSON into the live tokenizer; whoever holds it sees the restored one."""
        with reading_state(self.name):
            value.__setstate__(checked_file(tree["file"], name=_FILE).content)
            _set_special(value, tree)

    def encode(self, value: Any, raw: Any) -> torch.Tensor:
        """Return the ids of a text, or of a pair of texts, as int64 ``[1, L]``."""
        if isinstance(raw, str):
            ids = value.encode(raw).ids
        elif isinstance(raw, (tuple, list)) and len(raw) == 2 and all(isinstance(text, str) for text in raw):
            ids = value.encode(*raw).ids
        else:
            raise UsageError(
                f"a tokenizer takes a text or a pair of texts, and got a {type(raw).__name__}",
                next="pass the text itself, or pass encode=, a function of the preprocessor and the raw input",
            )
        return torch.tensor([ids], dtype=torch.int64)


def _set_special(tokenizer: Any, tree: Any) -> None:
    wanted = tree["encode_special_tokens"]
    if type(wanted) is not bool:
        raise ValueError("encode_special_tokens is no truth value")
    if getattr(tokenizer, "encode_special_tokens", False) != wanted:
        tokenizer.encode_special_tokens = wanted
