"""The tokenizer of a Hugging Face directory as the run's preprocessor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptmgr.errors import CkptmgrError
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.handlers import REGISTRY
from ckptmgr.state.names import ParameterNames

__all__ = ["PREPROCESSOR", "preprocessor_entry"]

PREPROCESSOR = "preprocessor"

_MARKS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
# What takes any object is no handler of preprocessors.
_GENERAL = ("stateful", "values")


def preprocessor_entry(directory: Path, files: Mapping[str, bytes]) -> tuple[CapturedEntry | None, str | None]:
    """Return the entry, and a sentence where there is a tokenizer that did not become one.

    Its files are kept in any case. Loading runs no code of the directory and asks nobody on the network.

    Args:
        directory: Holds the files.
        files: Those that are kept, by name.
    """
    if not any(name in files for name in _MARKS):
        return None, None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return (
            None,
            "the tokenizer's files are kept; transformers is not installed, so it is not checked that they load",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        handler = REGISTRY.find(PREPROCESSOR, tokenizer)
    except CkptmgrError:
        return None, None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return None, f"the tokenizer's files are kept, but transformers does not load them: {reason}"
    if handler.name in _GENERAL:
        return None, None
    tree = handler.capture(tokenizer, ParameterNames({}))
    return CapturedEntry(PREPROCESSOR, handler.name, handler.version, tree), None
