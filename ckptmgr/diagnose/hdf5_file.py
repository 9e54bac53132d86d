"""HDF5 files, those of Keras above all: the weights of a model by a minimal reader of the older file structure.

Keras and h5py write the oldest structure by default (superblock 0, groups as symbol tables), which is enough to list
groups, datasets and the version of Keras. Anything newer is recognised, and not listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource, Window
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.plain_words import clean, plural
from ckptmgr.diagnose.tensorflow_files import tensorflow_notes

__all__ = ["HDF5_MAGIC", "Hdf5Contents", "hdf5_file", "keras_version_notes", "read_hdf5"]

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = 0xFFFFFFFFFFFFFFFF
_MAX_OBJECTS = 20_000
_SCANNED_NBYTES = 4 << 20
_VERSION = re.compile(rb"\d{1,3}\.\d{1,3}(?:\.\d{1,3})?(?:[-.a-z]{1,4}\d{0,3})?")


class _BadHdf5Error(Exception):
    pass


@dataclass(slots=True)
class Hdf5Contents:
    """What an HDF5 file tells.

    Attributes:
        datasets: In the order of the file; None where its structure is too new to be listed here.
        keras_version, backend: As Keras wrote them.
        has_model: The architecture is there too, not the weights alone.
        nbytes: Size that the file says it has.
        problems: What is wrong with it.
    """

    datasets: list[TensorFacts] | None = None
    keras_version: str | None = None
    backend: str | None = None
    has_model: bool = False
    nbytes: int | None = None
    problems: list[str] = field(default_factory=list)


def read_hdf5(source: ByteSource) -> Hdf5Contents:
    """Read what can be read cheaply."""
    found = Hdf5Contents()
    head = source.read(0, 96)
    version = head[8] if len(head) > 8 else 255
    if version in (0, 1) and len(head) == 96 and head[13] == 8 and head[14] == 8:
        base = 24 if version == 0 else 28
        found.nbytes = int.from_bytes(head[base + 16 : base + 24], "little")
        root = int.from_bytes(head[base + 40 : base + 48], "little")
        try:
            found.datasets = _datasets(source, root)
        except (_BadHdf5Error, EOFError) as error:
            found.problems.append(f"its structure is damaged: {error}")
    elif version in (2, 3) and len(head) >= 48:
        found.nbytes = int.from_bytes(head[28:36], "little")
    elif version > 3:
        found.problems.append(f"its version, {version}, is not known here")
    if found.nbytes is not None and source.nbytes < found.nbytes < _UNDEFINED:
        found.problems.insert(0, f"truncated: it ends after {source.nbytes} bytes, and should have {found.nbytes}")
    _scan_for_keras(source, found)
    return found


def _scan_for_keras(source: ByteSource, found: Hdf5Contents) -> None:
    data = source.read(0, _SCANNED_NBYTES)
    at = data.find(b"keras_version\0")
    found.has_model = b"model_config\0" in data
    if at >= 0:
        near = _VERSION.search(data, at + 14, at + 120)
        # Texts of variable length lie in a heap elsewhere.
        heap = data.find(b"GCOL")
        match = near or (_VERSION.search(data, heap, heap + 65536) if heap >= 0 else None)
        found.keras_version = match.group().decode() if match else None
        backend = data.find(b"backend\0")
        if backend >= 0:
            name = re.compile(rb"tensorflow|torch|jax|numpy|theano|cntk|openvino").search(data, backend, backend + 120)
            found.backend = name.group().decode() if name else None


def _datasets(source: ByteSource, root: int) -> list[TensorFacts]:
    pending, seen, found = [("", root)], set(), []
    while pending:
        name, address = pending.pop()
        if address in seen:
            continue
        seen.add(address)
        if len(seen) > _MAX_OBJECTS:
            raise _BadHdf5Error("it has too many objects")
        shape, dtype, table = _object(source, address)
        if table is not None:
            members = _members(source, *table)
            pending += [(f"{name}/{clean(key)}" if name else clean(key), inner) for key, inner in reversed(members)]
        elif shape is not None and dtype is not None:
            found.append(TensorFacts(name[:1000], dtype, shape))
    return found


def _object(source: ByteSource, address: int) -> tuple[tuple[int, ...] | None, str | None, tuple[int, int] | None]:
    """Return shape and dtype of a dataset, or B-tree and heap of a group, from its object header."""
    head = source.read(address, 16)
    if len(head) < 16 or head[0] != 1:
        raise _BadHdf5Error("an object of another version")
    nmessages, nbytes = int.from_bytes(head[2:4], "little"), int.from_bytes(head[8:12], "little")
    blocks, count = [(address + 16, nbytes)], 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    table: tuple[int, int] | None = None
    while blocks and count < min(nmessages, 2000):
        start, size = blocks.pop(0)
        window, stop = Window(source, start), start + size
        while window.position + 8 <= stop and count < nmessages:
            kind, length = window.uint(2), window.uint(2)
            window.skip(4)
            body = window.read(length)
            count += 1
            if kind == 0x01 and len(body) >= 8:
                ndims, version = body[1], body[0]
                first = 8 if version == 1 else 4
                if ndims <= 32:
                    shape = tuple(
                        int.from_bytes(body[first + 8 * dim : first + 8 * dim + 8], "little") for dim in range(ndims)
                    )
            elif kind == 0x03 and len(body) >= 8:
                dtype = _dtype(body)
            elif kind == 0x11 and len(body) >= 16:
                table = int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")
            elif kind == 0x10 and len(body) >= 16 and len(blocks) < 100:
                blocks.append((int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")))
    return shape, dtype, table


def _dtype(body: bytes) -> str:
    kind, size = body[0] & 0xF, int.from_bytes(body[4:8], "little")
    if kind == 0:
        return f"{'int' if body[1] & 8 else 'uint'}{size * 8}"
    if kind == 1:
        return f"float{size * 8}"
    return {3: "string", 6: "compound", 8: "enum", 9: "string"}.get(kind, f"hdf5 class {kind}")


def _members(source: ByteSource, tree: int, heap: int) -> list[tuple[str, int]]:
    head = source.read(heap, 32)
    if not head.startswith(b"HEAP"):
        raise _BadHdf5Error("a group without names")
    names = int.from_bytes(head[24:32], "little")
    members: list[tuple[str, int]] = []
    pending, visited = [tree], 0
    while pending:
        address = pending.pop()
        node = source.read(address, 24)
        visited += 1
        if not node.startswith(b"TREE") or visited > 2000:
            raise _BadHdf5Error("a group's tree is damaged")
        level, used = node[5], int.from_bytes(node[6:8], "little")
        children = Window(source, address + 32)
        for _ in range(used):
            child = children.uint(8)
            children.skip(8)
            if level:
                pending.append(child)
            else:
                members += _symbols(source, child, names)
        if len(members) > _MAX_OBJECTS:
            raise _BadHdf5Error("it has too many objects")
    return members


def _symbols(source: ByteSource, address: int, names: int) -> list[tuple[str, int]]:
    head = source.read(address, 8)
    if not head.startswith(b"SNOD"):
        raise _BadHdf5Error("a group's members are damaged")
    window = Window(source, address + 8)
    found = []
    for _ in range(int.from_bytes(head[6:8], "little")):
        name_at, header = window.uint(8), window.uint(8)
        window.skip(24)
        name = source.read(names + name_at, 300).partition(b"\0")[0].decode("utf-8", "replace")
        found.append((name, header))
    return found


def keras_version_notes(version: str | None) -> list[str]:
    """Return what is to be known about weights of this version of Keras, and about the Keras that is here."""
    if version is None:
        return [compared("keras", None, installed_version("keras"))]
    if version.startswith("3"):
        return [compared("keras", version, installed_version("keras"))]
    notes = tensorflow_notes(version) if version.startswith("2") else []
    return [
        *notes,
        f"Keras {version} is that of TensorFlow {version}: tf.keras up to TensorFlow 2.15, or tf_keras beside Keras 3",
    ]


def _is_keras_3(found: Hdf5Contents) -> bool:
    """Say whether these are weights of Keras 3, which name no version: ``layers/dense/vars/0``."""
    names = [fact.name for fact in found.datasets or ()]
    return bool(names) and all(re.search(r"(?:^|/)vars/\d+$", name) for name in names)


def hdf5_file(source: ByteSource, place: str) -> Artifact:
    """Describe an HDF5 file."""
    found = read_hdf5(source)
    is_keras = found.keras_version is not None or _is_keras_3(found)
    versions: dict[str, str] = {"keras": found.keras_version} if found.keras_version else {}
    count = plural(len(found.datasets), "dataset") if found.datasets is not None else "datasets"
    of = "model" if found.has_model else "weights"
    title = f"Keras {of} in HDF5, of {count}" if is_keras else f"an HDF5 file of {count}"
    advice = [f"keras.models.load_model({place!r})" if found.has_model else f"model.load_weights({place!r}) with Keras"]
    advice = [*advice, *keras_version_notes(found.keras_version)] if is_keras else []
    if is_keras and found.keras_version is None:
        advice.append("they are named in the way of Keras 3; the model has to be built first")
    advice.append(f"its arrays alone: h5py.File({place!r})")
    return Artifact(
        place=place,
        kind="keras-hdf5" if is_keras else "hdf5",
        title=title,
        certainty="certain",
        nbytes=source.nbytes,
        versions=versions,
        tensors=tuple(found.datasets) if found.datasets is not None else None,
        problems=tuple(found.problems),
        advice=tuple(advice),
        details={"backend": found.backend} if found.backend else {},
    )
