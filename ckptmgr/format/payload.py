"""What a save hands to the run floor: files to write, as buffers that no longer change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["FilePayload", "Scope", "TensorPayload"]

Scope: TypeAlias = Literal["replicated", "sharded", "per-rank"]


@dataclass(frozen=True, slots=True)
class TensorPayload:
    """One tensor, ready to be written.

    Attributes:
        name: Key within its safetensors file.
        entry: State entry that it belongs to, such as ``model``.
        dtype: Name of the stored dtype (see `encoding.ITEM_NBITS`).
        shape: Stored shape.
        data: The elements in row-major order, as one-dimensional bytes. Stays valid until the write has ended.
        encoding: ``plain``, or how the logical tensor was turned into the stored one.
        logical_dtype: dtype before the encoding, in torch's words; None for ``plain``.
        logical_shape: Shape before the encoding; None for ``plain``.
        order: Dimensions from the outermost in memory to the innermost, where the live tensor was not row-major.
        scope: Whether the tensor is the same on every rank, a part of a larger one, or a rank's own.
        rank: The rank that it belongs to, where the scope is not ``replicated``.
        global_shape: Shape of the whole, of which this is a shard.
        global_offset: Where the shard begins in the whole.
        aliases: Other names in the same entry that are this very tensor.
    """

    name: str
    entry: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    encoding: str = "plain"
    logical_dtype: str | None = None
    logical_shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    scope: Scope = "replicated"
    rank: int | None = None
    global_shape: tuple[int, ...] | None = None
    global_offset: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FilePayload:
    """One file of a checkpoint: either tensors, written as safetensors in this order, or a finished document.

    Attributes:
        name: Of the file, in the checkpoint's folder.
        tensors: What a tensor file holds.
        content: What a document holds.
        is_state: The document is a rank's state document.
        entry: State entry that a tool's own file belongs to.
        stored_as: What the entry's tree calls such a file.
        rank: Whose it is, where each rank has its own.
    """

    name: str
    tensors: tuple[TensorPayload, ...] = ()
    content: bytes | None = None
    is_state: bool = False
    entry: str | None = None
    stored_as: str | None = None
    rank: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of payload, without a header."""
        return len(self.content) if self.content is not None else sum(tensor.data.nbytes for tensor in self.tensors)
