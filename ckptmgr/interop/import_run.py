"""Import: a new run whose first checkpoint is what another tool has saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.known_globals import EXAMINED
from ckptmgr.errors import NotAllowedError, UsageError
from ckptmgr.interop.contents import Contents
from ckptmgr.interop.dcp_source import read_dcp
from ckptmgr.interop.directory_source import read_accelerate, read_model_directory, read_trainer_directory
from ckptmgr.interop.lightning_source import is_lightning, read_lightning
from ckptmgr.interop.live_model import LiveModel, build_model
from ckptmgr.interop.new_run import create_run, open_empty
from ckptmgr.interop.optimizer_source import name_optimizers
from ckptmgr.interop.pickled import check_allowed, load_restricted, needed_globals
from ckptmgr.interop.safetensors_source import load_directory, load_file
from ckptmgr.interop.source import kind_words, open_source, recognise_source
from ckptmgr.interop.state_dicts import find_state_dict, module_entry
from ckptmgr.interop.symbolic_values import read_symbolic
from ckptmgr.run.environment import recorded_versions
from ckptmgr.state.optimizer_names import is_numbered
from ckptmgr.words import printable_place

__all__ = ["ImportedRun", "import_run"]

_STEP_KEYS = ("global_step", "step", "iteration", "iter", "steps")


@dataclass(frozen=True, slots=True)
class ImportedRun:
    """What an import has made.

    Attributes:
        reference: Names the checkpoint.
        source: The name of the file or directory.
        what: What it was, in words.
        step: Optimizer updates completed.
        entries: Names of the entries.
        notes: What was chosen, guessed or left out.
    """

    reference: str
    source: str
    what: str
    step: int
    entries: tuple[str, ...]
    notes: tuple[str, ...]


def import_run(
    source: str,
    run_dir: str,
    *,
    key: str | None = None,
    model: str | None = None,
    model_arguments: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    weights_only: bool = False,
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ImportedRun:
    """Make a run of what another tool has saved. Nothing of the source is executed; it is only read.

    A whole pickled module gives its parameters and buffers, by their names in it; its class is not needed.

    A checkpoint of Lightning becomes what a CheckpointManager would have saved: a Trainer with one in this run goes on
    from there. Anything else becomes the entry ``model``, with ``optimizer`` and ``scheduler`` where the source has
    them, for ``Checkpointer.restore``.

    Args:
        source: A file or a directory.
        run_dir: Path or URL of the new run. Nothing, or an empty directory, may be there.
        key: Where in the file the state dict stands, with dots between the levels; found by itself if it is the only
            one.
        model: ``package.module:factory``. It is imported and called, and names the optimizer's parameters exactly.
        model_arguments: Keyword arguments for it.
        allow: Classes, by their full names, that the file may use besides tensors and plain values.
        weights_only: Take the weights alone. Of a file that names classes they are read without importing any.
        step: Optimizer updates completed, where the source does not say.
        storage_options: For the run; never recorded.

    Raises:
        UsageError: The source is nothing that can be imported, or the run is there already.
        CheckpointNotFoundError: There is no source.
        NotAllowedError: Loading it would run code.
        CorruptCheckpointError: It is damaged.
        UnsupportedStateError: It holds a tensor or value that no checkpoint can store.
        StateMismatchError: The model of ``model`` is another.
    """
    place = open_source(source)
    storage = open_empty(run_dir, storage_options=storage_options)
    reader, artifact = recognise_source(place)
    live = None if model is None else build_model(model, model_arguments)
    name, what = place.resolve().name, kind_words(artifact.kind)
    if key is not None and reader not in ("torch", "dcp"):
        raise UsageError(f"--key does not go with {what}", why="it holds one state dict", next="leave --key out")
    contents = _read(place, name, reader, artifact, key=key, live=live, allow=allow, weights_only=weights_only)
    if step is not None:
        if any(entry.name == "trainer" for entry in contents.entries):
            raise UsageError("--step does not go with a checkpoint of Lightning", why="it says its step itself")
        contents = replace(contents, step=step)
    environment = {
        **recorded_versions(),
        "source.name": name,
        "source.kind": what,
        **{f"source.{tool}": version for tool, version in contents.versions.items()},
    }
    manifest = create_run(
        storage,
        contents.entries,
        step=contents.step,
        epoch=contents.epoch,
        reason=f"imported from {name}",
        environment=environment,
    )
    return ImportedRun(
        f"{printable_place(run_dir)}@{manifest.step}",
        name,
        what,
        manifest.step,
        tuple(entry.name for entry in contents.entries),
        contents.notes,
    )


def _read(
    place: Path,
    name: str,
    reader: str,
    artifact: Artifact,
    *,
    key: str | None,
    live: LiveModel | None,
    allow: Sequence[str],
    weights_only: bool,
) -> Contents:
    match reader:
        case "torch":
            if _is_symbolic(artifact, allow, weights_only=weights_only):
                check_allowed(allow)
                return _read_symbolic(place, name, artifact, key=key, live=live, weights_only=weights_only)
            value = load_restricted(place, allow=allow, artifact=artifact)
            if key is None and is_lightning(value):
                return read_lightning(value, name, live=live, weights_only=weights_only)
            return _read_value(value, name, key=key, live=live, weights_only=weights_only)
        case "safetensors":
            return Contents((module_entry(load_file(place)),))
        case "safetensors-sharded":
            return Contents((module_entry(load_directory(place)),))
        case "dcp":
            found, notes = read_dcp(place, key=key)
            return Contents((module_entry(found.state),), notes=(*_told(found.key, key), *notes))
        case "hf-model":
            return read_model_directory(place, allow=allow)
        case "transformers-trainer":
            return read_trainer_directory(place, live=live, allow=allow, weights_only=weights_only)
    return read_accelerate(place, live=live, allow=allow, weights_only=weights_only)


def _is_symbolic(artifact: Artifact, allow: Sequence[str], *, weights_only: bool) -> bool:
    """Say whether a file is read without unpickling it: where torch could not load it, or only with its classes."""
    if artifact.kind == "pickled-module" or "pickled_modules" in artifact.details:
        return True
    needed = [name for name in needed_globals(artifact, allow) if name != EXAMINED]
    return weights_only if needed else artifact.details.get("container") == "pickle"


def _read_symbolic(
    place: Path, name: str, artifact: Artifact, *, key: str | None, live: LiveModel | None, weights_only: bool
) -> Contents:
    """Read a whole module, or what of a file of objects is tensors and plain values."""
    if not weights_only and not artifact.tensors and artifact.details.get("container") == "pickle":
        raise NotAllowedError(
            f"{place} is a pickle that torch.save has not written",
            why=f"it is {artifact.title}, and no tensors were found in it",
            next="load it with the program that wrote it, and save its state_dict() with torch.save",
        )
    if key is None and artifact.kind == "lightning-checkpoint":
        key = "state_dict"
    found = read_symbolic(place, artifact)
    contents = _read_value(found.value, name, key=key, live=live, weights_only=weights_only, buffers=found.buffers)
    state = find_state_dict(found.value, key=key, where=name).state
    found.refuse_unreadable(state, name)
    return replace(contents, notes=(*found.notes, *contents.notes))


def _read_value(
    value: Any,
    name: str,
    *,
    key: str | None,
    live: LiveModel | None,
    weights_only: bool,
    buffers: Sequence[torch.Tensor] = (),
) -> Contents:
    """Read a state dict, or the dict of a training script of somebody's own; ``buffers`` are known to be such."""
    found = find_state_dict(value, key=key, where=name)
    entries = [module_entry(found.state)]
    notes = list(_told(found.key, key))
    step, epoch = 0, None
    if isinstance(value, Mapping) and found.key is not None:
        step = next((value[k] for k in _STEP_KEYS if type(value.get(k)) is int and value[k] >= 0), 0)
        epoch = value["epoch"] if type(value.get("epoch")) is int and value["epoch"] >= 0 else None
        optimizers = [str(k) for k, item in value.items() if isinstance(item, Mapping) and is_numbered(item)]
        if optimizers and not weights_only:
            no_parameters = set(map(id, buffers))
            likely = {k: item for k, item in found.state.items() if id(item) not in no_parameters}
            naming = name_optimizers([value[k] for k in optimizers], likely, live)
            entries += naming.entries
            notes.append(f"optimizer: taken from {', '.join(map(repr, optimizers))}")
            if naming.note is not None:
                notes.append(naming.note)
        taken = {found.key.partition(".")[0], *([] if weights_only else optimizers), *_STEP_KEYS, "epoch"}
        others = [str(k) for k in value if k not in taken]
        if others:
            notes.append(f"not taken: {', '.join(others[:8])}{', …' if len(others) > 8 else ''}")
    return Contents(tuple(entries), step, epoch, tuple(notes))


def _told(found: str | None, asked: str | None) -> list[str]:
    return [f"model: the state dict at {found!r}, the only one"] if found is not None and asked is None else []
