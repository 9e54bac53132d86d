"""Files of the safetensors format: eight bytes of header length, JSON, data."""

from __future__ import annotations

import shlex
from itertools import pairwise
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource
from ckptmgr.diagnose.pickle_calls import shape_of
from ckptmgr.diagnose.plain_words import clean, listed, plural
from ckptmgr.diagnose.small_json import bounded_json
from ckptmgr.words import format_nbytes

__all__ = ["looks_like_safetensors", "read_safetensors", "safetensors_file"]

MAX_HEADER_NBYTES = 100_000_000  # the format's own limit
MAX_READ_NBYTES = 32 << 20
_DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_MAX_PROBLEMS = 20


def looks_like_safetensors(head: bytes) -> bool:
    """Say whether the first bytes are those of a safetensors file: a plausible length, then ``{``."""
    return 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER_NBYTES and head[8:9] == b"{"


def read_safetensors(
    source: ByteSource,
) -> tuple[tuple[TensorFacts, ...], dict[str, str], list[str], int | None]:
    """Read the header.

    Returns:
        Tensors in the order of the header, metadata, problems, and the size that the file should have in bytes; None
        where the header does not tell it.
    """
    nheader = int.from_bytes(source.read(0, 8), "little")
    if 8 + nheader > source.nbytes:
        problem = f"truncated: its header alone needs {8 + nheader} bytes, the file ends after {source.nbytes}"
        return (), {}, [problem], None
    try:
        header = bounded_json(source.read(8, min(nheader, MAX_READ_NBYTES + 1)))
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        return (), {}, [f"its header cannot be read: {clean(str(error))}"], None
    raw = header.pop("__metadata__", {})
    pairs = list(raw.items())[:100] if isinstance(raw, dict) else []
    metadata = {clean(key): clean(str(value), 200) for key, value in pairs if isinstance(value, str)}
    tensors: list[TensorFacts] = []
    problems: list[str] = []
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        fact = _tensor(name, entry, spans)
        if isinstance(fact, str):
            problems.append(fact)
        else:
            tensors.append(fact)
    expected = 8 + nheader + max((stop for _, stop in spans), default=0)
    spans.sort()
    if any(start < stop for (_, stop), (start, _) in pairwise(spans)):
        problems.append("its tensors lie over each other")
    if expected > source.nbytes:
        problems.insert(
            0,
            f"truncated: it ends after {source.nbytes} bytes, and should have {expected}"
            f" ({format_nbytes(source.nbytes)} of {format_nbytes(expected)})",
        )
    elif expected < source.nbytes:
        problems.append(f"{source.nbytes - expected} bytes follow its last tensor, which the format forbids")
    return tuple(tensors), metadata, problems[:_MAX_PROBLEMS], expected


def _tensor(name: str, entry: Any, spans: list[tuple[int, int]]) -> TensorFacts | str:
    name = clean(name, 300)
    if not isinstance(entry, dict):
        return f"its tensor {name!r} is not described"
    shape, offsets, code = shape_of(entry.get("shape")), entry.get("data_offsets"), entry.get("dtype")
    is_span = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
    if shape is None or offsets is None or not is_span or not isinstance(code, str) or offsets[0] > offsets[1]:
        return f"its tensor {name!r} has no sound dtype, shape and place"
    dtype, nbits = _DTYPES.get(code, (clean(code, 40), None))
    spans.append((offsets[0], offsets[1]))
    if nbits is not None:
        needed = nbits
        for size in shape:
            needed *= size
        if needed != (offsets[1] - offsets[0]) * 8:
            have = offsets[1] - offsets[0]
            return f"its tensor {name!r} of shape {clean(str(list(shape)))} does not fit in its {have} bytes"
    return TensorFacts(name, dtype, shape)


def safetensors_file(source: ByteSource, place: str) -> Artifact:
    """Describe a safetensors file."""
    tensors, metadata, problems, expected = read_safetensors(source)
    is_whole = not problems
    advice = (
        (f"ckptmgr import {shlex.quote(place)} RUN_DIR", f"safetensors.torch.load_file({place!r})")
        if is_whole
        else ("it is not what was written: copy or download it again, and compare the sizes",)
    )
    versions = {"format": metadata["format"]} if "format" in metadata else {}
    details: dict[str, Any] = {"metadata": metadata}
    if expected is not None:
        details["expected_nbytes"] = expected
    return Artifact(
        place=place,
        kind="safetensors",
        title=f"a safetensors file of {plural(len(tensors), 'tensor')}",
        certainty="certain" if expected is not None else "likely",
        nbytes=source.nbytes,
        versions=versions,
        tensors=tensors,
        contents={"metadata": listed(list(metadata), 10)} if metadata else {},
        problems=tuple(problems),
        advice=advice,
        details=details,
    )
