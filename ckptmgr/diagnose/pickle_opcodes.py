"""The instructions of a pickle, one after the other. Nothing is executed, imported or built.

Covers protocols 0 to 5. Long payloads are skipped where they lie, so that a pickle of gigabytes costs no memory.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ckptmgr.diagnose.byte_source import Window

__all__ = [
    "AmbiguousPickleError",
    "BadPickleError",
    "Blob",
    "Instruction",
    "LongText",
    "PickleWindow",
    "instructions",
]

MAX_TEXT_NBYTES = 1 << 16
MAX_BLOB_NBYTES = 1 << 12
MAX_LINE_NBYTES = 1 << 24
_MAX_INTEGER_NBYTES = 256
_MAX_DIGITS = 4300  # Python's own limit


class BadPickleError(Exception):
    """What follows is no instruction, or contradicts those before it."""


class AmbiguousPickleError(BadPickleError):
    """Python's two unpicklers take what follows for different instructions."""


class PickleWindow(Window):
    """A position in a pickle.

    Attributes:
        frame_end: Where the frame that it stands in ends, or the last one ended; 0 before the first.
    """

    frame_end = 0

    def check_frame(self, start: int) -> None:
        """Check that what was read from ``start`` on lies on one side of the end of a frame.

        No pickler writes an instruction over the end of a frame. Python's unpickler in C drops what is left of the
        frame then, so that it reads another instruction than its unpickler in Python does.

        Raises:
            AmbiguousPickleError: It does not.
        """
        if start < self.frame_end < self.position:
            raise AmbiguousPickleError(f"an instruction reaches over the end of a frame, at {self.frame_end}")


@dataclass(frozen=True, slots=True, eq=False)
class Blob:
    """Bytes that are not looked at, only where they lie.

    Attributes:
        start: Offset in the source.
        nbytes: Length.
        head: The first 4 KiB.
    """

    start: int
    nbytes: int
    head: bytes


@dataclass(frozen=True, slots=True, eq=False)
class LongText:
    """A text of more than 64 KiB, and its beginning."""

    nbytes: int
    head: str


Instruction: TypeAlias = tuple[str, Any]
"""Its name, as `pickletools` calls it, and its argument: a number, a text, a `Blob`, or a pair of texts."""

_PLAIN: Final = {
    0x28: "MARK",
    0x29: "EMPTY_TUPLE",
    0x2E: "STOP",
    0x30: "POP",
    0x31: "POP_MARK",
    0x32: "DUP",
    0x4E: "NONE",
    0x51: "BINPERSID",
    0x52: "REDUCE",
    0x5D: "EMPTY_LIST",
    0x61: "APPEND",
    0x62: "BUILD",
    0x64: "DICT",
    0x65: "APPENDS",
    0x6C: "LIST",
    0x6F: "OBJ",
    0x73: "SETITEM",
    0x74: "TUPLE",
    0x75: "SETITEMS",
    0x7D: "EMPTY_DICT",
    0x81: "NEWOBJ",
    0x85: "TUPLE1",
    0x86: "TUPLE2",
    0x87: "TUPLE3",
    0x88: "NEWTRUE",
    0x89: "NEWFALSE",
    0x8F: "EMPTY_SET",
    0x90: "ADDITEMS",
    0x91: "FROZENSET",
    0x92: "NEWOBJ_EX",
    0x93: "STACK_GLOBAL",
    0x94: "MEMOIZE",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
# Name, size in bytes, whether it is signed.
_NUMBERS: Final = {
    0x4B: ("INT", 1, False),
    0x4D: ("INT", 2, False),
    0x4A: ("INT", 4, True),
    0x68: ("GET", 1, False),
    0x6A: ("GET", 4, False),
    0x71: ("PUT", 1, False),
    0x72: ("PUT", 4, False),
    0x80: ("PROTO", 1, False),
    0x82: ("EXT", 1, False),
    0x83: ("EXT", 2, False),
    0x84: ("EXT", 4, True),
    0x95: ("FRAME", 8, False),
}
# Name, size in bytes of the length.
_COUNTED: Final = {
    0x58: ("TEXT", 4),
    0x8C: ("TEXT", 1),
    0x8D: ("TEXT", 8),
    0x54: ("STRING", 4),
    0x55: ("STRING", 1),
    0x42: ("BYTES", 4),
    0x43: ("BYTES", 1),
    0x8E: ("BYTES", 8),
    0x96: ("BYTES", 8),
    0x8A: ("LONG", 1),
    0x8B: ("LONG", 4),
}


def instructions(window: PickleWindow, *, source_start: int = 0) -> Iterator[Instruction]:
    """Yield the instructions up to and including ``STOP``; the window is left behind the last one.

    Args:
        window: Stands at the first instruction.
        source_start: Added to the offsets of blobs.

    Raises:
        AmbiguousPickleError: What follows is one instruction to one reader, and another one to another.
        BadPickleError: What follows is no instruction.
        EOFError: The source ends before ``STOP``.
    """
    plain, numbers, counted = _PLAIN, _NUMBERS, _COUNTED
    while True:
        start = window.position
        code = window.read(1)[0]
        name = plain.get(code)
        if name is not None:
            yield name, None
            if code == 0x2E:
                return
        elif (number := numbers.get(code)) is not None:
            value = int.from_bytes(window.read(number[1]), "little", signed=number[2])
            window.check_frame(start)
            if code == 0x95:
                _begin_frame(window, start, value)
            yield number[0], value
        elif (length := counted.get(code)) is not None:
            signed = length[1] == 4 and length[0] in ("STRING", "LONG")
            nbytes = int.from_bytes(window.read(length[1]), "little", signed=signed)
            payload = _payload(window, length[0], nbytes, source_start)
            window.check_frame(start)
            yield length[0], payload
        elif code == 0x47:
            (decimal,) = struct.unpack(">d", window.read(8))
            window.check_frame(start)
            yield "FLOAT", decimal
        elif code in b"cilFIVSPgp":
            instruction = _with_lines(window, chr(code))
            window.check_frame(start)
            yield instruction
        elif code == 0x4C:
            number_of_line = _lenient(_line(window).removesuffix(b"L"), lambda text: int(text, 0))
            window.check_frame(start)
            yield "INT", number_of_line
        else:
            raise BadPickleError(f"byte {code:#04x} at {window.position - 1} is no instruction of a pickle")


def _begin_frame(window: PickleWindow, start: int, nbytes: int) -> None:
    if start < window.frame_end:
        raise AmbiguousPickleError(f"a frame begins within another one, at {start}")
    window.frame_end = window.position + nbytes


def _payload(window: Window, kind: str, nbytes: int, source_start: int) -> Any:
    if nbytes < 0 or nbytes > window.remaining:
        raise EOFError(f"{nbytes} bytes are declared at {window.position}, {max(0, window.remaining)} are there")
    start = window.position
    if kind == "LONG":
        if nbytes > _MAX_INTEGER_NBYTES:
            window.skip(nbytes)
            return LongText(nbytes, "an integer")
        return int.from_bytes(window.read(nbytes), "little", signed=True)
    if kind == "TEXT":
        if nbytes <= MAX_TEXT_NBYTES:
            return window.read(nbytes).decode("utf-8", "replace")
        head = window.peek(1024).decode("utf-8", "replace")
        window.skip(nbytes)
        return LongText(nbytes, head)
    if kind == "STRING" and nbytes <= MAX_BLOB_NBYTES:
        return window.read(nbytes).decode("latin-1")
    head_bytes = window.peek(min(nbytes, MAX_BLOB_NBYTES))
    window.skip(nbytes)
    return Blob(source_start + start, nbytes, head_bytes)


def _with_lines(window: Window, code: str) -> Instruction:
    if code in "ci":
        module, name = _text(_line(window)), _last_line(window)
        return ("GLOBAL" if code == "c" else "INST"), (module, name)
    line = _line(window)
    if code == "F":
        return "FLOAT", _lenient(line, float)
    if code == "I":
        if line in (b"00", b"01"):
            return ("NEWTRUE" if line == b"01" else "NEWFALSE"), None
        return "INT", _lenient(line, lambda text: int(text, 0))
    if code == "V":
        return "TEXT", _clipped(line, line.decode("raw-unicode-escape", "replace"))
    if code == "S":
        return "TEXT", _clipped(line, _unescaped(line))
    if code == "P":
        return "PERSID", _text(line)
    return ("GET" if code == "g" else "PUT"), _integer(line)


def _lenient(line: bytes, read: Callable[[bytes], float]) -> float:
    # Python's two unpicklers differ in what they take for a number. To stop at one would hide what follows.
    try:
        return read(line) if len(line) <= _MAX_DIGITS else 0
    except ValueError:
        return 0


def _unescaped(line: bytes) -> str:
    # `S'\x6fs'` is the text "os".
    inner = line.strip()[1:-1]
    if b"\\" not in inner:
        return inner.decode("latin-1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return codecs.escape_decode(inner)[0].decode("latin-1")
        except ValueError:
            return inner.decode("latin-1")


def _clipped(line: bytes, text: str) -> str | LongText:
    return text if len(line) <= MAX_TEXT_NBYTES else LongText(len(line), text[:1024])


def _line(window: Window) -> bytes:
    try:
        return window.read_line(MAX_LINE_NBYTES)
    except ValueError as cause:
        raise BadPickleError(str(cause)) from cause


def _last_line(window: Window) -> str:
    """Return the text of a line that may be the last one, and without an end: Python imports it without its end."""
    try:
        return _text(_line(window))
    except EOFError:
        rest = window.peek(min(window.remaining, MAX_TEXT_NBYTES))
        window.skip(window.remaining)
        return _text(rest[:-1])


def _text(line: bytes) -> str:
    return line[:MAX_TEXT_NBYTES].decode("utf-8", "replace")


def _integer(line: bytes) -> int:
    if len(line) > _MAX_DIGITS:
        raise BadPickleError(f"a number of {len(line)} digits")
    try:
        return int(line)
    except ValueError as cause:
        raise BadPickleError(f"{line[:20]!r} is no number") from cause
