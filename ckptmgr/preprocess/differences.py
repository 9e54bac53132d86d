"""The first differences between two preprocessors, in words for people."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.readable import readable
from ckptmgr.state.differences import describe
from ckptmgr.state.stored_file import StoredFile

__all__ = ["first_differences"]

# The order in which differences are told: what somebody wrote comes before what was computed from data.
_KIND, _SETTING, _TOKEN, _NUMBER = range(4)
_Line: TypeAlias = tuple[int, str]

# Levels of a tree that say nothing to people.
_UNSPOKEN = frozenset(
    {"state", "file", "files", "settings", "fields", "options", "modules", "tensors", "column"}
) | frozenset(
    # Lists of the steps of scikit-learn's estimators, whose names follow.
    {"steps", "transformer_list", "transformers", "transformers_"}
)
_MAX_TEXT = 60
_MAX_NAMES = 5
_WORDS = {True: "true", False: "false", None: "none"}


def first_differences(saved_tree: Any, live_tree: Any, *, limit: int = 5) -> list[str]:
    """Say how two captured preprocessors differ: kind and settings first, then tokens, then numbers.

    Args:
        saved_tree: Of the checkpoint: what `capture_preprocessor` or a kind's ``capture`` gave.
        live_tree: Of now.
        limit: At most so many lines.

    Returns:
        Sentences without a full stop, such as ``normalizer.lowercase is true in the checkpoint, false now``. Empty if
        and only if the fingerprints are equal.
    """
    if fingerprint(saved_tree) == fingerprint(live_tree):
        return []
    lines = sorted(_differences("", readable(saved_tree), readable(live_tree)), key=lambda line: line[0])
    told = list(dict.fromkeys(text for _, text in lines))[:limit]
    return told or ["the two differ in the order or the form of their parts"]


def _differences(path: str, saved: Any, live: Any) -> Iterator[_Line]:
    if isinstance(saved, StoredFile) and isinstance(live, StoredFile):
        yield from _of_files(saved, live)
    elif _is_tokenizer(saved) and _is_tokenizer(live):
        yield from _of_tokenizers(path, saved, live)
    elif _is_number_array(saved) and _is_number_array(live):
        yield from _of_arrays(path, saved, live)
    elif isinstance(saved, dict) and isinstance(live, dict):
        yield from _of_dicts(path, saved, live)
    elif type(saved) is type(live) and isinstance(saved, (list, tuple)):
        yield from _of_sequences(path, saved, live)
    elif type(saved) is type(live) and isinstance(saved, (set, frozenset)):
        names = (sorted(map(str, saved - live)), sorted(map(str, live - saved)))
        yield from _of_names("entry", "entries", *names, path)
    elif fingerprint(saved) != fingerprint(live):
        yield _of_leaves(path, saved, live)


def _of_leaves(path: str, saved: Any, live: Any) -> _Line:
    if path.rpartition(".")[2] == "source" and all(map(_is_digest, (saved, live))):
        return _SETTING, "the source of the function or class has changed since the checkpoint"
    if path == "class" and isinstance(saved, str):
        return _KIND, f"the preprocessor is a {saved} in the checkpoint, a {live} now"
    # What scikit-learn computed from data ends with an underscore.
    is_computed = isinstance(saved, np.generic) or "_." in f"{path}.".replace("[", ".")
    rank = _NUMBER if is_computed else _SETTING
    return rank, f"{path or 'the value'} is {_said(saved)} in the checkpoint, {_said(live)} now"


def _of_files(saved: StoredFile, live: StoredFile) -> Iterator[_Line]:
    if saved.name != live.name:
        yield _SETTING, f"the file is {saved.name!r} in the checkpoint, {live.name!r} now"
    elif saved.content != live.content:
        sizes = f"{len(saved.content)} bytes in the checkpoint, {len(live.content)} bytes now"
        yield _NUMBER, f"the file {saved.name!r} differs: {sizes}"


def _of_dicts(path: str, saved: Mapping[Any, Any], live: Mapping[Any, Any]) -> Iterator[_Line]:
    if _is_vocabulary(saved, live):
        yield from _of_vocabularies(saved, live)
        return
    if type(saved) is not type(live):
        yield _SETTING, f"{path or 'the value'} is {describe(saved)} in the checkpoint, {describe(live)} now"
    gone, new = ([str(key) for key in one if key not in other] for one, other in ((saved, live), (live, saved)))
    yield from _of_names("entry", "entries", gone, new, path)
    for key, item in saved.items():
        if key in live:
            yield from _differences(_joined(path, key, in_kind="class" in saved), item, live[key])
    if isinstance(saved, OrderedDict) and isinstance(live, OrderedDict) and not gone and not new:
        orders = [", ".join(map(str, list(one)[:8])) for one in (saved, live)]
        if list(saved) != list(live):
            yield _SETTING, f"the order of {path or 'the entries'} is {orders[0]} in the checkpoint, {orders[1]} now"


def _of_sequences(path: str, saved: Sequence[Any], live: Sequence[Any]) -> Iterator[_Line]:
    if len(saved) > 8 and _are_tokens(saved) and _are_tokens(live):
        numbered = [{token: number for number, token in enumerate(tokens)} for tokens in (saved, live)]
        yield from _of_vocabularies(*numbered)
        return
    if len(saved) != len(live):
        yield _SETTING, f"{path or 'the list'} has {len(saved)} items in the checkpoint, {len(live)} now"
    for index, (one, other) in enumerate(zip(saved, live, strict=False)):
        yield from _differences(f"{path}[{index}]" if path else f"item {index}", one, other)


def _of_vocabularies(saved: Mapping[str, int], live: Mapping[str, int]) -> Iterator[_Line]:
    gone, new = [token for token in saved if token not in live], [token for token in live if token not in saved]
    yield from _of_names("token", "tokens", gone, new, rank=_TOKEN)
    for token, number in saved.items():
        if token in live and live[token] != number:
            yield _TOKEN, f"token {token!r} has id {number} in the checkpoint, {live[token]} now"


def _of_names(
    noun: str, nouns: str, gone: list[str], new: list[str], path: str = "", *, rank: int = _SETTING
) -> Iterator[_Line]:
    where = f" of {path}" if path else ""
    for names, text in ((gone, "of the checkpoint {} missing now"), (new, "{} new, and not in the checkpoint")):
        if names:
            listed = ", ".join(map(repr, names[:_MAX_NAMES])) + (", …" if len(names) > _MAX_NAMES else "")
            said = text.format("is" if len(names) == 1 else "are")
            yield rank, f"{len(names)} {noun if len(names) == 1 else nouns}{where} {said}: {listed}"


def _of_tokenizers(path: str, saved: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[_Line]:
    """Compare two documents of the form of ``tokenizer.json``."""
    apart = ("model", "added_tokens")
    yield from _of_dicts("", {k: v for k, v in saved.items() if k not in apart}, _without(live, apart))
    added = [{str(token.get("content")): token for token in one.get("added_tokens") or ()} for one in (saved, live)]
    gone, new = ([token for token in one if token not in other] for one, other in (added, added[::-1]))
    yield from _of_names("added token", "added tokens", gone, new)
    for token in added[0]:
        if token in added[1]:
            yield from _differences(f"added token {token!r}", added[0][token], added[1][token])
    models = saved["model"], live["model"]
    apart = ("vocab", "merges")
    yield from _of_dicts("model", _without(models[0], apart), _without(models[1], apart))
    vocabularies = [_numbered(model.get("vocab")) for model in models]
    yield from _of_vocabularies(*vocabularies)
    if isinstance(models[0].get("vocab"), list) and isinstance(models[1].get("vocab"), list):
        scores = [dict(item for item in model["vocab"]) for model in models]
        for token, score in scores[0].items():
            if token in scores[1] and scores[1][token] != score:
                yield _NUMBER, f"token {token!r} has the score {score} in the checkpoint, {scores[1][token]} now"
    merges = [[_merge(item) for item in model.get("merges") or ()] for model in models]
    if len(merges[0]) != len(merges[1]):
        yield _TOKEN, f"there are {len(merges[0])} merges in the checkpoint, {len(merges[1])} now"
    for index, (one, other) in enumerate(zip(*merges, strict=False)):
        if one != other:
            yield _TOKEN, f"merge {index} is {one} in the checkpoint, {other} now"
            return


def _of_arrays(path: str, saved: Any, live: Any) -> Iterator[_Line]:
    where = path or "the array"
    if type(saved) is not type(live) or saved.dtype != live.dtype or tuple(saved.shape) != tuple(live.shape):
        if fingerprint(saved) != fingerprint(live):
            yield _NUMBER, f"{where} is {describe(saved)} in the checkpoint, {describe(live)} now"
        return
    one, other = _flat(saved), _flat(live)
    differing = np.flatnonzero(~_same_elements(one, other))
    if not differing.size:
        if fingerprint(saved) != fingerprint(live):
            yield _NUMBER, f"{where} differs in the bits of its NaNs or signs"
        return
    first = int(differing[0])
    # A complex element is two numbers.
    place = first // max(1, one.size // max(1, math.prod(saved.shape)))
    position = np.unravel_index(place, tuple(saved.shape)) if saved.shape else ()
    index = f"[{', '.join(map(str, map(int, position)))}]" if position else ""
    more = f" (and {differing.size - 1} more of {one.size} elements)" if differing.size > 1 else ""
    yield _NUMBER, f"{where}{index} is {one[first]!s} in the checkpoint, {other[first]!s} now{more}"


def _flat(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense().cpu().resolve_conj().resolve_neg()
        if value.is_complex():
            value = torch.view_as_real(value)
        value = value.to(torch.float32) if value.is_floating_point() and value.dtype.itemsize < 4 else value
        return np.asarray(value.reshape(-1).numpy())
    if value.dtype.kind == "c":
        value = np.ascontiguousarray(value).view(value.real.dtype)
    return np.asarray(value).reshape(-1)


def _same_elements(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Any:
    if one.dtype.kind != "f":
        return one == other
    same_numbers = (one == other) & (np.signbit(one) == np.signbit(other))
    return same_numbers | (np.isnan(one) & np.isnan(other))


def _is_digest(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None)


def _is_number_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _is_tokenizer(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("model"), dict) and "added_tokens" in value


def _is_vocabulary(saved: Mapping[Any, Any], live: Mapping[Any, Any]) -> bool:
    """Say whether both map tokens to ids, and not names of settings to sizes: ids are dense."""

    def maps(value: Mapping[Any, Any]) -> bool:
        return all(type(key) is str and type(item) is int for key, item in value.items())

    def is_dense(value: Mapping[Any, Any]) -> bool:
        return len(value) > 2 and len(set(value.values())) == len(value) and max(value.values()) <= len(value)

    return bool(saved or live) and maps(saved) and maps(live) and (is_dense(saved) or is_dense(live))


def _are_tokens(value: Sequence[Any]) -> bool:
    return all(type(token) is str for token in value) and len(set(value)) == len(value)


def _without(document: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: item for key, item in document.items() if key not in keys}


def _numbered(vocabulary: Any) -> dict[str, int]:
    if isinstance(vocabulary, dict):
        return vocabulary
    # Unigram: a list of pieces with scores, whose place is the id.
    return {item[0]: number for number, item in enumerate(vocabulary or ())}


def _merge(item: Any) -> str:
    return repr(item if isinstance(item, str) else " ".join(map(str, item)))


def _joined(path: str, key: Any, *, in_kind: bool) -> str:
    if not isinstance(key, str):
        return f"{path}[{key!r}]"
    # A path of a submodule is written as it is; files and levels of a tree say nothing.
    if (
        (key in _UNSPOKEN and (in_kind or "." not in path))
        or key.startswith("ckptmgr:")
        or key.endswith((".json", ".skops", ".txt"))
    ):
        return path
    return f"{path}.{key}" if path and key else path or key


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return describe(value)
    if isinstance(value, np.generic):
        return str(value)
    text = repr(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
