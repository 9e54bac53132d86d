"""Tokenizers, image processors, feature extractors and processors of transformers: the files of ``save_pretrained``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ckptmgr.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.preprocess.class_names import class_name, is_a
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import reading_state
from ckptmgr.preprocess.reviewed import is_same_class, resolve_class
from ckptmgr.preprocess.stored_files import checked_file, files_of_directory, write_files
from ckptmgr.state.stored_file import StoredFile

__all__ = ["TransformersKind"]

_TOKENIZER = "PreTrainedTokenizerBase"
_OTHERS = (
    "ProcessorMixin",
    "FeatureExtractionMixin",
    "ImageProcessingMixin",
    "BaseImageProcessor",
    "PreTrainedFeatureExtractor",
)
# Attributes that a program may set, and that not every release writes into the files.
_SETTINGS = ("model_max_length", "padding_side", "truncation_side")
_CODE = "auto_map"
# Where something was loaded from, with which code, or by which release it was written, is no part of what it does.
_NO_STATE = frozenset(
    {"name_or_path", "_name_or_path", "is_local", "local_files_only", "transformers_version", "_commit_hash", _CODE}
)


class TransformersKind:
    """What ``save_pretrained`` writes for a tokenizer, fast or slow, and for processors of images, audio or several.

    The tree is ``{"class": name, "files": {name: StoredFile}, "settings": {name: plain value}}``.
    """

    name = "transformers"
    version = 1
    changes_in_training = False

    def handles(self, value: object) -> bool:
        """Say whether it is one of them."""
        return is_a(value, "transformers", _TOKENIZER, *_OTHERS)

    def capture(self, value: Any) -> dict[str, Any]:
        """Save it into a temporary directory, and return the files."""
        with tempfile.TemporaryDirectory(prefix="ckptmgr-") as place:
            try:
                if is_a(value, "transformers", _TOKENIZER):
                    value.save_pretrained(place, save_jinja_files=False)
                else:
                    value.save_pretrained(place)
            except Exception as error:
                raise UnsupportedStateError(
                    f"the {class_name(value)} cannot be stored",
                    why=f"its save_pretrained failed: {type(error).__name__}: {error}",
                    next="make sure that save_pretrained works, or register a kind of your own",
                ) from error
            files = files_of_directory(Path(place))
        settings = {name: getattr(value, name) for name in _SETTINGS if hasattr(value, name)}
        return {
            "class": class_name(value),
            "files": {file.name: _lasting(file) for file in files},
            "settings": {name: item for name, item in settings.items() if type(item) in (int, str)},
        }

    def build(self, tree: Any, allow: Allow) -> Any:
        """Load the files with the recorded class; from local files only, and never with code that comes with them."""
        with reading_state(self.name):
            files = tree["files"]
            for name, file in files.items():
                _refuse_places(checked_file(file, name=name))
            cls = resolve_class(tree["class"], allow)
            if not self.handles_class(cls):
                raise CorruptCheckpointError(
                    f"the preprocessor of the checkpoint is recorded as a {tree['class']}, which is none",
                    next="the checkpoint was altered; do not load it",
                )
            with tempfile.TemporaryDirectory(prefix="ckptmgr-") as place:
                write_files(files.values(), Path(place))
                value = cls.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            _forget_place(value)
            for name, setting in tree["settings"].items():
                if name not in _SETTINGS or type(setting) not in (int, str):
                    raise ValueError(f"{name!r} is no setting of a tokenizer")
                setattr(value, name, setting)
            return value

    def handles_class(self, cls: type[Any]) -> bool:
        """Say whether objects of a class are of this kind."""
        return any(
            base.__name__ in (_TOKENIZER, *_OTHERS) and base.__module__.startswith("transformers.")
            for base in cls.__mro__
        )

    def is_restorable(self, value: Any) -> bool:
        """Say yes: what it does lies in its attributes."""
        return True

    def restore(self, value: Any, tree: Any) -> None:
        """Give the live object the attributes of the saved one.

        Raises:
            StateMismatchError: The saved one is of another class.
        """
        if not is_same_class(value, tree["class"]):
            raise StateMismatchError(
                f"the preprocessor of the checkpoint is a {tree['class']}, the live one a {class_name(value)}",
                next="load the same kind of tokenizer or processor as in the run that saved",
            )
        saved = self.build(tree, lambda name: type(value))
        vars(value).clear()
        vars(value).update(vars(saved))

    def encode(self, value: Any, raw: Any) -> dict[str, Any]:
        """Call it on one raw input; returns a dict of tensors with a batch of one.

        A processor of several inputs takes a dict of its arguments, such as ``{"text": ..., "images": ...}``.
        """
        if is_a(value, "transformers", _TOKENIZER) and not _is_text(raw):
            raise UsageError(
                f"a tokenizer takes a text or a pair of texts, and got a {type(raw).__name__}",
                next="pass the text itself, or pass encode=, a function of the preprocessor and the raw input",
            )
        if isinstance(raw, dict) and is_a(value, "transformers", "ProcessorMixin"):
            return dict(value(**raw, return_tensors="pt"))
        return dict(value(*raw, return_tensors="pt") if isinstance(raw, tuple) else value(raw, return_tensors="pt"))


def _is_text(raw: Any) -> bool:
    return isinstance(raw, str) or (
        isinstance(raw, tuple) and len(raw) == 2 and all(isinstance(text, str) for text in raw)
    )


def _lasting(file: StoredFile) -> StoredFile:
    """Leave out of a JSON file what says nothing about the tokenizer."""
    if not file.name.endswith(".json"):
        return file
    document = json.loads(file.content)
    if not isinstance(document, dict):
        return file
    kept = {key: item for key, item in document.items() if key not in _NO_STATE and not _is_absent(key, item)}
    if file.name.endswith("_config.json"):
        kept = {key: _without_code(item) for key, item in kept.items()}
    if file.name == "tokenizer.json" and "model" in kept:
        # Each call sets these anew from its own arguments: they are those of the last call.
        kept.update({key: None for key in ("truncation", "padding") if key in kept})
    if kept == document:
        return file
    return StoredFile(file.name, json.dumps(kept, ensure_ascii=False, indent=2).encode("utf-8", "surrogatepass"))


def _without_code(item: Any) -> Any:
    """Leave out, in the settings of the parts of a processor, which code of their own they came with."""
    if isinstance(item, dict):
        return {key: _without_code(inner) for key, inner in item.items() if key != _CODE}
    return [_without_code(inner) for inner in item] if isinstance(item, list) else item


def _is_absent(key: str, item: Any) -> bool:
    """Say whether an entry says that there is nothing: loading adds such entries to what a constructor leaves out."""
    return (item is None and key.endswith("_file")) or (not item and key.endswith("_special_tokens"))


def _refuse_places(file: StoredFile) -> None:
    """Refuse a configuration that names files of its own, or arguments by position: they may lie anywhere."""
    if not file.name.endswith("_config.json"):
        return
    document = json.loads(file.content)
    if not isinstance(document, dict):
        raise ValueError(f"{file.name} is no JSON object")
    if _without_code(document) != document:
        raise CorruptCheckpointError(
            f"{file.name} of the preprocessor names code of its own, with {_CODE!r}",
            why="a checkpoint holds no code, and none is loaded because it names some",
            next="the checkpoint was altered; do not load it",
        )
    for key, item in document.items():
        names_a_file = key.endswith(("_file", "_files")) and item
        if names_a_file or (key == "init_inputs" and item):
            raise CorruptCheckpointError(
                f"{file.name} of the preprocessor names files of its own, with {key!r}",
                why="a saved tokenizer lies in its own files; this one would read others",
                next="the checkpoint was altered; do not load it",
            )


def _forget_place(value: Any) -> None:
    """Drop the temporary directory that it was loaded from."""
    if hasattr(value, "name_or_path"):
        value.name_or_path = ""
    for kept in (getattr(value, "init_kwargs", None), getattr(value, "_processor_dict", None)):
        if isinstance(kept, dict):
            for key in _NO_STATE:
                kept.pop(key, None)
            for key in [key for key in kept if key.endswith("_file")]:
                kept[key] = None
