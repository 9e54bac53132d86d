"""Planners for DCP that lose nothing: values as tagged JSON and not pickled, and every difference told by name."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType
from xxhash import xxh3_128_hexdigest

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.state.capture import dry_check
from ckptmgr.state.codec import decode_value, encode_value
from ckptmgr.state.differences import Differences, describe
from ckptmgr.state.divergence import tensor_digest
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.sharding import is_sharded, shard_of
from ckptmgr.state.tensors import refuse_unstorable, store_tensor
from ckptmgr.topology.dcp_layout import HANDLER, VERSION, StatePath, StoredNames

__all__ = ["LoadPlanner", "PlannedPaths", "SavePlanner"]

_log = logging.getLogger("ckptmgr")

_SHOWN = 8


class PlannedPaths(dict[str, StatePath]):
    """Fqn → path, as DCP's planners have it; and the sign that one of ours made the plan.

    Attributes:
        content: Fqn → digest of what this rank has, for what should be the same on all ranks that have it.
    """

    def __init__(self, paths: Mapping[str, StatePath], content: Mapping[str, str] | None = None) -> None:
        super().__init__(paths)
        self.content = dict(content or {})

    def __reduce__(self) -> tuple[object, ...]:
        return PlannedPaths, (dict(self), self.content)


class SavePlanner(DefaultSavePlanner):
    """Plans a save by DCP: `DefaultSavePlanner`, but for three things.

    Values that are no tensors are encoded as JSON, in a grammar that gives them back as they were (tuples, NaN, bytes,
    NumPy arrays, …), and never pickled. What cannot be stored is refused by name, on all ranks, before anything is
    written. And the ranks are compared: DCP keeps, of what several ranks have under one name, the value of any of them.
    Here a value that differs is refused, and of a tensor that differs (and is no DTensor) rank 0's is kept, with a
    warning.

    Args:
        flatten_state_dict: Save nested dicts and lists value by value.
        flatten_sharded_tensors: As for `DefaultSavePlanner`.
        dedup_save_to_lowest_rank: Let the lowest of the ranks that have a tensor write it, instead of spreading the
            work.
        compare_tensors: Whether tensors that are no DTensors are compared between ranks. Costs a pass over their bytes.
    """

    def __init__(
        self,
        *,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_save_to_lowest_rank: bool = False,
        compare_tensors: bool = True,
    ) -> None:
        # No caching of plans: it is keyed by class in DCP, so two writers would get each other's.
        super().__init__(
            flatten_state_dict=flatten_state_dict,
            flatten_sharded_tensors=flatten_sharded_tensors,
            dedup_save_to_lowest_rank=dedup_save_to_lowest_rank,
        )
        self._compare_tensors = compare_tensors
        self._encoded: dict[str, bytes] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank has.

        Raises:
            UnsupportedStateError: A value or tensor that cannot be stored. Names its fqn and type.
        """
        plan = super().create_local_plan()
        names = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        values = {name: self.state_dict[name] for name in names}
        trees = {name: encode_value(value, (name,)) for name, value in values.items()}
        dry_check([CapturedEntry(name, HANDLER, VERSION, value) for name, value in values.items()])
        self._encoded = {name: json.dumps(tree, allow_nan=False).encode() for name, tree in trees.items()}
        content = {name: f"a value: {xxh3_128_hexdigest(data)}" for name, data in self._encoded.items()}
        is_compared = self._compare_tensors and _has_other_ranks()
        for name, tensor in self.state_dict.items():
            if isinstance(tensor, torch.Tensor):
                _refuse_tensor(tensor, name)
                if is_compared and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    content[name] = f"{describe(tensor)}: {tensor_digest(store_tensor(tensor, name, name).source)}"
        paths = self.mappings if self.flatten_state_dict else {name: (name,) for name in self.state_dict}
        self.plan = dataclasses.replace(plan, planner_data=PlannedPaths(paths, content))
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Share out who writes what.

        Raises:
            StateMismatchError: A value is not the same on all ranks that have it.
        """
        differing = _differing([getattr(plan.planner_data, "content", {}) for plan in all_plans])
        values = {i.index.fqn for plan in all_plans for i in plan.items if i.type == WriteItemType.BYTE_IO}
        if refused := [name for name in differing if name in values]:
            raise StateMismatchError(
                f"{len(refused)} values are not the same on all ranks: {_listed(refused)}",
                why=f"{refused[0]} of rank 0 is not that of ranks {', '.join(map(str, differing[refused[0]]))}; under "
                "one name one value is saved",
                next=f"give each rank a name of its own, such as f'{refused[0]}.{{rank}}'",
            )
        if differing:
            _log.warning(
                "%d tensors are not the same on all ranks, and the first rank's are saved: %s; what belongs to each "
                "rank needs a name of its own",
                *(len(differing), _listed(list(differing))),
            )
            all_plans = [
                dataclasses.replace(plan, items=[i for i in plan.items if rank not in differing.get(i.index.fqn, ())])
                for rank, plan in enumerate(all_plans)
            ]
        return super().create_global_plan(all_plans)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return tensors as they are, and values as the JSON that was planned."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._encoded[write_item.index.fqn])
        return object


class LoadPlanner(DefaultLoadPlanner):
    """Plans a load by DCP: `DefaultLoadPlanner`, but what does not fit is told by name, and nothing is cast.

    Refused are, before anything is changed: names that the checkpoint lacks; names that the live state lacks, in the
    parts of the checkpoint that it has (asking for ``model`` alone is fine, for half of its layers it is not); other
    shapes and dtypes.

    Args:
        flatten_state_dict: As it was when saving.
        flatten_sharded_tensors: As for `DefaultLoadPlanner`.
        allow_partial_load: Load what both have, and leave the rest.
    """

    def __init__(
        self,
        *,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        super().__init__(
            flatten_state_dict=flatten_state_dict,
            flatten_sharded_tensors=flatten_sharded_tensors,
            allow_partial_load=allow_partial_load,
        )

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank needs.

        Raises:
            StateMismatchError: The checkpoint does not fit. Tells everything that does not.
        """
        assert self.metadata is not None
        self._refuse_differences(self.metadata)
        plan = super().create_local_plan()
        plan.planner_data = PlannedPaths(self.mappings)
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into the state dict."""
        name = read_item.dest_index.fqn
        loaded = decode_value(json.loads(value.read()))
        if not self.flatten_state_dict:
            self.state_dict[name] = loaded
            self.original_state_dict[name] = loaded
            return
        *way, last = self.mappings[name]
        container: Any = self.original_state_dict
        for key in way:
            container = container[_own_key(container, key)]
        container[_own_key(container, last)] = loaded

    def _refuse_differences(self, metadata: Metadata) -> None:
        saved = metadata.state_dict_metadata
        paths: Mapping[str, StatePath] = metadata.planner_data or {}
        differences = Differences(
            "the state",
            next="load into a state dict of the same names, shapes and dtypes; allow_partial_load=True loads what both "
            "have. Nothing was changed",
        )
        if not self.allow_partial_load:
            differences.add_names("missing in the checkpoint", (name for name in self.state_dict if name not in saved))
            asked = {_part(self.mappings.get(name, (name,))) for name in self.state_dict}
            if len(asked) > 1:
                # What lies beside the parts is single values: each of them can be asked for alone.
                asked.discard(None)
            left = [name for name in saved if name not in self.state_dict and _part(paths.get(name, (name,))) in asked]
            differences.add_names("not in the live state", left)
            if isinstance(metadata.storage_data, StoredNames):
                for name, why in metadata.storage_data.unreadable.items():
                    if any(live == name or live.startswith(f"{name}.") for live in self.state_dict):
                        differences.add(f"{name!r} cannot be loaded through DCP: {why}")
        for name, live in self.state_dict.items():
            if name in saved:
                differences.add(_difference(name, live, saved[name]))
        differences.raise_if_any()


def _difference(name: str, live: Any, saved: Any) -> str | None:
    if not isinstance(saved, TensorStorageMetadata):
        return f"{name!r} is a value in the checkpoint, {describe(live)} now" if torch.is_tensor(live) else None
    told = f"{str(saved.properties.dtype).removeprefix('torch.')} {tuple(saved.size)}"
    if not torch.is_tensor(live):
        return f"{name!r} is {told} in the checkpoint, {describe(live)} now"
    if tuple(live.size()) != tuple(saved.size):
        return f"shape of {name!r} is {told} in the checkpoint, {describe(live)} now"
    if live.dtype != saved.properties.dtype:
        return f"dtype of {name!r} is {told} in the checkpoint, {describe(live)} now"
    return None


def _part(path: StatePath) -> str | int | None:
    """Return the part of the state dict that a path leads into; None for the top itself."""
    return path[0] if len(path) > 1 else None


def _own_key(container: Any, key: str | int) -> Any:
    """Return a key as the container has it: paths hold every key of a dict as text."""
    if isinstance(key, int) or key in container:
        return key
    return next((own for own in container if str(own) == key), key)


def _has_other_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _refuse_tensor(tensor: Any, name: str) -> None:
    if is_sharded(tensor):
        tensor = shard_of(tensor, name).local
    if hasattr(tensor, "local_shards"):
        return
    refuse_unstorable(tensor, name)
    if tensor.layout != torch.strided:
        raise UnsupportedStateError(
            f"{name} is a tensor that cannot be stored through DCP",
            why=f"its layout is {tensor.layout}",
            next="call .to_dense() first",
        )


def _differing(contents: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """Return the names under which ranks have something else than the first rank that has the name, and which ranks."""
    first: dict[str, str] = {}
    differing: dict[str, list[int]] = {}
    for rank, content in enumerate(contents):
        for name, digest in content.items():
            if first.setdefault(name, digest) != digest:
                differing.setdefault(name, []).append(rank)
    return differing


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
