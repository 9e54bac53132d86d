"""Where the bytes of a pickle's tensors lie in its file. None of them is read, and nothing is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckptmgr.diagnose.byte_source import ByteSource
from ckptmgr.diagnose.pickle_calls import itemsize
from ckptmgr.diagnose.pickle_facts import PickleFacts
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.pickle_values import Symbol
from ckptmgr.diagnose.torch_zip import root_of
from ckptmgr.diagnose.zip_records import BadZipError, open_archive, record_span

__all__ = ["PickledFile", "Span", "UnreadablePickleError", "locate_storages"]


class UnreadablePickleError(Exception):
    """What a file says of its tensors cannot be followed to their bytes; the message says why."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file: ``nbytes`` of them from offset ``start`` on, all within the file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledFile:
    """What a file would build, and where the memory of its tensors lies.

    Attributes:
        root: The object, as symbols.
        spans: Key of a storage → its bytes. A storage that the pickle names and that is not there has none.
        byteorder: Of the elements.
    """

    root: Symbol
    spans: dict[str, Span]
    byteorder: Literal["little", "big"] = "little"


def locate_storages(source: ByteSource, container: str) -> PickledFile:
    """Follow a file's pickle, and find the storages that it names.

    Args:
        source: The file.
        container: ``torch-zip``, ``torch-legacy`` or ``pickle``, as in the details of its artifact.

    Raises:
        UnreadablePickleError: It cannot be followed to its end, or contradicts itself.
        StorageError: It cannot be read.
    """
    if container == "torch-zip":
        try:
            return _in_zip(source)
        except BadZipError as error:
            raise UnreadablePickleError(str(error)) from error
    return _legacy(source) if container == "torch-legacy" else _plain(source)


def _in_zip(source: ByteSource) -> PickledFile:
    archive = open_archive(source)
    folder = root_of(archive)
    record = archive.records.get(f"{folder}data.pkl")
    if folder is None or record is None:
        raise UnreadablePickleError("it holds no pickle")
    inside = record_span(source, record)
    facts = _followed(source, inside[0])
    if facts.end > sum(inside):
        raise UnreadablePickleError("its pickle reaches over the end of its record")
    spans = {key: _within(source, start, nbytes) for key, start, nbytes in _nested(facts)}
    for key in facts.storages:
        stored = archive.records.get(f"{folder}data/{key}")
        if stored is not None and key not in spans:
            spans[key] = _within(source, *record_span(source, stored))
    order = archive.records.get(f"{folder}byteorder")
    is_big = order is not None and source.read(*record_span(source, order))[:16].strip() == b"big"
    return PickledFile(facts.root, spans, "big" if is_big else "little")


def _legacy(source: ByteSource) -> PickledFile:
    """Magic, version, machine, object and keys are five pickles; then of each key its number of elements, and they.

    The elements are little-endian whatever machine wrote them.
    """
    position = 0
    parts = []
    for _ in range(5):
        parts.append(_followed(source, position))
        position = parts[-1].end
    facts, keys = parts[3], parts[4].root
    if not isinstance(keys, list):
        raise UnreadablePickleError("the list of its storages is none")
    spans = {key: _within(source, start, nbytes) for key, start, nbytes in _nested(facts)}
    for key in keys:
        storage = facts.storages.get(key) if isinstance(key, str) else None
        size = None if storage is None else itemsize(storage.dtype)
        if storage is None or size is None:
            raise UnreadablePickleError(f"its storage {str(key)[:40]!r} is not described")
        numel = int.from_bytes(source.read(position, 8), "little", signed=True)
        if numel != storage.numel:
            raise UnreadablePickleError(f"its storage {key[:40]!r} has {numel} elements, not {storage.numel}")
        spans[key] = _within(source, position + 8, numel * size)
        position += 8 + numel * size
    return PickledFile(facts.root, spans)


def _plain(source: ByteSource) -> PickledFile:
    facts = _followed(source, 0)
    return PickledFile(facts.root, {key: _within(source, start, nbytes) for key, start, nbytes in _nested(facts)})


def _nested(facts: PickleFacts) -> list[tuple[str, int, int]]:
    """Return key, start and size of the storages that lie within the pickle itself."""
    return [
        (key, storage.start, storage.numel * (itemsize(storage.dtype) or 0))
        for key, storage in facts.storages.items()
        if storage.start is not None
    ]


def _followed(source: ByteSource, start: int) -> PickleFacts:
    facts = describe_pickle(source, start=start)
    if facts.is_ambiguous or not facts.is_complete or facts.has_joblib_arrays:
        raise UnreadablePickleError("; ".join(facts.problems) or "arrays lie between its instructions")
    return facts


def _within(source: ByteSource, start: int, nbytes: int) -> Span:
    if start + nbytes > source.nbytes:
        raise UnreadablePickleError(f"truncated: {nbytes} bytes are wanted at {start}; the file has {source.nbytes}")
    return Span(start, nbytes)
