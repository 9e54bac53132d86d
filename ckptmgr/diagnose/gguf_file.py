"""GGUF files of llama.cpp: metadata and tensors in a header, then data."""

from __future__ import annotations

import struct
from typing import Any, Final

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource, Window
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.plain_words import clean, plural
from ckptmgr.words import format_nbytes

__all__ = ["gguf_file"]

_MAX_PAIRS = 20_000
_MAX_TENSORS = 200_000
_MAX_TEXTS = 3_000_000
_NUMBERS: Final = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
# ggml type → name, elements of a block, bytes of a block.
_TYPES: Final = {
    0: ("float32", 1, 4),
    1: ("float16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("int8", 1, 1),
    25: ("int16", 1, 2),
    26: ("int32", 1, 4),
    27: ("int64", 1, 8),
    28: ("float64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("bfloat16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


class _BadGgufError(Exception):
    pass


def gguf_file(source: ByteSource, place: str) -> Artifact:
    """Describe a GGUF file."""
    window = Window(source, 4)
    pairs: dict[str, Any] = {}
    tensors: list[TensorFacts] = []
    problems: list[str] = []
    version, expected, left = 0, 0, [_MAX_TEXTS]
    try:
        version = window.uint(4)
        if not 2 <= version <= 100:
            raise _BadGgufError(f"version {version} is not known here")
        ntensors, npairs = window.uint(8), window.uint(8)
        if npairs > _MAX_PAIRS or ntensors > _MAX_TENSORS:
            raise _BadGgufError(f"it declares {ntensors} tensors and {npairs} entries")
        for _ in range(npairs):
            key = _text(window)
            pairs[clean(key)] = _value(window, window.uint(4), left)
        expected = _tensors(window, ntensors, tensors, pairs.get("general.alignment"))
    except EOFError:
        problems.append(f"truncated: its header is not whole; the file ends after {source.nbytes} bytes")
    except _BadGgufError as error:
        problems.append(f"its header cannot be read: {error}")
    if expected > source.nbytes:
        problems.append(
            f"truncated: it ends after {source.nbytes} bytes, and should have {expected}"
            f" ({format_nbytes(source.nbytes)} of {format_nbytes(expected)})"
        )
    architecture = pairs.get("general.architecture")
    name = pairs.get("general.name")
    versions = {"gguf": str(version)}
    title = "a GGUF file of " + plural(len(tensors), "tensor")
    if isinstance(architecture, str):
        title += f", architecture {architecture}"
    return Artifact(
        place=place,
        kind="gguf",
        title=title,
        certainty="certain" if 2 <= version <= 100 else "likely",
        nbytes=source.nbytes,
        versions=versions,
        tensors=tuple(tensors) if tensors or not problems else None,
        contents={key: clean(str(value)) for key, value in list(pairs.items())[:200]},
        problems=tuple(problems),
        advice=(
            f"llama.cpp runs it: llama-cli -m {place}",
            f"transformers reads some architectures: AutoModelForCausalLM.from_pretrained(DIR, gguf_file={place!r})",
            compared("gguf", None, installed_version("gguf")),
        ),
        details={"architecture": architecture, "name": name},
    )


def _text(window: Window, limit: int = 1 << 16) -> str:
    nbytes = window.uint(8)
    if nbytes > window.remaining:
        raise EOFError
    if nbytes <= limit:
        return window.read(nbytes).decode("utf-8", "replace")
    head = window.peek(200).decode("utf-8", "replace")
    window.skip(nbytes)
    return head


def _value(window: Window, kind: int, left: list[int]) -> Any:
    code = _NUMBERS.get(kind)
    if code is not None:
        return struct.unpack(code, window.read(struct.calcsize(code)))[0]
    if kind == 8:
        return clean(_text(window), 200)
    if kind != 9:
        raise _BadGgufError(f"a value of kind {kind}")
    inner, count = window.uint(4), window.uint(8)
    size = struct.calcsize(_NUMBERS[inner]) if inner in _NUMBERS else 8
    if count * size > window.remaining:
        raise EOFError
    if inner in _NUMBERS:
        window.skip(count * size)
        return f"list of {count}"
    left[0] -= count
    if inner != 8 or left[0] < 0:
        raise _BadGgufError(f"a list of {count} values of kind {inner}")
    for _ in range(count):
        window.skip(window.uint(8))
    return f"list of {count}"


def _tensors(window: Window, count: int, tensors: list[TensorFacts], alignment: Any) -> int:
    """Read the descriptions of tensors; return the size that the file should have."""
    step = alignment if isinstance(alignment, int) and 0 < alignment <= 1 << 20 else 32
    ends = 0
    for _ in range(count):
        name, ndims = _text(window), window.uint(4)
        if ndims > 8:
            raise _BadGgufError(f"a tensor of {ndims} dimensions")
        # ggml counts dimensions from the innermost one.
        shape = tuple(reversed([window.uint(8) for _ in range(ndims)]))
        kind, offset = window.uint(4), window.uint(8)
        dtype, nelements, nbytes = _TYPES.get(kind, (f"ggml type {kind}", 1, 0))
        numel = 1
        for size in shape:
            numel *= size
        tensors.append(TensorFacts(clean(name, 300), dtype, shape))
        ends = max(ends, offset + -(-numel // nelements) * nbytes)
    data = -(-window.position // step) * step
    return data + ends if count else 0
