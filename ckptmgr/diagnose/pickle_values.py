"""What a pickle would build, as symbols: containers with their contents, objects by the name of their class.

Symbols compare by identity and are never hashed by content: a hostile pickle nests tuples a million deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ckptmgr.diagnose.pickle_opcodes import Blob, LongText

__all__ = [
    "Array",
    "Dict",
    "Global",
    "Object",
    "Set",
    "Storage",
    "Symbol",
    "Tensor",
    "as_mapping",
    "in_words",
    "type_words",
]

Symbol: TypeAlias = Any
"""None, a bool, a number, a text, a tuple or list of symbols, or one of the classes here."""


@dataclass(slots=True, eq=False)
class Global:
    """A class or function, by name: ``torch.float32``, ``os.system``."""

    name: str


@dataclass(slots=True, eq=False)
class Dict:
    """A mapping.

    Attributes:
        pairs: Keys and values in order; a key that is set twice stands twice.
        kind: ``dict``, or the class's name.
        state: Attributes that the mapping object has besides, such as ``_metadata`` of a state dict.
    """

    pairs: list[tuple[Symbol, Symbol]] = field(default_factory=list)
    kind: str = "dict"
    state: Symbol = None

    def get(self, key: str) -> Symbol:
        """Return the last value of a text key; None if there is none."""
        for other, value in reversed(self.pairs):
            if type(other) is str and other == key:
                return value
        return None

    def keys(self) -> list[str]:
        """Return the text keys, each once, in order."""
        return list(dict.fromkeys(key for key, _ in self.pairs if type(key) is str))

    def items(self) -> Iterator[tuple[str, Symbol]]:
        """Yield text keys, each once, with their last values."""
        last = {key: value for key, value in self.pairs if type(key) is str}
        yield from last.items()

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(slots=True, eq=False)
class Set:
    """A set; of what is not told apart."""

    members: list[Symbol] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Storage:
    """The memory of tensors, which lies outside of the pickle.

    Attributes:
        dtype: Of its elements; ``uint8`` where it is bytes.
        key: Name of the record, or number in the file.
        location: Device that it was on, such as ``cuda:0``.
        numel: Elements.
        start: Offset of its bytes in the source of the pickle, where they lie within the pickle itself.
    """

    dtype: str
    key: str
    location: str
    numel: int
    start: int | None = None

    @property
    def root(self) -> str:
        """Key of the storage that this one is a view of, in files of before 2018; else its own."""
        return self.key.partition("+")[0]

    @property
    def first(self) -> int:
        """Where a view begins in that storage, in elements."""
        offset = self.key.partition("+")[2]
        return int(offset) if offset.removeprefix("-").isdecimal() and len(offset) < 20 else 0


@dataclass(slots=True, eq=False)
class Tensor:
    """A tensor without its elements.

    Attributes:
        storage: None where it has none of its own.
        offset, stride: In elements.
        note: What else there is to it: ``sparse``; ``conjugate`` or ``negative`` where its memory holds that.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: Storage | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()
    note: str | None = None


@dataclass(slots=True, eq=False)
class Array:
    """A NumPy array without its elements."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Object:
    """An object of a class that is only known by name, or the result of a call.

    Attributes:
        of: Name of the class, or of the function that is called.
        args: What it is made from.
        state: What it is given afterwards; of a module its ``__dict__``.
        pairs: What is set in it afterwards, if it is a mapping.
        members: What is appended to it, if it is a sequence.
    """

    of: str
    args: Symbol = None
    state: Symbol = None
    pairs: list[tuple[Symbol, Symbol]] | None = None
    members: list[Symbol] | None = None


def as_mapping(value: Symbol) -> Dict | None:
    """Return a mapping, also one of a class that is only known by name; None for anything else."""
    if isinstance(value, Dict):
        return value
    if isinstance(value, Object) and value.pairs is not None:
        return Dict(value.pairs, kind=value.of, state=value.state)
    return None


def type_words(value: Symbol) -> str:
    """Return what a value is, without its contents: ``dict``, ``int``, ``object of my_project.Net``."""
    if isinstance(value, (Object, Dict)):
        return f"object of {value.of}" if isinstance(value, Object) else value.kind.rpartition(".")[2]
    if isinstance(value, Blob):
        return "bytes"
    if isinstance(value, LongText):
        return "str"
    if isinstance(value, Set):
        return "set"
    if isinstance(value, Global):
        return value.name
    return "None" if value is None else type(value).__name__


def in_words(value: Symbol) -> str:
    """Return a few words about a value: its own text if it is short, else what and how many."""
    if value is None or isinstance(value, (bool, int, float)):
        return _number_words(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}… ({len(value)} characters)"
    if isinstance(value, (Tensor, Array)):
        return f"{value.dtype} {_shape_words(value.shape)}"
    if isinstance(value, (Blob, LongText)):
        return f"{value.nbytes} bytes"
    if isinstance(value, (list, tuple, Set, Dict)):
        count = len(value.members if isinstance(value, Set) else value)
        return f"{type_words(value)} of {count}" if count else f"empty {type_words(value)}"
    return type_words(value)


def _number_words(value: float | None) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def _shape_words(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape[:16]) + "]" if shape else "scalar"
