"""The header of a safetensors file that anybody may have written: read by hand, within bounds, nothing believed.

A file may claim 10^15 elements, overlapping ranges, endless nesting or names that stand twice. Nothing is allocated for
a claim: the header is scanned once, without recursion, and every tensor must lie exactly where the one before it ends.

Source:
    The safetensors format (https://github.com/huggingface/safetensors): eight bytes of header length, JSON, data
    without holes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, TypeAlias

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.encoding import ITEM_NBITS, numel

__all__ = [
    "MAX_DIMS",
    "MAX_HEADER_NBYTES",
    "SAFETENSORS_NBITS",
    "Claim",
    "ClaimedHeader",
    "RangedRead",
    "SafetensorsHeader",
    "SafetensorsTensor",
    "parse_header",
    "read_header",
]

MAX_HEADER_NBYTES = 100_000_000
"""What the format itself allows."""

MAX_DIMS = 64
"""No framework has tensors of more dimensions."""

SAFETENSORS_NBITS = ITEM_NBITS | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
"""Bits per element of every dtype name of the safetensors format, also of those that ckptmgr never writes."""

RangedRead: TypeAlias = Callable[[int, int], bytes]
"""Returns bytes ``[start, stop)`` of a file, fewer where it ends."""

_LENGTH_NBYTES = 8
_METADATA = b"__metadata__"
_SPACE = re.compile(rb"[ \t\n\r]*+")
# Possessive: endless text must not be tried again from every position.
_STRING = re.compile(rb'"((?:[^"\\\x00-\x1f]|\\.)*+)"')
_NUMBER = re.compile(rb"(?:0|[1-9][0-9]{0,18})(?![0-9.eE])")
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor of a file.

    Attributes:
        name: Its key.
        dtype: As safetensors calls it: a key of `SAFETENSORS_NBITS`.
        shape: In elements.
        begin: Its first byte, from the start of the file.
        end: The byte after its last one; ``end - begin`` is what dtype and shape give.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What the header of a file says, checked against the size of the file.

    Attributes:
        tensors: In the order of their bytes, without gaps.
        metadata: Text → text, as its writer put it; nothing may be believed about it.
        data_start: Where the first tensor begins, from the start of the file.
    """

    tensors: tuple[SafetensorsTensor, ...]
    metadata: dict[str, str]
    data_start: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What a header says of one tensor, unchecked.

    Attributes:
        dtype: Any text.
        shape: At most `MAX_DIMS` sizes, in elements.
        begin, end: Offsets from the start of the data, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ClaimedHeader:
    """What a header says, unchecked.

    Attributes:
        claims: By name, in the order of the header.
        metadata: Text → text.
        data_start: Where the data begin, from the start of the file.
    """

    claims: dict[str, Claim]
    metadata: dict[str, str]
    data_start: int


def read_header(
    source: BinaryIO | RangedRead, nbytes: int, *, where: str = "the safetensors file"
) -> SafetensorsHeader:
    """Read the header of a safetensors file, and check all of it.

    Time and memory grow with the header's own bytes, at most 100 MB, whatever it claims. No tensor is read.

    Args:
        source: The open file, which can seek; or a function that returns bytes ``[start, stop)`` of it.
        nbytes: Size of the whole file.
        where: What is read, for messages.

    Raises:
        CorruptCheckpointError: It is no safetensors file, is truncated, or its header contradicts itself or the size.
    """
    claimed = parse_header(source, nbytes, where=where)
    try:
        tensors = _in_place(claimed.claims, claimed.data_start, nbytes)
    except _Refused as refused:
        raise _corrupt(where, str(refused)) from None
    return SafetensorsHeader(tensors, claimed.metadata, claimed.data_start)


def parse_header(source: BinaryIO | RangedRead, nbytes: int, *, where: str = "the safetensors file") -> ClaimedHeader:
    """Read what a header claims, for whoever wants to tell what is wrong with it: no claim is checked.

    Args, time and memory as in `read_header`.

    Raises:
        CorruptCheckpointError: There is no header, or it is not of the form that the format has.
    """
    read = source if callable(source) else _ranged(source)
    if nbytes < _LENGTH_NBYTES:
        raise _corrupt(where, f"it has {nbytes} bytes, and a safetensors file begins with eight bytes of length")
    first = _exactly(read, 0, _LENGTH_NBYTES, where)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_NBYTES:
        raise _corrupt(where, _what_else(first) or f"its header would have {length} bytes; at most 100,000,000 do")
    if _LENGTH_NBYTES + length > nbytes:
        raise _corrupt(where, f"its header has {length} bytes, and the file only {nbytes}: it is truncated")
    text = _exactly(read, _LENGTH_NBYTES, _LENGTH_NBYTES + length, where)
    try:
        claims, metadata = _Scanner(text).header()
    except _Refused as refused:
        raise _corrupt(where, str(refused)) from None
    return ClaimedHeader(claims, metadata, _LENGTH_NBYTES + length)


class _Refused(Exception):
    pass


class _Scanner:
    """Reads the JSON of a header: exactly the two levels that the format has."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0

    def header(self) -> tuple[dict[str, Claim], dict[str, str]]:
        claims: dict[str, Claim] = {}
        metadata: dict[str, str] | None = None
        self._expect(b"{")
        if not self._take(b"}"):
            while True:
                raw, name = self._string()
                self._expect(b":")
                if raw == _METADATA:
                    if metadata is not None:
                        self._refuse("__metadata__ stands twice")
                    metadata = self._metadata()
                elif name in claims:
                    self._refuse(f"{_shown(name)} stands twice")
                else:
                    claims[name] = self._claim(name)
                if not self._take(b","):
                    break
            self._expect(b"}")
        if self._skip() != len(self._text):
            self._refuse("something follows the JSON of the header")
        return claims, metadata or {}

    def _metadata(self) -> dict[str, str]:
        if self._take(b"null"):
            return {}
        found: dict[str, str] = {}
        self._expect(b"{")
        if self._take(b"}"):
            return found
        while True:
            _, key = self._string()
            self._expect(b":")
            if key in found:
                self._refuse(f"__metadata__: {_shown(key)} stands twice")
            _, found[key] = self._string()
            if not self._take(b","):
                break
        self._expect(b"}")
        return found

    def _claim(self, name: str) -> Claim:
        dtype: str | None = None
        numbers: dict[bytes, tuple[int, ...]] = {}
        self._expect(b"{")
        while True:
            raw, _ = self._string()
            self._expect(b":")
            if raw == b"dtype" and dtype is None:
                _, dtype = self._string()
            elif raw in (b"shape", b"data_offsets") and raw not in numbers:
                numbers[raw] = self._numbers(MAX_DIMS if raw == b"shape" else 2)
            else:
                self._refuse(f"{_shown(name)} has a field twice, or one that the format does not know")
            if not self._take(b","):
                break
        self._expect(b"}")
        shape, offsets = numbers.get(b"shape"), numbers.get(b"data_offsets", ())
        if dtype is None or shape is None or len(offsets) != 2:
            self._refuse(f"{_shown(name)} lacks its dtype, its shape or its two offsets")
        return Claim(_DTYPES.get(dtype, dtype), shape, *offsets)

    def _numbers(self, at_most: int) -> tuple[int, ...]:
        self._expect(b"[")
        if self._take(b"]"):
            return ()
        found: list[int] = []
        while True:
            self._skip()
            match = _NUMBER.match(self._text, self._at)
            if match is None or len(found) == at_most:
                self._refuse(f"at byte {self._at}: a list of at most {at_most} sizes was expected")
            found.append(int(match.group()))
            self._at = match.end()
            if not self._take(b","):
                break
        self._expect(b"]")
        return tuple(found)

    def _string(self) -> tuple[bytes, str]:
        self._skip()
        match = _STRING.match(self._text, self._at)
        if match is None:
            self._refuse(f"at byte {self._at}: a text in quotes was expected")
        raw = match.group(1)
        try:
            text = json.loads(match.group()) if b"\\" in raw else raw.decode()
            text.encode()  # Half of a surrogate pair is no name that could be printed or stored.
        except ValueError:
            self._refuse(f"at byte {self._at}: the text is not UTF-8, or escapes what cannot be escaped")
        self._at = match.end()
        return (text.encode() if b"\\" in raw else raw), text

    def _expect(self, mark: bytes) -> None:
        if not self._take(mark):
            self._refuse(f"at byte {self._at}: {mark.decode()!r} was expected")

    def _take(self, mark: bytes) -> bool:
        if self._text.startswith(mark, self._skip()):
            self._at += len(mark)
            return True
        return False

    def _skip(self) -> int:
        match = _SPACE.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
        return self._at

    def _refuse(self, why: str) -> NoReturn:
        raise _Refused(f"its header is not as the format says: {why}")


# One object for each name of a dtype, however many tensors have it.
_DTYPES = {name: name for name in SAFETENSORS_NBITS}


def _in_place(claims: dict[str, Claim], data_start: int, nbytes: int) -> tuple[SafetensorsTensor, ...]:
    tensors: list[SafetensorsTensor] = []
    at = 0
    for name, claim in sorted(claims.items(), key=lambda item: (item[1].begin, item[1].end)):
        nbits = SAFETENSORS_NBITS.get(claim.dtype)
        if nbits is None:
            raise _Refused(f"{_shown(name)} has the dtype {_shown(claim.dtype)}, which the format does not have")
        if claim.begin != at or claim.end < claim.begin:
            raise _Refused(
                f"{_shown(name)} claims bytes {claim.begin} to {claim.end} of the data, and the one before it ends at "
                f"{at}: there are no holes in a safetensors file, and no two tensors on one byte"
            )
        if numel(claim.shape) * nbits != 8 * (claim.end - claim.begin):
            raise _Refused(
                f"{_shown(name)} is {claim.dtype} {claim.shape}, and that is not {claim.end - claim.begin} bytes"
            )
        at = claim.end
        tensors.append(SafetensorsTensor(name, claim.dtype, claim.shape, data_start + claim.begin, data_start + at))
    if data_start + at != nbytes:
        raise _Refused(
            f"its tensors end at byte {data_start + at}, and the file has {nbytes}"
            + (": it is truncated" if data_start + at > nbytes else "")
        )
    return tuple(tensors)


def _ranged(file: BinaryIO) -> RangedRead:
    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    return read


def _exactly(read: RangedRead, start: int, stop: int, where: str) -> bytes:
    data = read(start, stop)
    if len(data) != stop - start:
        raise _corrupt(where, f"it ends before byte {stop}: it is truncated")
    return data


def _what_else(first: bytes) -> str | None:
    if first == b"version ":
        return "it is a Git LFS pointer and not the file itself: `git lfs pull` brings that"
    if first.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a file of torch.save or a pickle, whatever its name says"
    if first[:1] in (b"<", b"{"):
        return "it begins as HTML or JSON does: a page was saved instead of the file"
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def _corrupt(where: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{where} is damaged, or no safetensors file",
        why=why,
        next="get it again from where it came from, and compare its size with the original's",
    )
