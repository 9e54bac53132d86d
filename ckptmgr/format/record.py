"""The envelope of every JSON record: its digest first, then the record itself, checked before it is parsed.

A stored record is these bytes, without any other white space before the body::

    {"digest":"xxh3-128:<32 hex digits>","record":<body>}\\n

The prefix has a fixed length, so the body's bytes can be cut out and hashed without parsing anything.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from ckptmgr.errors import CorruptCheckpointError, FormatVersionError
from ckptmgr.format.digest import ALGORITHM, block_digests, combined_digest

__all__ = [
    "FILES_VERSION",
    "FORMAT_VERSION",
    "MAX_MANIFEST_NBYTES",
    "MAX_RECORD_NBYTES",
    "NEWEST_VERSION",
    "RANKS_VERSION",
    "decode_excerpt",
    "decode_record",
    "encode_record",
    "parse_json",
]

FORMAT_VERSION = 1
"""Of every record but the manifest of a checkpoint that several ranks wrote."""

RANKS_VERSION = 2
"""Of a manifest with parts of several ranks: a reader of version 1 would take one rank's part for the whole."""

FILES_VERSION = 3
"""Of a manifest with files of other tools: a reader of version 2 does not know how a state document refers to them."""

NEWEST_VERSION = 3
MAX_RECORD_NBYTES = 1024 * 1024
MAX_MANIFEST_NBYTES = 64 * 1024 * 1024

_HEAD = f'{{"digest":"{ALGORITHM}:'.encode()
_NECK = b'","record":'
_TAIL = b"}\n"
_BODY_START = len(_HEAD) + 32 + len(_NECK)

T = TypeVar("T", bound=msgspec.Struct)


def encode_record(record: msgspec.Struct) -> bytes:
    """Return the stored bytes of a record."""
    body = msgspec.json.encode(record)
    return b"".join((_HEAD, combined_digest(block_digests(body)).encode(), _NECK, body, _TAIL))


def decode_record(data: bytes, kind: type[T], *, where: str, max_nbytes: int = MAX_RECORD_NBYTES) -> T:
    """Check the digest of a stored record, then parse it strictly.

    Args:
        data: All bytes of the stored object.
        kind: The record's class.
        where: Name of the object, for messages.
        max_nbytes: A larger record is refused.

    Raises:
        CorruptCheckpointError: Truncated, altered, or not a record of this kind.
        FormatVersionError: Whole, but written by a newer format.
    """
    body = _checked_body(data, where, max_nbytes)
    value = parse_json(body, where=where)
    _refuse_newer(value.get("version") if isinstance(value, dict) else None, where)
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError) as error:
        # Half of a surrogate pair, escaped, is text to a JSON parser, and none to whoever wants UTF-8 of it.
        raise _corrupt(where, f"a field is not as the format says: {error}") from error


def decode_excerpt(data: bytes, kind: type[T], *, where: str, max_nbytes: int = MAX_RECORD_NBYTES) -> T:
    """Check the digest of a stored record, and parse only the fields of ``kind``: for looking at many records quickly.

    What is skipped is not checked, so nothing may be restored or deleted by an excerpt.

    Raises:
        CorruptCheckpointError: Truncated, altered, or not a record with such fields.
        FormatVersionError: Written by a newer format.
    """
    body = _checked_body(data, where, max_nbytes)
    try:
        excerpt = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            _refuse_newer(msgspec.json.decode(body, type=_Version).version, where)
        raise _corrupt(where, f"a field is not as the format says: {error}") from error
    _refuse_newer(getattr(excerpt, "version", None), where)
    return excerpt


class _Version(msgspec.Struct, frozen=True):
    version: int


def _refuse_newer(version: object, where: str) -> None:
    if isinstance(version, int) and version > NEWEST_VERSION:
        raise FormatVersionError(
            f"{where} is of format version {version}",
            why=f"this ckptmgr reads versions up to {NEWEST_VERSION}",
            next="upgrade: pip install --upgrade ckptmgr",
        )


def _checked_body(data: bytes, where: str, max_nbytes: int) -> bytes:
    if len(data) > max_nbytes:
        raise _corrupt(where, f"it is {len(data)} bytes long; a record of this kind has at most {max_nbytes}")
    if not (data.startswith(_HEAD) and data[_BODY_START - len(_NECK) : _BODY_START] == _NECK and data.endswith(_TAIL)):
        raise _corrupt(where, "it does not have the frame of a record; it is truncated or something else")
    body = data[_BODY_START : -len(_TAIL)]
    if combined_digest(block_digests(body)).encode() != data[len(_HEAD) : _BODY_START - len(_NECK)]:
        raise _corrupt(where, "its content does not match its digest")
    return body


def parse_json(text: bytes, *, where: str) -> Any:
    """Parse JSON, refusing what lenient parsers let pass: duplicate keys, NaN, endless nesting, huge numbers.

    Raises:
        CorruptCheckpointError: The text is not strict JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _corrupt(where, f"it is not strict JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return unique


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _corrupt(where: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{where} is damaged", why=why, next="`ckptmgr verify` on the run lists what is intact; resume falls back to it"
    )
