"""The records of a zip archive, found by its central directory, or one after the other where that is lost.

An own reader, because `zipfile` neither bounds what it reads nor tells what is wrong with a damaged archive.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from ckptmgr.diagnose.byte_source import Bytes, ByteSource, Part
from ckptmgr.diagnose.plain_words import clean

__all__ = [
    "Archive",
    "BadZipError",
    "ZipRecord",
    "checksum_of",
    "open_archive",
    "record_source",
    "record_span",
    "scan_records",
]

MAX_DIRECTORY_NBYTES = 64 << 20
MAX_RECORDS = 400_000
MAX_INFLATED_NBYTES = 64 << 20
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_64, _LOCATOR_64, _DESCRIPTOR = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
_TAIL_NBYTES = 22 + 65535


class BadZipError(Exception):
    """It is no zip archive, or one that is damaged in this way."""


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One file of an archive.

    Attributes:
        name: Its path in the archive.
        start: Of its local header, in bytes from the start of the archive.
        nbytes: Its size.
        stored_nbytes: Its size in the archive.
        method: 0 where it is stored as it is, 8 where it is deflated.
        crc: Its checksum; 0 where the writer left it out.
    """

    name: str
    start: int
    nbytes: int
    stored_nbytes: int
    method: int
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of an archive, the first of each name, in their order; and what is wrong with it."""

    records: dict[str, ZipRecord]
    problems: tuple[str, ...] = ()


def open_archive(source: ByteSource) -> Archive:
    """Read the central directory.

    Raises:
        BadZipError: There is none, or it is damaged.
        StorageError: The bytes cannot be read.
    """
    tail_start = max(0, source.nbytes - _TAIL_NBYTES)
    tail = source.read(tail_start, _TAIL_NBYTES)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise BadZipError("its central directory is missing")
    count, nbytes, start = struct.unpack("<HII", tail[at + 10 : at + 20])
    behind = tail_start + at
    is_wide = count == 0xFFFF or 0xFFFFFFFF in (nbytes, start)
    wide = _wide_end(source, behind) if is_wide else None
    if wide is not None:
        count, nbytes, start, behind = wide
    if nbytes > MAX_DIRECTORY_NBYTES or start + nbytes > behind:
        raise BadZipError("its central directory is damaged")
    return _central(source.read(start, nbytes), source.nbytes)


def _wide_end(source: ByteSource, end: int) -> tuple[int, int, int, int] | None:
    locator = source.read(end - 20, 20) if end >= 20 else b""
    if not locator.startswith(_LOCATOR_64):
        return None
    at = int.from_bytes(locator[8:16], "little")
    record = source.read(at, 56) if at < end else b""
    if len(record) < 56 or not record.startswith(_END_64):
        raise BadZipError("its central directory is damaged")
    count, nbytes, start = struct.unpack("<QQQ", record[32:56])
    return count, nbytes, start, at


def _central(data: bytes, whole: int) -> Archive:
    records: dict[str, ZipRecord] = {}
    problems: list[str] = []
    position = 0
    while data.startswith(_CENTRAL, position) and len(records) < MAX_RECORDS:
        if position + 46 > len(data):
            raise BadZipError("its central directory is cut off")
        method, _, _, crc, stored, nbytes = struct.unpack_from("<HHHIII", data, position + 10)
        sizes = struct.unpack_from("<HHH", data, position + 28)
        (start,) = struct.unpack_from("<I", data, position + 42)
        names_end = position + 46 + sizes[0]
        name = data[position + 46 : names_end].decode("utf-8", "replace")
        nbytes, stored, start = _wide(data[names_end : names_end + sizes[1]], nbytes, stored, start)
        if start + stored > whole:
            problems.append(f"its record {clean(name)!r} lies outside of the file")
        elif name in records:
            problems.append(f"its record {clean(name)!r} stands twice")
        records.setdefault(name, ZipRecord(name, start, nbytes, stored, method, crc))
        position = names_end + sizes[1] + sizes[2]
    if position < len(data):
        problems.append("its central directory is damaged: not all records are known")
    return Archive(records, tuple(problems[:20]))


def _wide(extra: bytes, nbytes: int, stored: int, start: int) -> tuple[int, int, int]:
    values = [nbytes, stored, start]
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = position + 4
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF and field + 8 <= len(extra):
                    (values[index],) = struct.unpack_from("<Q", extra, field)
                    field += 8
            break
        position += 4 + size
    return values[0], values[1], values[2]


def record_source(source: ByteSource, record: ZipRecord) -> ByteSource:
    """Return the bytes of a record; inflated in memory, up to 64 MiB, where it is deflated.

    Raises:
        BadZipError: Its local header is damaged, it is packed in another way, or it is too large to inflate.
    """
    start, nbytes = _content(source, record)
    packed = Part(source, start, nbytes)
    if record.method == 0:
        return packed
    if record.method != 8:
        raise BadZipError(f"its record {clean(record.name)!r} is packed in an unknown way ({record.method})")
    if record.nbytes > MAX_INFLATED_NBYTES:
        raise BadZipError(f"its record {clean(record.name)!r} is too large to look into")
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(packed.read(0, min(packed.nbytes, record.nbytes + 65536)), record.nbytes + 1)
    except zlib.error as cause:
        raise BadZipError(f"its record {clean(record.name)!r} is damaged: {cause}") from cause
    if len(data) != record.nbytes:
        raise BadZipError(f"its record {clean(record.name)!r} is not as long as it says")
    return Bytes(data)


def record_span(source: ByteSource, record: ZipRecord) -> tuple[int, int]:
    """Return where the bytes of a record that is stored as it is begin, and how many there are.

    Raises:
        BadZipError: Its local header is damaged, or it is packed.
    """
    if record.method != 0 or record.stored_nbytes != record.nbytes:
        raise BadZipError(f"its record {clean(record.name)!r} is packed, which torch never does")
    return _content(source, record)


def _content(source: ByteSource, record: ZipRecord) -> tuple[int, int]:
    header = source.read(record.start, 30)
    if len(header) < 30 or not header.startswith(_LOCAL):
        raise BadZipError(f"the header of its record {clean(record.name)!r} is damaged")
    name_nbytes, extra_nbytes = struct.unpack_from("<HH", header, 26)
    if source.read(record.start + 30, name_nbytes) != record.name.encode("utf-8", "replace")[:name_nbytes]:
        raise BadZipError(f"the header of its record {clean(record.name)!r} has another name")
    return record.start + 30 + name_nbytes + extra_nbytes, record.stored_nbytes


def checksum_of(source: ByteSource, *, chunk_nbytes: int = 1 << 20) -> int:
    """Return the CRC-32 of all bytes, read in pieces."""
    crc = 0
    for start in range(0, source.nbytes, chunk_nbytes):
        crc = zlib.crc32(source.read(start, chunk_nbytes), crc)
    return crc


def scan_records(source: ByteSource, *, limit: int = 10_000) -> list[tuple[str, int]]:
    """List the records at the start of an archive whose directory is lost: name, and where the content begins.

    A writer that does not know sizes beforehand leaves them out of the local headers; then only the first record is
    found.
    """
    found: list[tuple[str, int]] = []
    position = 0
    while len(found) < limit:
        header = source.read(position, 30)
        if len(header) < 30 or not header.startswith(_LOCAL):
            break
        (stored,) = struct.unpack_from("<I", header, 18)
        name_nbytes, extra_nbytes = struct.unpack_from("<HH", header, 26)
        name = source.read(position + 30, name_nbytes).decode("utf-8", "replace")
        content = position + 30 + name_nbytes + extra_nbytes
        found.append((name, content))
        has_sizes = not header[6] & 8
        if not has_sizes or stored == 0xFFFFFFFF:
            break
        position = content + stored
    return found
