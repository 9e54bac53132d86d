"""Saving through PyTorch's DCP into a run: the checkpoint is one like any other, and the manifest makes it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptmgr.errors import UnsupportedStateError, UsageError
from ckptmgr.format.encoding import ITEM_NBITS
from ckptmgr.format.layout import MAX_STEP, CheckpointId, payload_stem
from ckptmgr.format.manifest import EntryRecord, Topology
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.run.commit import CheckpointFields, Sealed, commit_sealed, told_if_fenced, write_files
from ckptmgr.run.environment import recorded_versions
from ckptmgr.run.reference import checked_tags
from ckptmgr.state.codec import decode_value
from ckptmgr.state.sharding import is_sharded, mesh_sizes
from ckptmgr.state.tensors import refuse_unstorable, store_tensor
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.topology.dcp_attempt import HeldRun, hold_run, record_failure
from ckptmgr.topology.dcp_layout import HANDLER, VERSION, StatePath, encode_entry, loose_entry, place_of
from ckptmgr.topology.planners import PlannedPaths
from ckptmgr.words import printable_place

__all__ = ["CheckpointWriter"]


@dataclass(frozen=True, slots=True)
class _Task:
    """What rank 0 tells each rank: where to write.

    Attributes:
        checkpoint: Id of the save.
        entries: All entries of the state, in order.
        loose: The entry of what lies at the top of the state dict.
        rank: Who is told.
    """

    checkpoint: str
    entries: tuple[str, ...]
    loose: str
    rank: int


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank tells rank 0 once all that it wrote is durable."""

    sealed: Sealed
    values: dict[str, Any]
    mesh: dict[str, int]


class CheckpointWriter(StorageWriter):
    """Where `torch.distributed.checkpoint.save` writes: a checkpoint of a run, in ckptmgr's own format.

    ::

        dcp.save(state, storage_writer=CheckpointWriter("runs/x", step=100), planner=SavePlanner())

    A writer is for one save. The process claims the run at its first save into it, and holds the attempt until it ends;
    a save is refused (`Fenced`) once another process has taken the run over. Every file is durable before rank 0
    writes the manifest; if any rank fails there is none, the attempt is recorded as failed, and DCP raises a
    ``CheckpointException`` on every rank, whose ``failures`` are our errors by rank. `async_save` works too, in a
    thread: give it a process group of its own, as its ranks talk while training does.

    Values that are no tensors need our `SavePlanner`: another planner pickles them, and that is refused by name, before
    anything is written. Tied tensors are written once for each of their names.

    Args:
        run_dir: Path or fsspec URL of the run; made if it is not there.
        step: Optimizer updates completed.
        epoch: Epochs completed or under way, where there are any.
        metrics: Values known at this step.
        monitor: The metric that says which checkpoint is ``best``.
        mode: Whether smaller or larger is better.
        tags: Names by which the checkpoint is pinned.
        storage_options: For the storage; never recorded.
        storage: The run's root, opened already.

    Attributes:
        checkpoint_id: The checkpoint's reference, ``RUN_DIR@ID``, once the ranks have agreed on it; ``RUN_DIR@STEP``
            before. Without credentials.

    Raises:
        UsageError: An argument that cannot be meant.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        monitor: str | None = None,
        mode: str = "min",
        tags: Sequence[str] = (),
        storage_options: Mapping[str, Any] | None = None,
        storage: Storage | None = None,
    ) -> None:
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise UsageError(f"step={step!r}", why=f"it is the number of updates completed, from 0 to {MAX_STEP}")
        if mode not in ("min", "max"):
            raise UsageError(f"mode={mode!r}", why="it is 'min' or 'max'")
        self._run_dir = os.fspath(run_dir)
        self._storage = storage if storage is not None else open_storage(self._run_dir, storage_options=storage_options)
        self._step = step
        self._fields = CheckpointFields(
            run_id="",
            reason="torch.distributed.checkpoint",
            entries=(),
            epoch=epoch,
            metrics=dict(metrics or {}),
            monitor=monitor,
            mode=None if monitor is None else "max" if mode == "max" else "min",
            tags=checked_tags(tags),
            environment=recorded_versions(),
        )
        self._leads = False
        self._run: HeldRun | None = None
        self._task: _Task | None = None
        self._paths: dict[str, StatePath] = {}
        # DCP writes it to its log.
        self.checkpoint_id = f"{printable_place(self._run_dir)}@{step}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Refuse a name that is given to `save` itself.

        Raises:
            UsageError: There is one.
        """
        if checkpoint_id is not None:
            raise UsageError(
                f"checkpoint_id={os.fspath(checkpoint_id)!r}, with a CheckpointWriter",
                why=f"it has been told where to save: {self.checkpoint_id}",
                next="leave checkpoint_id out",
            )

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn which rank this is.

        Raises:
            UsageError: The writer has been used, or the ranks are not to talk with each other.
        """
        if self._task is not None:
            raise UsageError(
                f"a CheckpointWriter is for one save, and this one has saved {self.checkpoint_id}",
                next="make another one, with the new step",
            )
        if kwargs.get("use_collectives") is False:
            raise UsageError(
                "use_collectives=False, with a CheckpointWriter",
                why="each rank would commit its own part as the whole checkpoint",
                next="leave it out",
            )
        self._leads = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse a plan that another planner's pickles, or plans of another save, would come of.

        Raises:
            UnsupportedStateError: It has values that are no tensors. Names them.
            UsageError: Plans are cached.
        """
        if not plan.usable:
            raise _cached()
        pickled = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        if pickled and not isinstance(plan.planner_data, PlannedPaths):
            shown = ", ".join(pickled[:8]) + (f" and {len(pickled) - 8} more" if len(pickled) > 8 else "")
            raise UnsupportedStateError(
                f"{len(pickled)} values are no tensors: {shown}",
                why="this planner would pickle them, and checkpoints hold no pickle",
                next="dcp.save(..., planner=ckptmgr.topology.SavePlanner()) stores them as JSON",
            )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0: claim the run, once all ranks have a plan, and tell them the checkpoint's id.

        Raises:
            CkptmgrError: As `hold_run`.
        """
        if not all(plan.usable for plan in plans):
            raise _cached()
        for plan in plans:
            self._paths.update({item.index.fqn: _path(plan, item) for item in plan.items})
        loose = loose_entry(self._paths.values())
        entries = sorted({place_of(fqn, path, loose)[0] for fqn, path in self._paths.items()})
        self._run = hold_run(self._storage, self._run_dir, step=self._step)
        checkpoint = str(self._run.next_save(self._step))
        return [
            dataclasses.replace(plan, storage_data=_Task(checkpoint, tuple(entries), loose, rank))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part. When this returns, it is durable, and nothing refers to it yet.

        Raises:
            UnsupportedStateError: A tensor that cannot be stored.
            Fenced, StorageError: As any save.
        """
        task: _Task = plan.storage_data
        self._task = task
        self.checkpoint_id = f"{printable_place(self._run_dir)}@{task.checkpoint}"
        checkpoint = CheckpointId.parse(task.checkpoint)
        try:
            report = self._write(plan, planner, task, checkpoint)
        except Exception as error:
            record_failure(self._storage, checkpoint, error, rank=task.rank)
            raise
        nbytes = sum(file.nbytes for file in report.sealed.files)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(MetadataIndex(task.checkpoint), nbytes, report)])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0: commit what all ranks have written.

        Raises:
            Fenced, SaveFailedError, StorageError: As any save.
        """
        assert self._task is not None
        checkpoint = CheckpointId.parse(self._task.checkpoint)
        try:
            self._commit(checkpoint, [result[0].storage_data for result in results])
        except Exception as error:
            record_failure(self._storage, checkpoint, error, rank=self._task.rank)
            raise

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say no: a writer cannot be made from a name alone, it needs a step."""
        return False

    def _write(self, plan: SavePlan, planner: SavePlanner, task: _Task, checkpoint: CheckpointId) -> _Report:
        values: dict[str, Any] = {}
        tensors: dict[str, list[TensorPayload]] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert not isinstance(data, torch.Tensor)
                values[item.index.fqn] = json.loads(data.getvalue())
            else:
                assert isinstance(data, torch.Tensor)
                assert item.tensor_data is not None
                if data.numel() == 0 and item.tensor_data.size.numel() > 0:
                    # A rank that got nothing of an unevenly sharded tensor.
                    continue
                entry, name = place_of(item.index.fqn, _path(plan, item), task.loose)
                tensors.setdefault(entry, []).append(_payload(item, data, entry, name, task.rank))
        suffix = f"-rank-{task.rank:05d}" if task.rank else ""
        files = [
            FilePayload(f"{payload_stem(entry, position)}{suffix}.safetensors", _in_file_order(tensors[entry]))
            for position, entry in enumerate(task.entries)
            if entry in tensors
        ]
        if task.rank:
            # What rank 0's holds is known when all have reported.
            files.append(FilePayload(f"state{suffix}.json", content=_document({}), is_state=True))
        with told_if_fenced(self._storage, checkpoint.attempt) if self._leads else nullcontext():
            sealed = write_files(self._storage, checkpoint, files)
        live = getattr(planner, "state_dict", {}).values()
        return _Report(sealed, values, mesh_sizes(value for value in live if is_sharded(value)))

    def _commit(self, checkpoint: CheckpointId, reports: Sequence[_Report]) -> None:
        assert self._task is not None
        assert self._run is not None
        values = {fqn: decode_value(tree) for report in reports for fqn, tree in report.values.items()}
        tensors = {(tensor.entry, tensor.name) for report in reports for tensor in report.sealed.tensors}
        by_entry: dict[str, dict[str, str]] = {entry: {} for entry in self._task.entries}
        for fqn, path in self._paths.items():
            entry, name = place_of(fqn, path, self._task.loose)
            by_entry[entry][name] = fqn
        trees = {
            entry: encode_entry(
                tensors=[name for name in names if (entry, name) in tensors],
                values={name: values[fqn] for name, fqn in names.items() if fqn in values},
                paths={name: self._paths[fqn] for name, fqn in names.items()},
                entry=entry,
            )
            for entry, names in by_entry.items()
        }
        with told_if_fenced(self._storage, checkpoint.attempt):
            state = write_files(
                self._storage, checkpoint, [FilePayload("state.json", content=_document(trees), is_state=True)]
            )
        first = reports[0].sealed
        parts = [Sealed((*first.files, *state.files), first.tensors, len(first.files))]
        fields = dataclasses.replace(
            self._fields,
            run_id=self._run.run_id,
            continues=self._run.continues,
            entries=tuple(EntryRecord(name=e, handler=HANDLER, handler_version=VERSION) for e in self._task.entries),
            topology=Topology(world_size=len(reports), mesh=reports[0].mesh),
        )
        commit_sealed(self._storage, checkpoint, [*parts, *(report.sealed for report in reports[1:])], fields)


def _path(plan: SavePlan, item: WriteItem) -> StatePath:
    path: StatePath = (plan.planner_data or {}).get(item.index.fqn, (item.index.fqn,))
    return path


def _payload(item: WriteItem, tensor: torch.Tensor, entry: str, name: str, rank: int) -> TensorPayload:
    fqn = item.index.fqn
    assert item.tensor_data is not None
    chunk, whole = item.tensor_data.chunk, tuple(item.tensor_data.size)
    if name == "__metadata__" or tuple(chunk.sizes) != tuple(tensor.shape):
        raise UnsupportedStateError(
            f"{fqn} is a tensor that cannot be stored",
            why="safetensors keeps this name for itself"
            if name == "__metadata__"
            else f"it is planned as {tuple(chunk.sizes)}, and is {tuple(tensor.shape)}",
            next="give it another name, or report this with its placements, its mesh and its shape",
        )
    refuse_unstorable(tensor, fqn)
    stored = store_tensor(tensor, name, fqn)
    is_shard = tuple(chunk.sizes) != whole
    if is_shard and stored.encoding == "complex":
        raise UnsupportedStateError(
            f"{fqn} is a sharded tensor that cannot be stored",
            why=f"its elements are of {stored.logical_dtype}, which are stored as pairs of real numbers",
            next="keep it as complex64, or replicate it",
        )
    assert isinstance(stored.source, torch.Tensor)
    return TensorPayload(
        name=name,
        entry=entry,
        dtype=stored.dtype,
        shape=stored.shape,
        data=_bytes_of(stored.source),
        encoding=stored.encoding,
        logical_dtype=stored.logical_dtype,
        logical_shape=stored.logical_shape,
        order=None if is_shard else stored.order,
        scope="sharded" if is_shard else "replicated",
        rank=rank if is_shard else None,
        global_shape=whole if is_shard else None,
        global_offset=tuple(chunk.offsets) if is_shard else None,
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    # Training waits for a save through DCP, or has given it a copy: what is on the host is not copied again.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def _in_file_order(payloads: Sequence[TensorPayload]) -> tuple[TensorPayload, ...]:
    """Sort wide elements first, so that every tensor is aligned without gaps; then by name."""
    return tuple(sorted(payloads, key=lambda payload: (-ITEM_NBITS[payload.dtype], payload.name)))


def _document(trees: Mapping[str, Any]) -> bytes:
    return json.dumps({"entries": trees}, allow_nan=False, separators=(",", ":")).encode()


def _cached() -> UsageError:
    return UsageError(
        "a planner with enable_plan_caching=True, with a CheckpointWriter",
        why="a plan that was made for one checkpoint would be used for another, and write over its files",
        next="leave it out, or use ckptmgr.topology.SavePlanner",
    )
