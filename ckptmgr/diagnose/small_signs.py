"""What is no model at all: pointers to one, pages of an error, empty and zeroed files, texts."""

from __future__ import annotations

import re
import shlex
from typing import Any, Final

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.byte_source import ByteSource
from ckptmgr.diagnose.plain_words import clean, listed
from ckptmgr.diagnose.small_json import bounded_json
from ckptmgr.words import format_nbytes

__all__ = ["PACKED", "annex_pointer", "empty_file", "packed_file", "pointer_or_page", "text_file", "unknown", "zeros"]

_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX: Final = re.compile(r"(?:^|/)(?:\.git/)?annex/objects/(?:[\w./-]*/)?([\w.:%&=,-]+)\s*$")
_MAX_TEXT_NBYTES = 4 << 20
_CHUNK_NBYTES = 1 << 20

PACKED: Final = {
    b"\x1f\x8b": ("gzip", "a gzip file", "gunzip -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "a Zstandard file", "zstd -d"),
    b"BZh": ("bzip2", "a bzip2 file", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "an xz file", "unxz -k"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "a 7z archive", "7z x"),
    b"Rar!\x1a\x07": ("rar", "a RAR archive", "unrar x"),
    b"\x04\x22\x4d\x18": ("lz4", "an LZ4 file", "lz4 -d"),
}
_IMAGES: Final = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"%PDF": "a PDF document"}


def empty_file(place: str) -> Artifact:
    """Describe a file without a byte."""
    return Artifact(
        place,
        "empty",
        "an empty file",
        "certain",
        0,
        problems=("it has no content: the save or the download did not happen, or the disk was full",),
        advice=("copy or download it again; a checkpoint that was being written is lost, use the one before",),
    )


def zeros(source: ByteSource, place: str, *, is_sparse: bool, check_nbytes: int) -> Artifact | None:
    """Describe a file of nothing but zeros, as a crash leaves it; None if it has other bytes.

    Args:
        source: The file.
        place: As it was named.
        is_sparse: Most of it has never been written.
        check_nbytes: How many bytes may be read.
    """
    position = 0
    while position < min(source.nbytes, check_nbytes):
        if source.read(position, _CHUNK_NBYTES).strip(b"\0"):
            return None
        position += _CHUNK_NBYTES
    is_all = check_nbytes >= source.nbytes
    return Artifact(
        place,
        "zeros",
        f"a file of {source.nbytes} zero bytes" if is_all else "a file that begins with zeros only",
        "certain" if is_all else "likely",
        source.nbytes,
        problems=("its content was never written: the machine stopped before the data reached the disk",),
        advice=("it cannot be repaired: use another copy, or the checkpoint before",),
        details={"is_sparse": is_sparse},
    )


def pointer_or_page(source: ByteSource, place: str, head: bytes) -> Artifact | None:
    """Describe a pointer of Git LFS or git-annex, or an HTML page; None if it is neither."""
    if head.startswith(_LFS):
        return _lfs_pointer(source, place, head)
    if source.nbytes <= 32768 and b"annex/objects/" in head[:1024]:
        match = _ANNEX.search(head.decode("utf-8", "replace").splitlines()[0])
        if match:
            return annex_pointer(place, match.group(1), nbytes=source.nbytes)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or (
        (start.startswith(b"<?xml") and b"<html" in start) or (start.startswith(b"<!--") and b"<html" in head.lower())
    ):
        return _page(source, place, head)
    if start.startswith(b"<?xml") and (b"<error>" in start or b"accessdenied" in start):
        return _page(source, place, head)
    return None


def _lfs_pointer(source: ByteSource, place: str, head: bytes) -> Artifact:
    values = dict(re.findall(r"^(oid|size) (\S{1,100})$", head[:1024].decode("utf-8", "replace"), re.MULTILINE))
    size = int(values["size"][:18]) if values.get("size", "").isdecimal() else None
    of = f" of {format_nbytes(size)}" if size is not None else ""
    return Artifact(
        place,
        "lfs-pointer",
        f"a Git LFS pointer: it stands for a file{of}, which was not downloaded",
        "certain",
        source.nbytes,
        problems=("the content is not here, only a pointer to it",),
        advice=(
            f"git lfs install; git lfs pull --include {shlex.quote(clean(place.rpartition('/')[2]))}",
            "from Hugging Face without Git: huggingface-cli download REPOSITORY",
        ),
        details={"oid": clean(values.get("oid", "")), "nbytes_of_the_content": size},
    )


def annex_pointer(place: str, key: str, *, nbytes: int | None = None) -> Artifact:
    """Describe a pointer of git-annex, in a file or as a link whose target is not here."""
    size = re.search(r"-s(\d{1,18})", key)
    return Artifact(
        place,
        "annex-pointer",
        "a git-annex pointer: the content was not fetched",
        "certain",
        nbytes,
        problems=("the content is not here, only a pointer to it",),
        advice=(f"git annex get {shlex.quote(clean(place, 500))}",),
        details={"key": clean(key), "nbytes_of_the_content": int(size.group(1)) if size else None},
    )


def _page(source: ByteSource, place: str, head: bytes) -> Artifact:
    title = re.search(rb"<title[^>]{0,200}>([^<]{1,200})", head, re.IGNORECASE)
    code = re.search(rb"<code>([^<]{1,100})</code>", head, re.IGNORECASE)
    match = title or code
    words = clean(" ".join(match.group(1).decode("utf-8", "replace").split())) if match else None
    return Artifact(
        place,
        "html",
        "an HTML page" + (f" titled {words!r}" if words else ""),
        "certain",
        source.nbytes,
        problems=("it is a page, not a model: the download failed",),
        advice=(
            "look at the address: it may need a login or a token, or be that of a page about the file"
            " (on Hugging Face: /resolve/ instead of /blob/)",
        ),
        details={"page_title": words},
    )


def packed_file(source: ByteSource, place: str, head: bytes) -> Artifact | None:
    """Describe a compressed file or another archive; None if it is none."""
    for magic, (kind, title, command) in PACKED.items():
        if head.startswith(magic):
            advice: tuple[str, ...] = (f"unpack it first: {command} {shlex.quote(clean(place, 500))}",)
            if kind in ("gzip", "xz", "bzip2", "lz4"):
                advice += (f"or, if joblib wrote it, and you trust it: joblib.load({place!r})",)
            return Artifact(place, kind, title, "certain", source.nbytes, advice=advice)
    if (
        len(head) > 1
        and head[0] == 0x78
        and head[1] in (0x01, 0x5E, 0x9C, 0xDA)
        and int.from_bytes(head[:2], "big") % 31 == 0
    ):
        advice = (f"joblib writes such files; if you trust it: joblib.load({place!r})",)
        return Artifact(place, "zlib", "a zlib stream", "likely", source.nbytes, advice=advice)
    return None


def text_file(source: ByteSource, place: str, head: bytes) -> Artifact | None:
    """Describe JSON, YAML or another text; None if it is no text."""
    try:
        # A character may be cut at the end of what was read.
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) == source.nbytes:
            return None
        text = head[: error.start].decode("utf-8-sig", "replace")
    printable = sum(char.isprintable() or char in "\t\n\r\f\v\x1b" for char in text)
    if printable < len(text):
        return None
    stripped = text.lstrip()
    if stripped[:1] in ("{", "["):
        return _json(source, place)
    first = clean(stripped.partition("\n")[0])
    is_yaml = place.lower().endswith((".yaml", ".yml")) or re.match(
        r"(?:---\s|%YAML|[A-Za-z_][\w.-]{0,60}:(?:\s|$))", stripped
    )
    kind, title = ("yaml", "a YAML file") if is_yaml else ("text", "a text")
    return Artifact(
        place,
        kind,
        f"{title} that begins with {first!r}",
        "likely",
        source.nbytes,
        problems=("it is a text, no model",) if kind == "text" else (),
        advice=("look into it with an editor",),
    )


def _json(source: ByteSource, place: str) -> Artifact:
    problems: tuple[str, ...] = ()
    value: Any = None
    if source.nbytes <= _MAX_TEXT_NBYTES:
        try:
            value = bounded_json(source.read(0, source.nbytes))
        except ValueError as error:
            problems = (f"it begins like JSON, but is none: {clean(str(error))}",)
    title, advice = "a JSON file", "look into it with an editor"
    keys = [str(key) for key in list(value)[:200]] if isinstance(value, dict) else []
    if isinstance(value, dict) and "weight_map" in value:
        title, advice = "the index of a sharded model", "name the directory that it lies in"
    elif isinstance(value, dict) and {"architectures", "model_type"} & value.keys():
        title, advice = "the configuration of a transformers model", "name the directory that it lies in"
    elif isinstance(value, dict) and {"model", "added_tokens"} <= value.keys():
        title, advice = "a tokenizer of Hugging Face tokenizers", f"tokenizers.Tokenizer.from_file({place!r})"
    elif isinstance(value, dict) and value.keys() & {"error", "message"} and len(value) <= 6:
        problems += ("it may be the answer of a server that refused the download",)
    return Artifact(
        place,
        "json",
        title + (f" with {listed(keys)}" if keys else ""),
        "likely" if problems else "certain",
        source.nbytes,
        contents={clean(key): type(value[key]).__name__ for key in keys if key in value} if keys else {},
        problems=problems,
        advice=(advice,),
    )


def unknown(source: ByteSource, place: str, head: bytes) -> Artifact:
    """Describe a file that is none of what is known."""
    image = next((words for magic, words in _IMAGES.items() if head.startswith(magic)), None)
    shown = head[:16].hex(" ")
    return Artifact(
        place,
        "unknown",
        image or "a file of an unknown kind",
        "unknown",
        source.nbytes,
        problems=(f"it is {image}, no model" if image else f"nothing known begins with the bytes {shown}",),
        advice=("ask whoever made it which program wrote it",),
        details={"first_bytes": shown},
    )
