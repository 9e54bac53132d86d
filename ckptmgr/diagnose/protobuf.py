"""Protocol buffers without their descriptions: fields by number, walked lazily over a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptmgr.diagnose.byte_source import ByteSource, Window

__all__ = ["BadProtobufError", "Field", "fields", "small_text", "varint"]


class BadProtobufError(Exception):
    """The bytes are no message."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message.

    Attributes:
        number: Its number.
        wire: 0 for a varint, 1 and 5 for eight and four bytes, 2 for bytes.
        value: Of a varint; the length of anything else.
        start: Where its bytes are, in the source.
    """

    number: int
    wire: int
    value: int
    start: int


def varint(window: Window) -> int:
    """Read an unsigned varint of at most ten bytes.

    Raises:
        BadProtobufError: It is longer.
        EOFError: The source ends within it.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = window.read(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF
    raise BadProtobufError("a number is too long")


def fields(source: ByteSource, start: int, stop: int, *, limit: int = 200_000) -> Iterator[Field]:
    """Yield the fields of the message in ``[start, stop)``; contents are skipped, not read.

    Raises:
        BadProtobufError: The bytes are no message, or it has more than ``limit`` fields.
    """
    window = Window(source, start)
    for _ in range(limit):
        if window.position >= stop:
            return
        try:
            tag = varint(window)
            number, wire = tag >> 3, tag & 7
            if number == 0 or number >= 1 << 29 or wire not in (0, 1, 2, 5):
                raise BadProtobufError("no field begins here")
            if wire == 0:
                yield Field(number, wire, varint(window), window.position)
                continue
            nbytes = varint(window) if wire == 2 else 8 if wire == 1 else 4
            begin = window.position
            window.skip(nbytes)
        except EOFError as cause:
            raise BadProtobufError("a field reaches behind the end") from cause
        if window.position > stop:
            raise BadProtobufError("a field reaches behind the end of its message")
        yield Field(number, wire, nbytes, begin)
    if window.position < stop:
        raise BadProtobufError("it has too many fields")


def small_text(source: ByteSource, field: Field, *, limit: int = 200) -> str:
    """Return the text of a field, its beginning if it is long; empty where it is none."""
    return source.read(field.start, min(field.value, limit)).decode("utf-8", "replace") if field.wire == 2 else ""
