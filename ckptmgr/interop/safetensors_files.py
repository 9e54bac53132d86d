"""Weights as the safetensors files of Hugging Face: one, or shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from ckptmgr.errors import UsageError
from ckptmgr.format.encoding import safetensors_header
from ckptmgr.interop.target import Target
from ckptmgr.interop.weights import StoredWeight, Weights
from ckptmgr.run.reader import CheckpointReader

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "is_weight_file", "parse_size", "split_weights", "write_folder", "write_one"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_weight_file(name: str) -> bool:
    """Say whether a loader of such a directory would take a file for weights, or for their index."""
    return name in (WEIGHTS_NAME, INDEX_NAME) or _SHARD.fullmatch(name) is not None


def parse_size(text: str) -> int:
    """Return a size in bytes: ``2GB`` is 2 * 10**9, ``2GiB`` is 2 * 2**30, as Hugging Face reads them.

    Raises:
        UsageError: It is none, or not positive.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = 0
    if match is not None:
        number, unit, binary = match.groups()
        nbytes = int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()])
    if nbytes <= 0:
        raise UsageError(f"{text!r} is no size", next="write it as 500MB, 2GB or 2GiB")
    return nbytes


def split_weights(weights: Sequence[StoredWeight], max_shard_nbytes: int | None) -> list[list[StoredWeight]]:
    """Cut weights into shards, in their order; one that is larger than the limit is a shard of its own.

    Args:
        weights: At least none: then there is one empty shard.
        max_shard_nbytes: How large the tensors of one file may be together; None for no limit.
    """
    shards: list[list[StoredWeight]] = [[]]
    nbytes = 0
    for weight in weights:
        if max_shard_nbytes is not None and shards[-1] and nbytes + weight.nbytes > max_shard_nbytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(weight)
        nbytes += weight.nbytes
    return shards


def write_one(file: BinaryIO, weights: Sequence[StoredWeight], reader: CheckpointReader) -> None:
    """Write one safetensors file; one tensor is in memory at a time.

    Further names of tied weights stand in the metadata, as ``safetensors.torch.save_model`` writes them.
    """
    tied = {name: weight.name for weight in weights for name in weight.tied}
    file.write(safetensors_header(weights, metadata=tied))
    for weight in weights:
        file.write(weight.read(reader))


def write_folder(
    target: Target, weights: Weights, reader: CheckpointReader, *, max_shard_nbytes: int | None
) -> list[str]:
    """Write ``model.safetensors``, or shards and then their index; return the names of the files."""
    shards = split_weights(weights.weights, max_shard_nbytes)
    names = list(_shard_names(len(shards)))
    for name, shard in zip(names, shards, strict=True):
        with target.create(name) as file:
            write_one(file, shard, reader)
    if len(shards) > 1:
        weight_map = {weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": weights.nbytes}, "weight_map": weight_map}
        with target.create(INDEX_NAME) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        names.append(INDEX_NAME)
    return names


def _shard_names(count: int) -> Iterator[str]:
    if count == 1:
        yield WEIGHTS_NAME
        return
    for number in range(1, count + 1):
        yield f"model-{number:05d}-of-{count:05d}.safetensors"
