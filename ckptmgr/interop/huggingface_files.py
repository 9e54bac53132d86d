"""The files of a Hugging Face directory that are no weights: kept beside them, and written back as they were."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.layout import check_key
from ckptmgr.interop.stored import StoredCheckpoint
from ckptmgr.state.entry import CapturedEntry

__all__ = ["HUGGINGFACE", "files_entry", "is_model_file", "stored_files"]

HUGGINGFACE = "huggingface"
"""The entry that holds the files: ``{"files": {name: uint8 array}}``."""

_HANDLER = "stored-files"
_MODEL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".tiktoken", ".bpe")
MAX_FILE_NBYTES = 64 * 1024 * 1024


def is_model_file(name: str) -> bool:
    """Say whether a file of such a directory is kept: configurations, tokenizer files, vocabularies. Never code."""
    return name.endswith(_MODEL_SUFFIXES) and not name.startswith(".") and not name.endswith(".index.json")


def files_entry(files: dict[str, bytes]) -> CapturedEntry:
    """Return the entry that keeps files, byte for byte."""
    # As arrays they lie beside the tensors, with digests of their own, and not in the JSON of the state.
    arrays: dict[str, Any] = {name: np.frombuffer(content, dtype=np.uint8) for name, content in files.items()}
    return CapturedEntry(HUGGINGFACE, _HANDLER, 1, {"files": arrays})


def stored_files(checkpoint: StoredCheckpoint) -> dict[str, bytes]:
    """Return the files that a checkpoint keeps.

    Raises:
        CorruptCheckpointError: The entry is not of this form.
    """
    tree = checkpoint.load([HUGGINGFACE]).entries[HUGGINGFACE].tree
    files = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(files, dict) or not all(isinstance(content, np.ndarray) for content in files.values()):
        raise CorruptCheckpointError(
            f"{checkpoint.reference} keeps no files in its entry {HUGGINGFACE!r}",
            why="the entry is of another form",
            next="export with --format safetensors",
        )
    return {check_key(name): content.tobytes() for name, content in sorted(files.items())}
