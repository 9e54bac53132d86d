"""TensorFlow's files: the protocol buffer of a SavedModel, and the index of a checkpoint's variables."""

from __future__ import annotations

from collections.abc import Iterator

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.byte_source import Bytes, ByteSource, Window
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.plain_words import clean
from ckptmgr.diagnose.protobuf import BadProtobufError, Field, fields, small_text, varint

__all__ = [
    "TABLE_MAGIC",
    "checkpoint_variables",
    "is_checkpoint_index",
    "saved_model_tags",
    "tensorflow_notes",
]

TABLE_MAGIC = 0xDB4775248B80FB57
_FOOTER_NBYTES = 48
_MAX_BLOCK_NBYTES = 4 << 20
_MAX_ENTRIES = 200_000
_DTYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    7: "string",
    8: "complex64",
    9: "int64",
    10: "bool",
    11: "qint8",
    12: "quint8",
    13: "qint32",
    14: "bfloat16",
    17: "uint16",
    18: "complex128",
    19: "float16",
    20: "resource",
    21: "variant",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
}


def saved_model_tags(source: ByteSource) -> tuple[str | None, list[str]]:
    """Return the TensorFlow version that wrote a ``saved_model.pb``, and its tags; the version is None if untold.

    Raises:
        BadProtobufError: It is no SavedModel.
    """
    version: str | None = None
    tags: list[str] = []
    is_model = False
    for graph in fields(source, 0, source.nbytes):
        if graph.number not in (1, 2) or (graph.number, graph.wire) not in ((1, 0), (2, 2)):
            raise BadProtobufError("it is no SavedModel")
        if graph.number == 1:
            is_model = True
            continue
        for meta in fields(source, graph.start, graph.start + graph.value):
            if meta.number == 1 and meta.wire == 2:
                for entry in fields(source, meta.start, meta.start + meta.value):
                    if entry.number == 5 and version is None:
                        version = clean(small_text(source, entry), 40) or None
                    elif entry.number == 4 and len(tags) < 10:
                        tags.append(clean(small_text(source, entry), 40))
                break
    if not is_model:
        raise BadProtobufError("it is no SavedModel")
    return version, tags


def is_checkpoint_index(source: ByteSource) -> bool:
    """Say whether a file is the index of a TensorFlow checkpoint, by the magic number at its end."""
    tail = source.read(max(0, source.nbytes - 8), 8)
    return source.nbytes > _FOOTER_NBYTES and int.from_bytes(tail, "little") == TABLE_MAGIC


def checkpoint_variables(source: ByteSource) -> tuple[list[TensorFacts], int, list[str]]:
    """List the variables of a checkpoint by its index.

    Returns:
        Variables, the number of data files, and problems.
    """
    tensors: list[TensorFacts] = []
    nshards, problems = 1, []
    try:
        for key, value in _table(source):
            if key == b"":
                nshards = next((f.value for f in fields(Bytes(value), 0, len(value)) if f.number == 1), 1)
                continue
            dtype, shape = _entry(value)
            name = key.decode("utf-8", "replace").removesuffix("/.ATTRIBUTES/VARIABLE_VALUE")
            if dtype != "string" and name != "_CHECKPOINTABLE_OBJECT_GRAPH":
                tensors.append(TensorFacts(clean(name, 300), dtype, shape))
    except (BadProtobufError, EOFError) as error:
        problems.append(f"its index is damaged: {clean(str(error))}")
    return tensors, nshards, problems


def _entry(value: bytes) -> tuple[str, tuple[int, ...]]:
    source = Bytes(value)
    dtype, shape = "unknown", []
    for entry in fields(source, 0, len(value), limit=1000):
        if entry.number == 1 and entry.wire == 0:
            dtype = _DTYPES.get(entry.value, f"tensorflow dtype {entry.value}")
        elif entry.number == 2 and entry.wire == 2:
            for dim in fields(source, entry.start, entry.start + entry.value, limit=1000):
                shape.append(_size(source, dim) if dim.number == 2 and dim.wire == 2 else 0)
    return dtype, tuple(shape[:64])


def _size(source: ByteSource, dim: Field) -> int:
    inner = fields(source, dim.start, dim.start + dim.value, limit=10)
    return next((field.value for field in inner if field.number == 1 and field.wire == 0), 0)


def _table(source: ByteSource) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a LevelDB table, which is what the index is."""
    footer = Window(source, source.nbytes - _FOOTER_NBYTES)
    varint(footer), varint(footer)
    index = _block(source, varint(footer), varint(footer))
    count = 0
    for _, handle in _block_entries(index):
        place = Window(Bytes(handle))
        for key, value in _block_entries(_block(source, varint(place), varint(place))):
            count += 1
            if count > _MAX_ENTRIES:
                raise BadProtobufError("it has too many entries")
            yield key, value


def _block(source: ByteSource, start: int, nbytes: int) -> bytes:
    if nbytes > _MAX_BLOCK_NBYTES or start + nbytes + 1 > source.nbytes:
        raise BadProtobufError("a block lies outside of the file")
    data = source.read(start, nbytes + 1)
    if data[-1:] != b"\0":
        raise BadProtobufError("a block is compressed")
    return data[:-1]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise BadProtobufError("a block is too short")
    stop = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    window, key = Window(Bytes(block)), b""
    while window.position < stop:
        shared, added, nbytes = varint(window), varint(window), varint(window)
        if shared > len(key) or added > 1 << 16:
            raise BadProtobufError("a key is damaged")
        key = key[:shared] + window.read(added)
        yield key, window.read(nbytes)


def tensorflow_notes(version: str | None) -> list[str]:
    """Return what is to be known about a file that this version of TensorFlow wrote, and about the one that is here."""
    names = ("tensorflow", "tensorflow-cpu", "tensorflow_cpu", "tf-nightly")
    notes = [compared("tensorflow", version, installed_version(*names))]
    if version is not None:
        notes.append(
            f"TensorFlow promises to load what older versions wrote, not what newer ones did: use {version} or newer"
        )
    return notes
