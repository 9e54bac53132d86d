"""Files of the safetensors format: eight bytes of header length, JSON, data."""

from __future__ import annotations

import shlex
from itertools import pairwise
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource
from ckptmgr.diagnose.plain_words import clean, listed, plural
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.encoding import DTYPE_WORDS, numel
from ckptmgr.format.safetensors_header import MAX_HEADER_NBYTES, SAFETENSORS_NBITS, Claim, parse_header
from ckptmgr.words import format_nbytes

__all__ = ["looks_like_safetensors", "read_safetensors", "safetensors_file"]

MAX_READ_NBYTES = 32 << 20
_DTYPES = DTYPE_WORDS | {
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
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
    if nheader > MAX_READ_NBYTES:
        return (), {}, ["its header cannot be read: it is too large to look into"], None
    try:
        header = parse_header(lambda start, stop: source.read(start, stop - start), source.nbytes)
    except CorruptCheckpointError as error:
        why = (error.why or error.what).removeprefix("its header is ")
        return (), {}, [f"its header cannot be read: {clean(why, 500)}"], None
    metadata = {clean(key): clean(value, 200) for key, value in list(header.metadata.items())[:100]}
    tensors: list[TensorFacts] = []
    problems: list[str] = []
    for name, claim in header.claims.items():
        fact = _tensor(name, claim)
        if isinstance(fact, str):
            problems.append(fact)
        else:
            tensors.append(fact)
    spans = sorted((claim.begin, claim.end) for claim in header.claims.values())
    expected = header.data_start + max((stop for _, stop in spans), default=0)
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


def _tensor(name: str, claim: Claim) -> TensorFacts | str:
    name = clean(name, 300)
    if claim.begin > claim.end:
        return f"its tensor {name!r} has no sound place"
    nbits = SAFETENSORS_NBITS.get(claim.dtype)
    if nbits is not None and numel(claim.shape) * nbits != (claim.end - claim.begin) * 8:
        have = claim.end - claim.begin
        return f"its tensor {name!r} of shape {clean(str(list(claim.shape)))} does not fit in its {have} bytes"
    return TensorFacts(name, _DTYPES.get(claim.dtype, clean(claim.dtype, 40)), claim.shape)


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
