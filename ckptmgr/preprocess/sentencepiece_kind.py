"""sentencepiece's processor: its serialized model, and the options that it was made with."""

from __future__ import annotations

from typing import Any

import torch

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.preprocess.class_names import class_name, is_a
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import library, reading_state
from ckptmgr.preprocess.reviewed import is_same_class
from ckptmgr.preprocess.stored_files import checked_file
from ckptmgr.state.stored_file import StoredFile

__all__ = ["SentencePieceKind"]

_FILE = "sentencepiece.model"
_OWN = "sentencepiece.SentencePieceProcessor"


class SentencePieceKind:
    """Processors.

    The tree is ``{"class": name, "file": StoredFile("sentencepiece.model"), "options": {name: plain value}}``.
    """

    name = "sentencepiece"
    version = 1
    changes_in_training = False

    def handles(self, value: object) -> bool:
        """Say whether it is a processor of that library."""
        return is_a(value, "sentencepiece", "SentencePieceProcessor")

    def capture(self, value: Any) -> dict[str, Any]:
        """Return the model's bytes and the options."""
        content = bytes(value.serialized_model_proto())
        return {"class": class_name(value), "file": StoredFile(_FILE, content), "options": _options(value)}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make a processor of the bytes."""
        with reading_state(self.name):
            cls = library("sentencepiece", extra="ckptmgr[sentencepiece]").SentencePieceProcessor
            if tree["class"] not in (_OWN, f"{cls.__module__}.{cls.__qualname__}"):
                cls = allow(tree["class"])
            processor = cls()
            _load(processor, tree)
            return processor

    def is_restorable(self, value: Any) -> bool:
        """Say yes: a processor takes another model in place."""
        return True

    def restore(self, value: Any, tree: Any) -> None:
        """Load the model into the live processor."""
        if not is_same_class(value, tree["class"]):
            raise StateMismatchError(
                f"the preprocessor of the checkpoint is a {tree['class']}, the live one a {class_name(value)}",
                next="make the processor as in the run that saved",
            )
        with reading_state(self.name):
            _load(value, tree)

    def encode(self, value: Any, raw: Any) -> torch.Tensor:
        """Return the ids of a text as int64 ``[1, L]``."""
        if not isinstance(raw, str):
            raise UsageError(
                f"a sentencepiece processor takes a text, and got a {type(raw).__name__}",
                next="pass the text itself, or pass encode=, a function of the preprocessor and the raw input",
            )
        return torch.tensor([value.encode(raw, out_type=int)], dtype=torch.int64)


def _options(processor: Any) -> dict[str, Any]:
    """Return the processor's own plain attributes; the type that it returns belongs to its caller."""
    return {
        name: value
        for name, value in sorted(vars(processor).items())
        if type(value) in (bool, int, float, str) and name.startswith("_")
    }


def _load(processor: Any, tree: Any) -> None:
    content, options = checked_file(tree["file"], name=_FILE).content, tree["options"]
    known = _options(processor)
    for name, value in options.items():
        if name not in known or type(value) is not type(known[name]):
            raise ValueError(f"{name!r} is no option of a sentencepiece processor of this version")
    # An empty model is what a processor has before it loads one, and is refused by the loader.
    if content:
        processor.LoadFromSerializedProto(content)
    for name, value in options.items():
        setattr(processor, name, value)
