"""What one file is, by its first bytes and then by its content."""

from __future__ import annotations

import bz2
import dataclasses
import lzma
import zlib
from typing import Any, Final

from ckptmgr.diagnose.archives import NPY_MAGIC, npy_file, tar_members, zip_file
from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.byte_source import Bytes, ByteSource
from ckptmgr.diagnose.gguf_file import gguf_file
from ckptmgr.diagnose.global_uses import global_uses
from ckptmgr.diagnose.hdf5_file import HDF5_MAGIC, hdf5_file
from ckptmgr.diagnose.msgpack_file import msgpack_file
from ckptmgr.diagnose.onnx_file import onnx_artifact, read_onnx
from ckptmgr.diagnose.pickle_facts import PickleLimits
from ckptmgr.diagnose.pickle_file import looks_like_a_pickle, pickle_file, torch_tar
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.plain_words import clean, listed, plural
from ckptmgr.diagnose.protobuf import BadProtobufError
from ckptmgr.diagnose.safetensors_file import looks_like_safetensors, safetensors_file
from ckptmgr.diagnose.small_signs import empty_file, packed_file, pointer_or_page, text_file, unknown, zeros
from ckptmgr.diagnose.tensorflow_files import (
    checkpoint_variables,
    is_checkpoint_index,
    saved_model_tags,
    tensorflow_notes,
)
from ckptmgr.diagnose.torch_zip import root_of, truncated_torch_zip, zip_of_torch
from ckptmgr.diagnose.zip_records import BadZipError, open_archive, scan_records

__all__ = ["sniff_source"]

_HEAD_NBYTES = 65536
_MAX_INFLATED_NBYTES = 32 << 20
_HIDDEN: Final = PickleLimits(200_000, 100_000, 50_000, 4 << 20, 1000)
_INFLATED: Final = ("gzip", "zlib", "bzip2", "xz")


def sniff_source(source: ByteSource, place: str, *, is_sparse: bool, check_nbytes: int) -> Artifact:
    """Describe a file.

    Args:
        source: Its bytes.
        place: As it was named.
        is_sparse: Most of it has never been written.
        check_nbytes: How many bytes may be read in order to compare checksums.

    Raises:
        StorageError: The bytes cannot be read.
    """
    if source.nbytes == 0:
        return empty_file(place)
    head = source.read(0, _HEAD_NBYTES)
    if not head.strip(b"\0") and (found := zeros(source, place, is_sparse=is_sparse, check_nbytes=check_nbytes)):
        return found
    found = (
        _by_magic(source, place, head, check_nbytes)
        or pointer_or_page(source, place, head)
        or _by_content(source, place, head)
        or unknown(source, place, head)
    )
    return found if "container" in found.details else _with_hidden_pickle(source, head, found)


def _with_hidden_pickle(source: ByteSource, head: bytes, found: Artifact) -> Artifact:
    """Tell what a file would run that is not meant as a pickle, but can be read as one."""
    # `P`, with which a zip archive begins, asks for an object outside of the pickle, which ends it.
    if not looks_like_a_pickle(head) or head.startswith(b"P"):
        return found
    facts = describe_pickle(source, limits=_HIDDEN)
    uses = tuple(use for use in global_uses(facts.globals) if use.verdict == "dangerous")
    if not uses and not facts.is_ambiguous:
        return found
    names = listed([use.name for use in uses]) or "what cannot be told"
    problem = f"read as a pickle, it would run {names}: do not load it"
    return dataclasses.replace(found, globals=(*uses, *found.globals), problems=(problem, *found.problems))


def _by_magic(source: ByteSource, place: str, head: bytes, check_nbytes: int) -> Artifact | None:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(source, place, check_nbytes)
    if head.startswith(b"GGUF"):
        return gguf_file(source, place)
    if any(head[start : start + 8] == HDF5_MAGIC for start in (0, 512, 1024, 2048)):
        return hdf5_file(source, place)
    if head.startswith(NPY_MAGIC):
        return npy_file(source, place)
    members = tar_members(source)
    if members:
        return torch_tar(source, place, members) or _tar(source, place, members)
    if looks_like_safetensors(head):
        return safetensors_file(source, place)
    found = packed_file(source, place, head)
    return _inflated(source, found) if found is not None and found.kind in _INFLATED else found


def _by_content(source: ByteSource, place: str, head: bytes) -> Artifact | None:
    """Describe what has no magic number: what can be followed to its end is what it seems to be."""
    if looks_like_a_pickle(head) and (found := pickle_file(source, place)):
        return found
    if is_checkpoint_index(source):
        return _index(source, place)
    text = text_file(source, place, head)
    if text is not None:
        return text
    if found := msgpack_file(source, place):
        return found
    return _saved_model(source, place) or _onnx(source, place)


def _zip(source: ByteSource, place: str, check_nbytes: int) -> Artifact:
    try:
        archive = open_archive(source)
    except BadZipError as error:
        found = truncated_torch_zip(source, place)
        if found is not None:
            return found
        names = [clean(name) for name, _ in scan_records(source)]
        return Artifact(
            place,
            "zip-truncated",
            "the beginning of a zip archive",
            "likely",
            source.nbytes,
            contents=dict.fromkeys(names[:100], ""),
            problems=(f"truncated or damaged: {error}; the file ends after {source.nbytes} bytes",),
            advice=("copy or download it again, and compare the sizes",),
        )
    if root_of(archive) is not None:
        return zip_of_torch(source, place, archive, check_nbytes=check_nbytes)
    return zip_file(source, place, archive)


def _tar(source: ByteSource, place: str, members: dict[str, tuple[int, int]]) -> Artifact:
    end = max(start + nbytes for start, nbytes in members.values())
    problems = (f"truncated: it ends after {source.nbytes} bytes, and needs {end}",) if end > source.nbytes else ()
    return Artifact(
        place,
        "tar",
        f"a tar archive of {plural(len(members), 'file')}",
        "certain",
        source.nbytes,
        contents={clean(name): f"{nbytes} bytes" for name, (_, nbytes) in list(members.items())[:200]},
        problems=problems,
        advice=("unpack it, and look at what is in it",),
    )


def _inflated(source: ByteSource, packed: Artifact) -> Artifact:
    """Look for a pickle in a compressed file, as joblib writes it."""
    data = source.read(0, _MAX_INFLATED_NBYTES)
    inflater = _inflater(packed.kind)
    try:
        inside = inflater.decompress(data, _MAX_INFLATED_NBYTES)
    except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
        return dataclasses.replace(packed, problems=(f"it is damaged: {clean(str(error))}",))
    if not looks_like_a_pickle(inside[:2]) or not inside.startswith(b"\x80"):
        return packed
    found = pickle_file(Bytes(inside), packed.place)
    if found is None:
        return packed
    return dataclasses.replace(
        found,
        nbytes=source.nbytes,
        title=f"{found.title}, compressed ({packed.kind})",
        advice=("unpack it first", *(line for line in found.advice if "ckptmgr import" not in line)),
        details={**found.details, "compressed": packed.kind},
    )


def _inflater(kind: str) -> Any:
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    if kind == "xz":
        return lzma.LZMADecompressor(memlimit=128 << 20)
    return zlib.decompressobj(31 if kind == "gzip" else 15)


def _index(source: ByteSource, place: str) -> Artifact:
    tensors, nshards, problems = checkpoint_variables(source)
    return Artifact(
        place,
        "tf-checkpoint",
        f"the index of a TensorFlow checkpoint of {plural(len(tensors), 'variable')}",
        "certain",
        source.nbytes,
        tensors=tuple(tensors),
        problems=tuple(problems),
        advice=(
            f"tf.train.load_checkpoint({place.removesuffix('.index')!r}); the values are in {nshards} .data files"
            " beside it",
            *tensorflow_notes(None),
        ),
    )


def _saved_model(source: ByteSource, place: str) -> Artifact | None:
    try:
        version, tags = saved_model_tags(source)
    except BadProtobufError:
        return None
    if version is None:
        return None
    return Artifact(
        place,
        "tf-savedmodel",
        f"the graph of a SavedModel of TensorFlow {version}",
        "certain",
        source.nbytes,
        versions={"tensorflow": version},
        problems=("it is one part of a SavedModel: name the directory that it lies in",),
        advice=("tf.saved_model.load of the directory that it lies in", *tensorflow_notes(version)),
        details={"tags": tags},
    )


def _onnx(source: ByteSource, place: str) -> Artifact | None:
    model = read_onnx(source)
    return None if model is None else onnx_artifact(source, place, model, [])
