"""Directories of Hugging Face's tools: models, checkpoints of the Trainer, states of Accelerate."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, NotAllowedError, UsageError
from ckptmgr.format.record import parse_json
from ckptmgr.interop.contents import Contents
from ckptmgr.interop.huggingface_files import MAX_FILE_NBYTES, files_entry, is_model_file
from ckptmgr.interop.live_model import LiveModel
from ckptmgr.interop.optimizer_source import name_optimizers
from ckptmgr.interop.pickled import load_restricted
from ckptmgr.interop.safetensors_source import load_directory, load_file, read_index
from ckptmgr.interop.source import member
from ckptmgr.interop.state_dicts import find_state_dict, module_entry
from ckptmgr.interop.tokenizer import preprocessor_entry
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.stored_file import check_stored_name

__all__ = ["read_accelerate", "read_model_directory", "read_trainer_directory"]

_FURTHER = re.compile(r"(model|pytorch_model)_(\d+)\.(safetensors|bin)")
_MAX_KEPT_NBYTES = 4 * MAX_FILE_NBYTES
_NOT_KEPT = ("trainer_state.json",)


@dataclass(slots=True)
class _Parts:
    """What is gathered on the way."""

    entries: list[CapturedEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def read_model_directory(directory: Path, *, allow: Sequence[str] = ()) -> Contents:
    """Read a directory of ``save_pretrained``: weights, configuration, tokenizer.

    Raises:
        CorruptCheckpointError, NotAllowedError, UsageError: As the readers of its files.
    """
    parts = _Parts()
    state = _weights(directory, allow)
    parts.entries.append(module_entry(state))
    _keep_files(directory, parts)
    return Contents(tuple(parts.entries), 0, None, tuple(parts.notes), parts.versions)


def read_trainer_directory(
    directory: Path, *, live: LiveModel | None, allow: Sequence[str] = (), weights_only: bool = False
) -> Contents:
    """Read ``checkpoint-N`` of transformers' Trainer: as a model directory, with optimizer and scheduler.

    ``training_args.bin`` is an object of the Trainer's and is never loaded.

    Raises:
        CorruptCheckpointError, NotAllowedError, UsageError, StateMismatchError: As the readers of its files.
    """
    parts = _Parts()
    state = _weights(directory, allow)
    parts.entries.append(module_entry(state))
    told = _json(directory, "trainer_state.json")
    if not weights_only:
        _optimizers(directory, parts, ["optimizer.pt"], state, live, allow)
        _schedulers(directory, parts, ["scheduler.pt"], allow)
        parts.notes.append("training_args.bin and the RNG states are not taken: they are objects, not values")
    _keep_files(directory, parts)
    step, epoch = told.get("global_step"), told.get("epoch")
    return Contents(
        tuple(parts.entries),
        step if isinstance(step, int) else 0,
        int(epoch) if isinstance(epoch, int | float) else None,
        tuple(parts.notes),
        parts.versions,
    )


def read_accelerate(
    directory: Path, *, live: LiveModel | None, allow: Sequence[str] = (), weights_only: bool = False
) -> Contents:
    """Read a directory of ``Accelerator.save_state``.

    A second model is the entry ``model-1``, a second optimizer ``optimizer-1``, and so on.

    Raises:
        CorruptCheckpointError, NotAllowedError, UsageError, StateMismatchError: As the readers of its files.
    """
    parts = _Parts()
    state = _weights(directory, allow)
    parts.entries.append(module_entry(state))
    names = sorted(path.name for path in directory.iterdir())
    for name in names:
        further = _FURTHER.fullmatch(name)
        if further is not None:
            parts.entries.append(module_entry(_one_file(directory, name, allow), name=f"model-{further.group(2)}"))
    several = len(parts.entries) > 1
    step = 0
    if not weights_only:
        optimizers = [name for name in names if re.fullmatch(r"optimizer(_\d+)?\.bin", name)]
        schedulers = [name for name in names if re.fullmatch(r"scheduler(_\d+)?\.bin", name)]
        # With several models nobody knows which optimizer is over which.
        _optimizers(directory, parts, optimizers, {} if several else state, live, allow)
        _schedulers(directory, parts, schedulers, allow)
        step = _accelerate_step(directory, names, parts, allow)
        others = [
            name for name in names if name.startswith(("custom_checkpoint", "sampler", "dl_state_dict", "scaler"))
        ]
        if others:
            parts.notes.append(f"not taken: {', '.join(others)}")
    return Contents(tuple(parts.entries), step, None, tuple(parts.notes), parts.versions)


def _weights(directory: Path, allow: Sequence[str]) -> Mapping[str, Any]:
    names = {path.name for path in directory.iterdir()}
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    has_torch = "pytorch_model.bin" in names or "pytorch_model.bin.index.json" in names
    if "model.safetensors" in names or "model.safetensors.index.json" in names or (has_safetensors and not has_torch):
        return load_directory(directory)
    if "pytorch_model.bin" in names:
        return _one_file(directory, "pytorch_model.bin", allow)
    weight_map = read_index(member(directory, "pytorch_model.bin.index.json"))
    tensors: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        for key, tensor in _one_file(directory, name, allow).items():
            if key in tensors:
                raise CorruptCheckpointError(
                    f"{key!r} stands in two shards of {directory}", next="copy or download the whole directory again"
                )
            tensors[key] = tensor
    missing = [key for key in weight_map if key not in tensors]
    if missing:
        raise CorruptCheckpointError(
            f"{missing[0]!r} is in none of the shards of {directory}", next="copy or download it again"
        )
    return tensors


def _one_file(directory: Path, name: str, allow: Sequence[str]) -> Mapping[str, Any]:
    path = member(directory, name)
    if name.endswith(".safetensors"):
        return load_file(path)
    return find_state_dict(load_restricted(path, allow=allow), key=None, where=name).state


def _optimizers(
    directory: Path,
    parts: _Parts,
    names: Sequence[str],
    state: Mapping[str, Any],
    live: LiveModel | None,
    allow: Sequence[str],
) -> None:
    present = [name for name in names if (directory / name).exists()]
    states = [load_restricted(member(directory, name), allow=allow) for name in present]
    if any(not isinstance(item, Mapping) for item in states):
        raise UsageError(f"{', '.join(present)} hold no state dicts", next="--weights-only leaves them out")
    # A file of torch.save keeps the order of the module.
    is_ordered = (directory / "pytorch_model.bin").exists() and not (directory / "model.safetensors").exists()
    naming = name_optimizers(states, state, live, is_ordered=is_ordered)
    parts.entries += naming.entries
    if naming.note is not None:
        parts.notes.append(naming.note)


def _schedulers(directory: Path, parts: _Parts, names: Sequence[str], allow: Sequence[str]) -> None:
    present = [name for name in names if (directory / name).exists()]
    for index, name in enumerate(present):
        state = load_restricted(member(directory, name), allow=allow)
        entry = "scheduler" if len(present) == 1 else f"scheduler-{index}"
        # The file does not say of which kind the scheduler is.
        parts.entries.append(CapturedEntry(entry, "scheduler", 1, {"type": None, "state": state}))


def _accelerate_step(directory: Path, names: Sequence[str], parts: _Parts, allow: Sequence[str]) -> int:
    found = next((name for name in names if name.startswith("random_states_")), None)
    if found is None:
        return 0
    parts.notes.append("the states of random number generators are not taken")
    try:
        states = load_restricted(member(directory, found), allow=allow)
    except NotAllowedError:
        parts.notes.append(f"the step is in {found}, which holds more than plain values: it counts as 0; give --step")
        return 0
    step = states.get("step") if isinstance(states, Mapping) else None
    return step if isinstance(step, int) and step >= 0 else 0


def _keep_files(directory: Path, parts: _Parts) -> None:
    """Keep the configuration and the tokenizer's files, byte for byte; and the tokenizer as a preprocessor."""
    files: dict[str, bytes] = {}
    nbytes = 0
    for path in sorted(directory.iterdir()):
        if not is_model_file(path.name) or path.name in _NOT_KEPT or path.is_dir():
            continue
        real = member(directory, path.name)
        nbytes += real.stat().st_size
        if real.stat().st_size > MAX_FILE_NBYTES or nbytes > _MAX_KEPT_NBYTES:
            nbytes -= real.stat().st_size
            parts.notes.append(f"{path.name} is left out: it is too large to be kept beside the weights")
            continue
        try:
            check_stored_name(path.name, "the directory")
        except CkptmgrError:
            parts.notes.append(f"{path.name} is left out: no checkpoint can hold a file of that name")
            continue
        files[path.name] = real.read_bytes()
    if files:
        parts.entries.append(files_entry(files))
    if "config.json" in files:
        version = _json(directory, "config.json").get("transformers_version")
        if isinstance(version, str):
            parts.versions["transformers"] = version[:64]
    code = sorted(path.name for path in directory.glob("*.py"))
    if code:
        parts.notes.append(f"code is not taken: {', '.join(code)}")
    entry, note = preprocessor_entry(directory, files)
    if entry is not None:
        parts.entries.append(entry)
    if note is not None:
        parts.notes.append(note)


def _json(directory: Path, name: str) -> dict[str, Any]:
    path = member(directory, name)
    if path.stat().st_size > MAX_FILE_NBYTES:
        raise CorruptCheckpointError(f"{name} in {directory} is too large")
    try:
        document = parse_json(path.read_bytes(), where=str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, CkptmgrError) as error:
        raise CorruptCheckpointError(
            f"{name} in {directory} cannot be read", why=str(error).splitlines()[0], next="copy or download it again"
        ) from error
    return document if isinstance(document, dict) else {}
