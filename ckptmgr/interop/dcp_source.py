"""A checkpoint of torch.distributed.checkpoint, read without a process group and without unpickling objects.

Its ``.metadata`` is a pickle. It is read by an unpickler that knows the records of DCP and nothing else; tensors are
read by torch's own reader, which loads each with ``weights_only=True``. What is no tensor is pickled too, and left out.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, NotAllowedError
from ckptmgr.interop.source import member
from ckptmgr.interop.state_dicts import Found, find_state_dict

__all__ = ["read_dcp"]

_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")
_MAX_METADATA_NBYTES = 1024 * 1024 * 1024


def read_dcp(directory: Path, *, key: str | None) -> tuple[Found, list[str]]:
    """Read the model's tensors; see `_read`. Whatever is not as DCP writes it is told as damage."""
    try:
        return _read(directory, key)
    except CkptmgrError:
        raise
    except Exception as error:
        raise _damaged(directory, f".metadata contradicts itself: {type(error).__name__}: {error}"[:300]) from error


def _read(directory: Path, key: str | None) -> tuple[Found, list[str]]:
    """Read the model's tensors.

    Args:
        directory: Holds ``.metadata`` and the files that it names.
        key: Which of the saved state dicts; None to look for the only one.

    Returns:
        The state dict, and one sentence for what was left out.

    Raises:
        NotAllowedError: The metadata would import something. Nothing of it was.
        CorruptCheckpointError: A file is missing or damaged, or the shards do not make the tensors.
        UsageError: It holds several state dicts or none, or a file outside of the directory.
    """
    described = _read_metadata(directory)
    tensors = {
        name: record
        for name, record in described.state_dict_metadata.items()
        if isinstance(record, TensorStorageMetadata)
    }
    _check(directory, described, tensors)
    # Tensors without memory stand for those that are there, until it is known which are wanted.
    nested: dict[str, Any] = {}
    flat_names: dict[int, str] = {}
    kept: list[torch.Tensor] = []
    for name, record in tensors.items():
        placeholder = torch.empty(record.size, dtype=record.properties.dtype, device="meta")
        path = _path_of(described, name)
        if key is None and any("optim" in str(part).lower() for part in path[:-1]):
            # The moments of one parameter look like the state of a small module.
            continue
        kept.append(placeholder)
        flat_names[id(placeholder)] = name
        _put(nested, path, placeholder)
    found = find_state_dict(nested, key=key, where=str(directory))
    wanted = {flat_names[id(item)]: own for own, item in found.state.items()}
    loaded = _load(directory, described, {name: tensors[name] for name in wanted})
    others = sorted(name for name in described.state_dict_metadata if name not in wanted)
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    notes = [f"of the DCP checkpoint only the model is taken; not taken: {shown}"] if others else []
    return Found({own: loaded[name] for name, own in wanted.items()}, found.key), notes


class _MetadataUnpickler(pickle._Unpickler):
    """Not the one in C: to that a few bytes can say that its memo has billions of places."""

    _KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        (place.__name__, name): getattr(place, name)
        for place, names in (
            (
                metadata,
                "Metadata MetadataIndex ChunkStorageMetadata TensorStorageMetadata BytesStorageMetadata StorageMeta "
                "TensorProperties _MEM_FORMAT_ENCODING",
            ),
            (filesystem, "_StorageInfo _StoragePrefix"),
            (torch, "Size"),
        )
        for name in names.split()
        if hasattr(place, name)
    } | {
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("collections", "OrderedDict"): dict,
        # Where it was saved.
        **{(place, name): PurePosixPath for place in ("pathlib", "pathlib._local") for name in _PATHS},
    }

    def load_build(self) -> None:
        # A state is for an instance: to a class or a function it would be a change of what others use.
        if callable(self.stack[-2]):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it changes a class or a function")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]},
        pickle.BUILD[0]: load_build,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self._KNOWN.get((module, name))
        if found is None and module == "torch":
            candidate = getattr(torch, name, None)
            found = candidate if isinstance(candidate, torch.dtype | torch.layout | torch.memory_format) else None
        if found is None:
            raise NotAllowedError(
                f".metadata would import {module}.{name}",
                why="the metadata of a DCP checkpoint holds records of torch.distributed.checkpoint and nothing else",
                next="do not trust this checkpoint; if you wrote it with a planner of your own, convert it with "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save where you trust it",
            )
        return found


def _read_metadata(directory: Path) -> Metadata:
    path = member(directory, ".metadata")
    if path.stat().st_size > _MAX_METADATA_NBYTES:
        raise _damaged(directory, "its .metadata is too large")
    try:
        # From memory: a length that is larger than the file then costs nothing.
        described = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except CkptmgrError:
        raise
    except Exception as error:
        raise _damaged(directory, f".metadata cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(described, Metadata) or not isinstance(described.state_dict_metadata, Mapping):
        raise _damaged(directory, f".metadata holds a {type(described).__name__}")
    return described


def _check(directory: Path, described: Metadata, tensors: Mapping[str, TensorStorageMetadata]) -> None:
    storage = described.storage_data
    if not isinstance(storage, Mapping):
        raise _damaged(directory, ".metadata does not say where tensors lie")
    files: set[str] = set()
    for info in storage.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or getattr(info, "transform_descriptors", None):
            raise _damaged(directory, "a tensor lies in no file, or in one that is compressed or encrypted")
        files.add(name)
    available = sum(member(directory, name).stat().st_size for name in sorted(files))
    claimed = 0
    for name, record in tensors.items():
        shape = tuple(record.size)
        claimed += math.prod(shape) * record.properties.dtype.itemsize
        nelements = sum(math.prod(chunk.sizes) for chunk in record.chunks)
        corners = {tuple(chunk.offsets) for chunk in record.chunks if math.prod(chunk.sizes)}
        nfilled = sum(1 for chunk in record.chunks if math.prod(chunk.sizes))
        if nelements != math.prod(shape) or len(corners) != nfilled:
            raise _damaged(directory, f"the shards of {name!r} hold {nelements} of {math.prod(shape)} elements")
    if claimed > available:
        raise _damaged(directory, f"its tensors have {claimed} bytes, its files {available}")


def _path_of(described: Metadata, name: str) -> tuple[Any, ...]:
    paths = described.planner_data
    path = paths.get(name) if isinstance(paths, Mapping) else None
    return tuple(path) if isinstance(path, tuple | list) and path else (name,)


def _put(nested: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
        if not isinstance(nested, dict):
            return
    nested[path[-1]] = value


def _load(directory: Path, described: Metadata, wanted: Mapping[str, TensorStorageMetadata]) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = {name: torch.empty(r.size, dtype=r.properties.dtype) for name, r in wanted.items()}
    try:
        load(state, storage_reader=_Reader(directory, described), no_dist=True)
    except CheckpointException as error:
        # Of what failed on which rank; there is one here.
        failure = next(iter(error.failures.values()))[0]
        raise _damaged(directory, f"{type(failure).__name__}: {failure}".splitlines()[0][:300]) from error
    except Exception as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}".splitlines()[0][:300]) from error
    return state


class _Reader(FileSystemReader):
    """Torch's own, with the metadata that was read and checked before."""

    def __init__(self, directory: Path, described: Metadata) -> None:
        super().__init__(directory)
        self._described = described

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._described


def _damaged(directory: Path, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the DCP checkpoint in {directory} cannot be read",
        why=why,
        next="copy the whole directory again, the files of all ranks",
    )
