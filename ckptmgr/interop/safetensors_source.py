"""Safetensors files, one or a sharded directory, as a state dict that lies on the disk until it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ckptmgr.errors import CorruptCheckpointError, UsageError
from ckptmgr.format.record import parse_json
from ckptmgr.interop.source import member

__all__ = ["load_directory", "load_file", "read_index"]

_MAX_INDEX_NBYTES = 256 * 1024 * 1024


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file. Names that its metadata say are tied give the same tensor.

    Raises:
        CorruptCheckpointError: It is no safetensors file, or is cut off.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{path} cannot be read as safetensors",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            next="copy or download it again",
        ) from error
    # `safetensors.torch.save_model` writes a tied weight once, and its other names here.
    for name, first in metadata.items():
        if name not in tensors and first in tensors:
            tensors[name] = tensors[first]
    return tensors


def load_directory(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a directory: of its one file, or of the shards that its index names.

    Raises:
        UsageError: There are several files and no index, or a shard lies outside of the directory.
        CorruptCheckpointError: A shard is missing or damaged, or shards and index contradict each other.
    """
    indexes = sorted(path.name for path in directory.glob("*.safetensors.index.json"))
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(files) == 1 and not indexes:
        return load_file(member(directory, files[0]))
    if "model.safetensors" in files and len(indexes) != 1:
        return load_file(member(directory, "model.safetensors"))
    if len(indexes) != 1:
        raise UsageError(
            f"{directory} holds {len(files)} safetensors files and {len(indexes) or 'no'} index",
            why="without an index nobody knows whether they belong together",
            next=f"give one of them: {', '.join(files[:3])}",
        )
    weight_map = read_index(member(directory, indexes[0]))
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, tensor in load_file(member(directory, name)).items():
            if key in tensors:
                raise _contradicts(directory, f"{key!r} stands in two shards")
            if weight_map.get(key, name) != name:
                raise _contradicts(directory, f"{key!r} is in {name}, the index says {weight_map[key]}")
            tensors[key] = tensor
    missing = [key for key in weight_map if key not in tensors]
    if missing:
        raise _contradicts(directory, f"{missing[0]!r} is in none of the shards, nor are {len(missing) - 1} others")
    order = {key: position for position, key in enumerate(weight_map)}
    return dict(sorted(tensors.items(), key=lambda item: order.get(item[0], len(order))))


def read_index(path: Path) -> dict[str, str]:
    """Return which file holds which tensor.

    Raises:
        CorruptCheckpointError: It is no index.
    """
    if path.stat().st_size > _MAX_INDEX_NBYTES:
        raise CorruptCheckpointError(f"{path} is no index", why="it is too large")
    try:
        document: Any = parse_json(path.read_bytes(), where=str(path))
        weight_map = document["weight_map"]
        if not all(isinstance(value, str) for value in (*weight_map, *weight_map.values())):
            raise TypeError("its weight_map holds something else than names")
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(
            f"{path} is no index of shards",
            why=f"{type(error).__name__}: {error}",
            next="copy or download it again",
        ) from error
    return dict(weight_map)


def _contradicts(directory: Path, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the shards in {directory} and their index contradict each other",
        why=why,
        next="copy or download the whole directory again",
    )
