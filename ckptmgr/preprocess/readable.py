"""Trees with a tool's own files opened up, so that they can be compared item by item."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from typing import Any

from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.skops_file import readable_skops
from ckptmgr.state.stored_file import StoredFile

__all__ = ["is_contained", "readable"]

_FAILURES = (ValueError, KeyError, TypeError, RecursionError, AttributeError, RuntimeError)


def readable(tree: Any) -> Any:
    """Return a captured tree with every file that can be read replaced by its content as plain values.

    A file of lines becomes a list, JSON what it says, a skops file the attributes of its objects, a sentencepiece model
    its pieces. Other files stay as they are. Nothing is built or imported.
    """
    if isinstance(tree, StoredFile):
        return _opened(tree)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, readable(item)) for key, item in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(readable(item) for item in tree)
    return tree


def _opened(file: StoredFile) -> Any:
    try:
        if file.name.endswith(".json"):
            return json.loads(file.content)
        if file.name.endswith(".skops"):
            return readable_skops(file.content)
        if file.name.endswith(".txt"):
            return file.content.decode().splitlines()
        if file.name.endswith(".model") and file.content:
            return _pieces(file)
    except _FAILURES:
        return file
    return file


def _pieces(file: StoredFile) -> Any:
    # The library is there if the live preprocessor is one of its; it is not imported for the words of a message.
    sentencepiece = sys.modules.get("sentencepiece")
    if sentencepiece is None:
        return file
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(file.content)
    numbers = range(processor.get_piece_size())
    pieces = {processor.id_to_piece(number): number for number in numbers}
    scores = {processor.id_to_piece(number): processor.get_score(number) for number in numbers}
    return {"pieces": pieces, "scores": scores, "model": file}


def is_contained(live: Any, saved: Any) -> bool:
    """Say whether a live tree only lacks what the saved one has: an unfitted estimator, a part of a vocabulary.

    Args:
        live: As `readable` gave it.
        saved: As `readable` gave it.
    """
    if _is_empty(live):
        return isinstance(live, StoredFile) or type(live) is type(saved)
    if isinstance(live, dict) and type(live) is type(saved):
        return all(key in saved and is_contained(item, saved[key]) for key, item in live.items())
    if type(live) in (list, tuple) and type(live) is type(saved):
        return len(live) <= len(saved) and all(map(is_contained, live, saved))
    if isinstance(live, (set, frozenset)) and type(live) is type(saved):
        return live <= saved
    return _is_same(live, saved)


def _is_same(live: Any, saved: Any) -> bool:
    return fingerprint(live) == fingerprint(saved)


def _is_empty(live: Any) -> bool:
    if isinstance(live, StoredFile):
        return not live.content
    if isinstance(live, dict) and isinstance(live.get("model"), dict):
        # A tokenizer without vocabulary: whatever its settings are, nobody has used it yet.
        return not live["model"].get("vocab", True) and not live.get("added_tokens")
    return isinstance(live, (dict, list, tuple, set, frozenset)) and not live
