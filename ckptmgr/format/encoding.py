"""The bytes of a safetensors file: dtype names, and a header padded so that data start on a page.

Only what a writer needs. Readers find tensors by the manifest's offsets; anybody else's safetensors reader finds them
by the header.

Source:
    The safetensors format (https://github.com/huggingface/safetensors): eight bytes of header length, JSON, data
    without holes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["ALIGNMENT", "DTYPE_WORDS", "ITEM_NBITS", "numel", "payload_nbytes", "safetensors_header"]

ALIGNMENT = 4096

ITEM_NBITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype name that format version 1 stores."""

DTYPE_WORDS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""What torch calls them."""


class _Described(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def numel(shape: Sequence[int]) -> int:
    """Return the number of elements; 1 for the empty shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def payload_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size in bytes of a dense tensor.

    Raises:
        KeyError: The dtype is none that the format stores.
    """
    return numel(shape) * ITEM_NBITS[dtype] // 8


def safetensors_header(tensors: Sequence[_Described], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Build the header of a file that holds these tensors in this order, without gaps.

    Spaces at its end, which the safetensors format allows, bring the data to a multiple of 4 KiB: page-aligned reads
    and direct I/O then need no copy.

    Args:
        tensors: Name, dtype and shape of each.
        metadata: Goes into the header's ``__metadata__``, beside ``format``.
    """
    header: dict[str, object] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.name in header:
            raise ValueError(f"{tensor.name!r} would stand twice in one file")
        end = offset + payload_nbytes(tensor.dtype, tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
