"""How one torch tensor lies in a safetensors file, and how it becomes a tensor again.

Most tensors are stored as they are. What safetensors has no name for is stored as something that it has: complex
numbers as pairs of reals (``complex``), rare dtypes as the integers of their bits (``bits``). Sparse tensors are stored
as their component tensors (`codec` takes them apart). Everything else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.format.encoding import payload_nbytes
from ckptmgr.format.manifest import TensorRecord
from ckptmgr.state.sharding import local_of

__all__ = [
    "DTYPES",
    "STORED_DTYPES",
    "StoredTensor",
    "dimension_order",
    "dtype_name",
    "memory_identity",
    "refuse_unstorable",
    "same_bits",
    "store_tensor",
    "tensor_from_bytes",
]

STORED_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""Names of the dtypes that are stored as they are."""

_LOADED_DTYPES = {name: dtype for dtype, name in STORED_DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's word for a dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


DTYPES: dict[str, torch.dtype] = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
"""Every dtype of this torch by its word: a name from a document is looked up here and nowhere else."""


@dataclass(slots=True)
class StoredTensor:
    """One tensor of a file, before its bytes are copied.

    Attributes:
        source: View of the live memory with the stored dtype and shape.
        aliases: Further names of the same tensor, found while walking the tree.
        global_shape: Shape of the whole, where this is one rank's shard of it.
        global_offset: Where the shard begins in the whole.
    """

    name: str
    source: torch.Tensor | np.ndarray[Any, Any]
    dtype: str
    encoding: str = "plain"
    logical_dtype: str | None = None
    logical_shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    aliases: list[str] = field(default_factory=list)
    global_shape: tuple[int, ...] | None = None
    global_offset: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""
        return tuple(self.source.shape)

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return payload_nbytes(self.dtype, self.shape)


def refuse_unstorable(tensor: torch.Tensor, path: str) -> None:
    """Refuse what has no stored form in this format version.

    Raises:
        UnsupportedStateError: Uninitialised, meta, quantized, nested, or a tensor subclass with its own dispatch.
    """
    why: str | None = None
    next = "leave it out of the state, or turn it into a plain tensor first"
    if torch.nn.parameter.is_lazy(tensor):
        why = "it is not initialised: its shape is not known yet"
        next = "run one batch through the module before the first capture"
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = type(tensor)
        why = f"{kind.__module__}.{kind.__qualname__} is a tensor subclass with rules of its own"
        if kind.__name__ == "DTensor":
            why = "it is a DTensor, one rank's part of a larger tensor; this version saves whole tensors only"
            next = "save with DDP or on one device; sharded state comes with a later version"
    elif tensor.device.type == "meta":
        why = "it is on the meta device and has no values"
        next = "materialise the module first: module.to_empty(device=...), then initialise it"
    elif tensor.is_quantized:
        why = "quantized tensors carry scales that safetensors cannot hold"
    elif tensor.is_nested:
        why = "nested tensors have no single shape"
    elif tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
        why = "its memory is opaque (layout mkldnn)"
        next = "call .to_dense() first"
    if why is not None:
        raise UnsupportedStateError(f"{path} is a tensor that cannot be stored", why=why, next=next)


def store_tensor(tensor: torch.Tensor, name: str, path: str) -> StoredTensor:
    """Describe how a dense tensor is stored, without copying it.

    Raises:
        UnsupportedStateError: Its dtype cannot be stored.
    """
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor:
        tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    order = dimension_order(tensor.shape, tensor.stride())
    if tensor.dtype in STORED_DTYPES:
        return StoredTensor(name, tensor, STORED_DTYPES[tensor.dtype], order=order)
    logical: dict[str, Any] = {"logical_dtype": dtype_name(tensor.dtype), "logical_shape": tuple(tensor.shape)}
    if tensor.is_complex():
        parts = torch.view_as_real(tensor)
        # The pair is the innermost dimension whatever the order of the others.
        pair_order = None if order is None else (*order, tensor.dim())
        return StoredTensor(name, parts, STORED_DTYPES[parts.dtype], encoding="complex", order=pair_order, **logical)
    if tensor.dtype.itemsize not in _BITS:
        raise UnsupportedStateError(
            f"{path} is a tensor that cannot be stored",
            why=f"elements of {tensor.dtype} have {tensor.dtype.itemsize} bytes",
            next="convert it to another dtype first",
        )
    bits = tensor.view(_BITS[tensor.dtype.itemsize])
    return StoredTensor(name, bits, STORED_DTYPES[bits.dtype], encoding="bits", order=order, **logical)


def dimension_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """Return the dimensions from the outermost in memory to the innermost; None for row-major, or where memory has
    holes.

    The order is None too for views with holes or overlaps: they are stored, and come back, dense and row-major.
    """
    if len(shape) < 2 or 0 in shape or 0 in stride:
        return None
    order = tuple(sorted(range(len(shape)), key=lambda dim: (-stride[dim], -shape[dim], dim)))
    if order == tuple(range(len(shape))):
        return None
    expected = 1
    for dim in reversed(order):
        # The stride of a dimension of size 1 moves nothing.
        if shape[dim] != 1 and stride[dim] != expected:
            return None
        expected *= shape[dim]
    return order


def memory_identity(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Return what two tensors share if they are the same memory seen in the same way; None for no memory at all."""
    tensor = local_of(tensor)
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    seen = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *seen)


def tensor_from_bytes(record: TensorRecord, data: memoryview) -> torch.Tensor:
    """Build a CPU tensor from stored bytes, in the memory order that the live tensor had.

    Takes the bytes over where they are writable and in order already; else copies them once.

    Raises:
        CorruptCheckpointError: The record contradicts itself, or names a dtype that this torch lacks.
    """
    try:
        stored = _from_buffer(data, _LOADED_DTYPES[record.dtype], record.shape)
        if record.order is not None:
            stored = torch.empty_permuted(record.shape, record.order, dtype=stored.dtype).copy_(stored)
        # A sparse tensor's components are plain ones; the state document says how they belong together.
        if record.encoding == "plain" or record.encoding.startswith("sparse_"):
            return stored
        logical = DTYPES[record.logical_dtype or ""]
        if record.encoding == "complex":
            tensor = torch.view_as_complex(stored)
        elif record.encoding == "bits":
            tensor = stored.view(logical)
        else:
            raise ValueError(f"the encoding {record.encoding!r} is not one of this version")
        if tensor.dtype != logical or tuple(tensor.shape) != record.logical_shape:
            raise ValueError(f"it decodes to {tensor.dtype} {tuple(tensor.shape)}")
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CorruptCheckpointError(
            f"tensor {record.name!r} of {record.entry!r} cannot be rebuilt from its record",
            why=f"dtype {record.dtype}, shape {record.shape}, encoding {record.encoding}, logical dtype "
            f"{record.logical_dtype}: {error}",
            next="if another version of torch wrote the checkpoint, load it with that one",
        ) from error
    return tensor


def _from_buffer(data: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    buffer = bytearray(data) if data.readonly else data
    return torch.frombuffer(buffer, dtype=dtype).reshape(tuple(shape))


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Say whether two dense tensors have the same dtype, shape and bits; NaNs are compared by their bits too."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(_as_integers(first), _as_integers(second))


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.cpu().view(_BITS[tensor.dtype.itemsize])
