"""MessagePack files of Flax: nested maps whose arrays are extensions of type 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource, Window
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.plain_words import clean, plural

__all__ = ["msgpack_file"]

_MAX_VALUES = 500_000
_MAX_DEPTH = 64
_MAX_HEADER_NBYTES = 4096


class _BadMsgpackError(Exception):
    pass


@dataclass(slots=True)
class _Tree:
    tensors: list[TensorFacts] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)
    nvalues: int = 0
    has_chunks: bool = False


def msgpack_file(source: ByteSource, place: str) -> Artifact | None:
    """Describe a file of Flax; None if it is none."""
    window, tree = Window(source), _Tree()
    first = source.read(0, 1)
    if not first or not (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)):
        return None
    problems = []
    try:
        _value(window, tree, "", 0)
        if window.remaining:
            return None
    except _BadMsgpackError:
        return None
    except EOFError:
        if not tree.tensors:
            return None
        problems.append(f"truncated: it ends after {source.nbytes} bytes, within a value")
    if not tree.tensors:
        return None
    return Artifact(
        place=place,
        kind="flax-msgpack",
        title=f"a MessagePack file of Flax, of {plural(len(tree.tensors), 'array')}",
        certainty="likely" if problems else "certain",
        nbytes=source.nbytes,
        tensors=tuple(tree.tensors),
        contents=tree.contents,
        problems=tuple(problems),
        advice=(
            f"flax.serialization.msgpack_restore(open({place!r}, 'rb').read()) gives nested dicts of NumPy arrays",
            "a transformers model: Model.from_pretrained(DIR, from_flax=True), where transformers still has Flax",
            compared("flax", None, installed_version("flax")),
        ),
    )


def _value(window: Window, tree: _Tree, name: str, depth: int) -> Any:
    tree.nvalues += 1
    if depth > _MAX_DEPTH or tree.nvalues > _MAX_VALUES:
        raise _BadMsgpackError
    code = window.read(1)[0]
    if code <= 0x7F or code >= 0xE0:
        return code
    if 0x80 <= code <= 0x8F or code in (0xDE, 0xDF):
        count = code & 0xF if code <= 0x8F else _big(window, 2 if code == 0xDE else 4)
        return _map(window, tree, name, depth, count)
    if 0x90 <= code <= 0x9F or code in (0xDC, 0xDD):
        count = code & 0xF if code <= 0x9F else _big(window, 2 if code == 0xDC else 4)
        values: list[Any] = []
        for index in range(count):
            value = _value(window, tree, f"{name}.{index}", depth + 1)
            if len(values) < 64:
                values.append(value)
        return tuple(values)
    if 0xA0 <= code <= 0xBF or 0xD9 <= code <= 0xDB:
        nbytes = code & 0x1F if code <= 0xBF else _big(window, 1 << (code - 0xD9))
        text = window.peek(min(nbytes, 300)).decode("utf-8", "replace")
        window.skip(nbytes)
        return text
    if code in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[code]
    if 0xC4 <= code <= 0xC6:
        nbytes = _big(window, 1 << (code - 0xC4))
        window.skip(nbytes)
        return nbytes
    if 0xC7 <= code <= 0xC9:
        nbytes = _big(window, 1 << (code - 0xC7))
        return _extension(window, tree, name, nbytes)
    if 0xD4 <= code <= 0xD8:
        return _extension(window, tree, name, 1 << (code - 0xD4))
    sizes = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
    if code not in sizes:
        raise _BadMsgpackError
    return _big(window, sizes[code])


def _map(window: Window, tree: _Tree, name: str, depth: int, count: int) -> None:
    for _ in range(count):
        key = _value(window, tree, name, depth + 1)
        if not isinstance(key, str):
            raise _BadMsgpackError
        inner = clean(f"{name}.{key}" if name else key, 300)
        value = _value(window, tree, inner, depth + 1)
        if depth == 0 and len(tree.contents) < 200:
            tree.contents[clean(key)] = "map" if value is None else type(value).__name__


def _extension(window: Window, tree: _Tree, name: str, nbytes: int) -> str:
    kind = window.read(1)[0]
    start = window.position
    if nbytes > window.remaining:
        # The array is cut off, but its description may be there.
        _array(window, tree, name)
        raise EOFError
    if kind == 1:
        _array(window, tree, name)
    window.position = start
    window.skip(nbytes)
    return "array" if kind == 1 else f"extension {kind}"


def _array(window: Window, tree: _Tree, name: str) -> None:
    """Read the description of an array: a list of shape, dtype's name, and bytes, which are not read."""
    head, inner = Window(_Head(window)), _Tree()
    try:
        if head.read(1) != b"\x93":
            raise _BadMsgpackError
        shape, dtype = _value(head, inner, "", 0), _value(head, inner, "", 0)
    except EOFError as cause:
        raise _BadMsgpackError from cause
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape) or not isinstance(dtype, str):
        raise _BadMsgpackError
    tree.tensors.append(TensorFacts(name, clean(dtype, 40), shape))


class _Head:
    """The next 4 KiB of a window."""

    def __init__(self, window: Window) -> None:
        self._data = window.peek(_MAX_HEADER_NBYTES)
        self.nbytes = len(self._data)

    def read(self, start: int, nbytes: int) -> bytes:
        return self._data[start : start + nbytes]


def _big(window: Window, nbytes: int) -> int:
    return int.from_bytes(window.read(nbytes), "big")
