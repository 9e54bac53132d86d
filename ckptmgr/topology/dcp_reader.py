"""Loading through PyTorch's DCP from a run: whatever saved the checkpoint, onto any ranks, every byte checked."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.manifest import Manifest, TensorRecord
from ckptmgr.progress import progress
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reader import CheckpointReader as VerifyingReader
from ckptmgr.run.reference import parse_reference
from ckptmgr.state.codec import decode_value
from ckptmgr.state.read_entries import read_box, records_by_name
from ckptmgr.state.sharding import Box
from ckptmgr.state.tensors import DTYPES, STORED_DTYPES, tensor_from_bytes
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.topology.dcp_layout import read_names
from ckptmgr.topology.planners import PlannedPaths
from ckptmgr.words import printable_place

__all__ = ["CheckpointReader"]

_DTYPES = {name: dtype for dtype, name in STORED_DTYPES.items()}


class CheckpointReader(StorageReader):
    """Where `torch.distributed.checkpoint.load` reads: a checkpoint of a run, saved through DCP or by a `Checkpointer`.

    ::

        dcp.load(state, storage_reader=CheckpointReader("runs/x@latest"), planner=LoadPlanner())

    Of what a `Checkpointer` saved, modules are there, as ``<entry>.<name>``; its optimizers, RNG and position are not.

    Each rank reads what it needs into host memory and checks it while DCP plans, so damage that any rank finds is an
    error on all ranks before any of them has changed a tensor: a ``CheckpointException`` whose ``failures`` are our
    errors by rank. What comes after it is a copy within memory on each rank by itself. If that fails (no memory on a
    device), the tensors of this rank may be half changed: DCP has no step in which ranks could agree to undo it.
    Objects with ``load_state_dict`` get their state from DCP after that, and what they do then is theirs.

    Values need our `LoadPlanner`, which also refuses other dtypes; with DCP's own planner tensors are cast without a
    word. A damaged ``latest`` is refused, and no older checkpoint taken for it.

    Args:
        reference: ``RUN_DIR`` or ``RUN_DIR@SELECTOR``: ``latest``, ``best``, a step, a tag or an id.
        storage_options: For the storage; never recorded.
        storage: The run's root, opened already.

    Attributes:
        checkpoint_id: The reference; of exactly this checkpoint, ``RUN_DIR@ID``, once it is found. Without credentials.
    """

    def __init__(
        self,
        reference: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self._storage_options = storage_options
        self._storage = storage
        self._opened: _Opened | None = None
        self._staged: dict[ReadItem, torch.Tensor | bytes] = {}
        self._refer_to(os.fspath(reference))
        self._rank = 0
        self._world_size = 1

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read another checkpoint: the reference that was given to `load` itself."""
        if checkpoint_id is not None:
            self._storage = None
            self._refer_to(os.fspath(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds.

        DCP hides the class of an error in here, so an error is raised when the answer is looked at.
        """
        # Each load looks anew: what is the latest may have changed.
        self._opened = None
        try:
            return self._open(None).metadata()
        except CkptmgrError as error:
            return _Unreadable(error)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn which rank this is.

        Raises:
            CkptmgrError: The checkpoint is not there, or cannot be read.
        """
        if isinstance(metadata, _Unreadable):
            raise metadata.error
        self._rank = int(kwargs.get("rank") or 0)
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            self._world_size = distributed.get_world_size()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read and check everything that this rank needs.

        Raises:
            CorruptCheckpointError: It is damaged. Names file and tensor.
            UnsupportedStateError: It needs values, and the planner would unpickle them.
        """
        values = [item.dest_index.fqn for item in plan.items if item.type == LoadItemType.BYTE_IO]
        if values and not isinstance(plan.planner_data, PlannedPaths):
            raise UnsupportedStateError(
                f"{len(values)} values are no tensors: {', '.join(values[:8])}",
                why="this planner would unpickle them, and nothing from a checkpoint is ever unpickled",
                next="dcp.load(..., planner=ckptmgr.topology.LoadPlanner()) reads them",
            )
        opened = self._open(None)
        self._staged = opened.stage(plan, self._rank, self._world_size)
        return dataclasses.replace(plan, storage_data=opened.manifest.checkpoint)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On rank 0: tell all ranks which checkpoint rank 0 has found."""
        return [dataclasses.replace(plan, storage_data=plans[0].storage_data) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what was read and checked into the live tensors.

        Raises:
            StateMismatchError: A live tensor is of another shape than planned. Nothing was changed.
            CorruptCheckpointError: As `prepare_local_plan`, where it has to be read again. Nothing was changed.
        """
        opened = self._open(None)
        if plan.storage_data != opened.manifest.checkpoint:
            # Another checkpoint was committed while the ranks came here one after the other. Rank 0's is loaded.
            opened = self._open(CheckpointId.parse(plan.storage_data))
            self._staged = opened.stage(plan, self._rank, self._world_size)
        staged = self._staged
        self._staged = {}
        if missing := [item for item in plan.items if item not in staged]:
            added = opened.stage(dataclasses.replace(plan, items=missing), self._rank, self._world_size)
            staged = {**staged, **added}
        targets: list[tuple[ReadItem, torch.Tensor, torch.Tensor]] = []
        values: list[tuple[ReadItem, bytes]] = []
        for item in plan.items:
            read = staged[item]
            if isinstance(read, bytes):
                values.append((item, read))
                continue
            target = planner.resolve_tensor(item).detach()
            if target.shape != read.shape:
                raise StateMismatchError(
                    f"{item.dest_index.fqn} is {tuple(target.shape)} now, and {tuple(read.shape)} as planned",
                    next="nothing was changed on this rank; look at the planner",
                )
            targets.append((item, target, read))
        for item, data in values:
            planner.load_bytes(item, io.BytesIO(data))
        for item, target, read in targets:
            target.copy_(read)
            planner.commit_tensor(item, target)
        loaded: Future[None] = Future()
        loaded.set_result(None)
        return loaded

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether a text is a reference."""
        try:
            parse_reference(os.fspath(checkpoint_id))
        except CkptmgrError:
            return False
        return True

    def _refer_to(self, reference: str) -> None:
        self._reference = parse_reference(reference)
        # DCP writes it to its log.
        self.checkpoint_id = f"{printable_place(self._reference.run_dir)}@{self._reference.selector}"
        self._opened = None
        self._staged = {}

    def _open(self, checkpoint: CheckpointId | None) -> _Opened:
        """Return the checkpoint: the one that is open, or the one of an id, or what the reference names."""
        if checkpoint is None and self._opened is not None:
            return self._opened
        if self._storage is None:
            self._storage = open_storage(self._reference.run_dir, storage_options=self._storage_options)
        catalog = Catalog.of_existing_run(self._storage)
        manifest = catalog.resolve(self._reference.selector) if checkpoint is None else catalog.manifest(checkpoint)
        self.checkpoint_id = f"{printable_place(self._reference.run_dir)}@{manifest.checkpoint}"
        self._opened = _Opened(self._storage, manifest, self._reference.run_dir)
        return self._opened


class _Opened:
    """One checkpoint, found and being read."""

    def __init__(self, storage: Storage, manifest: Manifest, run_dir: str) -> None:
        self.manifest = manifest
        self._storage = storage
        self._run_dir = run_dir
        self._entries = {entry.name: entry for entry in manifest.entries}
        self._where = f"step {manifest.step} of {storage.url}"
        self._names = read_names(manifest.entries, VerifyingReader(storage, manifest).read_state(), self._where)
        records = records_by_name(manifest.tensors, self._entries, 0, is_same=True)
        for fqn, (entry, name) in list(self._names.tensors.items()):
            if not records[entry].get(name):
                raise self._corrupt(f"no tensor is listed for {fqn}")
            if records[entry][name][0].encoding.startswith("sparse_"):
                del self._names.tensors[fqn]
                self._names.unreadable[fqn] = "it is a sparse tensor"

    def metadata(self) -> Metadata:
        """Return what it holds, in DCP's words."""
        records = records_by_name(self.manifest.tensors, self._entries, 0, is_same=True)
        described: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in self._names.values}
        for fqn, (entry, name) in self._names.tensors.items():
            pieces = records[entry][name]
            described[fqn] = TensorStorageMetadata(
                TensorProperties(dtype=self._dtype(pieces[0])),
                torch.Size(_whole_shape(pieces[0])),
                [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in map(_box, pieces)],
            )
        return Metadata(described, planner_data=dict(self._names.paths), storage_data=self._names)

    def stage(self, plan: LoadPlan, rank: int, world_size: int) -> dict[ReadItem, torch.Tensor | bytes]:
        """Read and check what a plan needs: tensors on the host, and values still encoded.

        Raises:
            CorruptCheckpointError: It is damaged. Names file and tensor.
        """
        saved_ranks = self.manifest.topology.world_size
        source = rank if rank < saved_ranks else 0
        records = records_by_name(self.manifest.tensors, self._entries, source, is_same=world_size == saved_ranks)
        staged: dict[ReadItem, torch.Tensor | bytes] = {}
        wanted = {self._names.tensors.get(item.storage_index.fqn) for item in plan.items}
        nbytes = sum(record.nbytes for entry, name in filter(None, wanted) for record in records[entry][name])
        what = f"loading step {self.manifest.step} of {printable_place(self._run_dir)}"
        with progress(what, nbytes) as advance:
            reader = VerifyingReader(self._storage, self.manifest, advance)
            for item in plan.items:
                fqn = item.storage_index.fqn
                if item.type == LoadItemType.BYTE_IO and fqn in self._names.values:
                    tree = self._names.values[fqn]
                    # What does not follow the grammar is found before anything is changed.
                    decode_value(tree)
                    staged[item] = json.dumps(tree).encode()
                elif item.type == LoadItemType.TENSOR and fqn in self._names.tensors:
                    entry, name = self._names.tensors[fqn]
                    begin = item.storage_index.offset or (0,) * len(item.lengths)
                    offset = tuple(a + b for a, b in zip(begin, item.storage_offsets, strict=True))
                    staged[item] = _read(reader, records[entry][name], Box(offset, tuple(item.lengths)))
                else:
                    raise self._corrupt(f"it does not hold {fqn} as planned")
        return staged

    def _dtype(self, record: TensorRecord) -> torch.dtype:
        try:
            return _DTYPES[record.dtype] if record.logical_dtype is None else DTYPES[record.logical_dtype]
        except KeyError as error:
            raise self._corrupt(f"{record.entry}/{record.name} has a dtype that this torch lacks: {error}") from error

    def _corrupt(self, why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._where} contradicts itself", why=why, next="load another checkpoint; `ckptmgr ls` lists them"
        )


class _Unreadable(Metadata):
    """Stands for the metadata of a checkpoint that could not be read, and raises why when it is looked at."""

    def __init__(self, error: CkptmgrError) -> None:
        self.error = error

    @property
    def state_dict_metadata(self) -> Any:  # type: ignore[override]
        """Raise the error."""
        raise self.error


def _whole_shape(record: TensorRecord) -> tuple[int, ...]:
    return record.global_shape or record.logical_shape or record.shape


def _box(record: TensorRecord) -> Box:
    shape = record.logical_shape or record.shape
    return Box(record.global_offset or (0,) * len(shape), shape)


def _read(reader: VerifyingReader, records: list[TensorRecord], box: Box) -> torch.Tensor:
    if records[0].encoding == "complex":
        # Stored as pairs of numbers: it is never a shard, and is read whole.
        whole = tensor_from_bytes(records[0], reader.read_tensor(records[0]))
        return whole[box.slices_in(Box((0,) * whole.ndim, tuple(whole.shape)))]
    return read_box(reader, records, box)
