"""Pairs of checkpoints that differ in known ways: real ones, and ones of several ranks made through the run floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_samples import create_run, start
from torch import nn

from ckptmgr import Checkpointer
from ckptmgr.diff import Diff, TensorDiff
from ckptmgr.format.encoding import ITEM_NBITS
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import EntryRecord, Manifest, Topology
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.run.commit import CheckpointFields, commit_sealed, write_files
from ckptmgr.storage.open import open_storage

STORED = {np.dtype("<f4"): "F32", np.dtype("<f8"): "F64", np.dtype("<i8"): "I64", np.dtype("<u2"): "BF16"}


class Training:
    """A model with an optimizer that has stepped, always the same until something is done to it."""

    def __init__(self, *, lr: float = 0.01) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.model(torch.randn(6, 3)).square().mean().backward()
        self.optimizer.step()
        torch.manual_seed(6)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def save_state(run_dir: Path, state: Mapping[str, Any], *, step: int = 1, loss: float = 0.5) -> str:
    """Save a state as a checkpoint of a run with one manager, and return the run."""
    with Checkpointer(run_dir, dict(state), every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(step, metrics={"loss": loss})
    return str(run_dir)


def save_in_turn(run_dir: Path, state: Mapping[str, Any], changes: Sequence[Callable[[], object]]) -> str:
    """Save a state as step 1, and once more after each change; return the run."""
    with Checkpointer(run_dir, dict(state), every_n_steps=1) as ckpt:
        ckpt.resume()
        ckpt.step(1, metrics={"loss": 1.0})
        for step, change in enumerate(changes, start=2):
            with torch.no_grad():
                change()
            ckpt.step(step, metrics={"loss": 1.0 / step})
    return str(run_dir)


def by_path(diff: Diff) -> dict[str, TensorDiff]:
    return {tensor.path: tensor for tensor in diff.tensors}


def shard(name: str, whole: np.ndarray, cuts: Sequence[slice], *, rank: int, entry: str = "model") -> TensorPayload:
    """Return one rank's part of an array."""
    part = np.ascontiguousarray(whole[tuple(cuts)])
    return TensorPayload(
        name=name,
        entry=entry,
        dtype=STORED[whole.dtype],
        shape=part.shape,
        data=memoryview(part.tobytes()),
        scope="sharded",
        rank=rank,
        global_shape=whole.shape,
        global_offset=tuple(cut.start or 0 for cut in cuts),
    )


def plain(
    name: str, array: np.ndarray, *, rank: int | None = None, entry: str = "model", **fields: Any
) -> TensorPayload:
    """Return a tensor that is the same on all ranks, or a rank's own."""
    return TensorPayload(
        name=name,
        entry=entry,
        dtype=fields.pop("dtype", STORED.get(array.dtype, "U8")),
        shape=fields.pop("shape", array.shape),
        data=memoryview(array.tobytes()),
        scope="replicated" if rank is None else "per-rank",
        rank=rank,
        **fields,
    )


def save_ranks(
    run_dir: Path,
    parts: Sequence[Sequence[TensorPayload]],
    *,
    documents: Sequence[Mapping[str, Any]] | None = None,
    entries: Sequence[EntryRecord] = (EntryRecord(name="model", handler="module", handler_version=1),),
    step: int = 1,
) -> Manifest:
    """Commit a checkpoint of as many ranks as there are parts, through the run floor."""
    storage = open_storage(run_dir)
    create_run(storage)
    checkpoint = CheckpointId(step, start(storage), 0)
    empty = {entry.name: {} for entry in entries}
    sealed = []
    for rank, tensors in enumerate(parts):
        # As a writer packs them: the widest items first.
        packed = tuple(sorted(tensors, key=lambda tensor: -ITEM_NBITS[tensor.dtype]))
        document = {"entries": empty if documents is None else dict(documents[rank])}
        files = [FilePayload(f"model-{rank}.safetensors", tensors=packed)] if packed else []
        files.append(FilePayload(f"state-{rank}.json", content=json.dumps(document).encode(), is_state=True))
        sealed.append(write_files(storage, checkpoint, files))
    fields = CheckpointFields(
        run_id="00" * 8, reason="test", entries=tuple(entries), topology=Topology(world_size=len(parts))
    )
    return commit_sealed(storage, checkpoint, sealed, fields)
