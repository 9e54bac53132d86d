"""The files of a Hugging Face directory that are no weights: kept beside them, and written back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptmgr.interop.stored import StoredCheckpoint
from ckptmgr.preprocess.handler import PREPROCESSOR
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.stored_file import StoredFile

__all__ = ["HUGGINGFACE", "files_entry", "is_model_file", "stored_files"]

HUGGINGFACE = "huggingface"
"""The entry that holds the files: ``{"files": {name: StoredFile}}``."""

_HANDLER = "stored-files"
# Preprocessors whose files are those that such a directory has.
_KINDS = ("transformers", "tokenizers")
_MODEL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".tiktoken", ".bpe")
MAX_FILE_NBYTES = 64 * 1024 * 1024


def is_model_file(name: str) -> bool:
    """Say whether a file of such a directory is kept: configurations, tokenizer files, vocabularies. Never code."""
    return name.endswith(_MODEL_SUFFIXES) and not name.startswith(".") and not name.endswith(".index.json")


def files_entry(files: Mapping[str, bytes]) -> CapturedEntry:
    """Return the entry that keeps files, byte for byte."""
    kept = {name: StoredFile(name, content) for name, content in files.items()}
    return CapturedEntry(HUGGINGFACE, _HANDLER, 1, {"files": kept})


def stored_files(checkpoint: StoredCheckpoint) -> dict[str, bytes]:
    """Return the files that a checkpoint keeps: those of an imported directory, and those of its preprocessor."""
    names = [name for name in (PREPROCESSOR, HUGGINGFACE) if name in checkpoint.handlers]
    loaded = checkpoint.load(names).entries if names else {}
    files = {
        file.name: file.content
        for name in names
        if name != PREPROCESSOR or loaded[name].tree.get("kind") in _KINDS
        for file in _files_in(loaded[name].tree)
    }
    return {name: content for name, content in sorted(files.items()) if is_model_file(name)}


def _files_in(tree: Any) -> Iterator[StoredFile]:
    if isinstance(tree, StoredFile):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _files_in(item)
