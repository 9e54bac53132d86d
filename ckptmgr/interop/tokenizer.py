"""The tokenizer of a Hugging Face directory as the run's preprocessor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptmgr.preprocess.handler import PREPROCESSOR, PreprocessorHandler
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.names import ParameterNames

__all__ = ["preprocessor_entry"]

_MARKS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")

_OF_OTHER_INPUT = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def preprocessor_entry(directory: Path, files: Mapping[str, bytes]) -> tuple[CapturedEntry | None, str | None]:
    """Return the entry, and a sentence where there is a tokenizer that did not become one.

    Its files are kept in any case. Loading runs no code of the directory and asks nobody on the network.

    Args:
        directory: Holds the files.
        files: Those that are kept, by name.
    """
    if not any(name in files for name in _MARKS):
        is_for_others = any(name in files for name in _OF_OTHER_INPUT)
        return (
            None,
            None if is_for_others else "no tokenizer is here: it predicts only with the one it was trained with",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None, "the tokenizer's files are kept; transformers is not installed, so they are not loaded"
    handler = PreprocessorHandler()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        tree = handler.capture(tokenizer, ParameterNames({}))
    except Exception as error:
        # Whatever a library meets in files of another release, or of nobody's.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return None, f"the tokenizer's files are kept, but they do not load here: {reason}"
    fingerprint = handler.fingerprint(tree)
    return CapturedEntry(PREPROCESSOR, handler.name, handler.version, tree, fingerprint=fingerprint), None
