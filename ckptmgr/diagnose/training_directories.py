"""Directories that a training loop saved: accelerate, the transformers Trainer, DeepSpeed, FSDP, Orbax."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any, Final

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.dcp_directory import is_dcp, read_dcp
from ckptmgr.diagnose.folder import Folder
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.model_directories import LookAt, contents_of, weights_of
from ckptmgr.diagnose.plain_words import clean, listed, plural

__all__ = ["accelerate", "deepspeed", "files_of_ranks", "orbax", "trainer"]

_RANDOM: Final = re.compile(r"random_states_(\d+)\.pkl")
_RANK: Final = re.compile(r"(.*?)(?:world_size_(\d+)_)?rank[_-]?(\d+)\.(pt|pth|bin|ckpt|distcp)")
_ZERO: Final = re.compile(r"(?:.*/)?(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_STATES: Final = re.compile(r"(?:.*/)?(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")


def _model_of(folder: Folder, look_at: LookAt) -> tuple[tuple[TensorFacts, ...] | None, list[str], str | None]:
    """Return tensors of the model in a training directory, problems, and the way that it is stored."""
    found = weights_of(folder, look_at)
    if found is not None:
        return tuple(found[0]), found[2], "whole"
    for prefix in ("pytorch_model_fsdp_0/", "model_0/"):
        if is_dcp(folder, prefix):
            tensors, _, _, problems = read_dcp(folder, prefix)
            return tuple(tensors), problems, "dcp"
    return None, [], None


def accelerate(folder: Folder, look_at: LookAt) -> Artifact | None:
    """Describe a directory of `Accelerator.save_state`; None if it is none."""
    top = folder.top()
    ranks = sorted(int(match.group(1)) for name in top if (match := _RANDOM.fullmatch(name)))
    has_optimizer = (
        "optimizer.bin" in top or "optimizer.pt" in top or any(n.startswith("optimizer_0/") for n in folder.files)
    )
    if not ranks and not ("optimizer.bin" in top and "scheduler.bin" in top):
        return None
    tensors, problems, stored = _model_of(folder, look_at)
    if stored is None:
        problems.append("its model is missing (model.safetensors or pytorch_model.bin)")
    if not has_optimizer:
        problems.append("the optimizer's state is missing: training cannot go on as it was")
    if ranks and ranks != list(range(len(ranks))):
        problems.append(
            f"random states of ranks are missing: there are those of {listed([str(rank) for rank in ranks])}"
        )
    if not ranks:
        problems.append("the random states are missing (random_states_0.pkl)")
    advice = [] if stored is None else [f"ckptmgr import {shlex.quote(folder.place)} RUN_DIR"]
    advice.append(f"accelerator.load_state({folder.place!r}) after prepare() of the same objects")
    advice.append(compared("accelerate", None, installed_version("accelerate")))
    return Artifact(
        place=folder.place,
        kind="accelerate",
        title="a training state of accelerate" + (f", of {plural(len(ranks), 'rank')}" if ranks else ""),
        certainty="certain",
        nbytes=folder.nbytes,
        tensors=tensors,
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=tuple(advice),
        details={"ranks": len(ranks), "model": stored},
    )


def trainer(folder: Folder, look_at: LookAt) -> Artifact | None:
    """Describe a checkpoint of the transformers Trainer; None if it is none."""
    if "trainer_state.json" not in folder.files:
        return None
    state, config = folder.json("trainer_state.json"), folder.json("config.json")
    values: Mapping[str, Any] = state if isinstance(state, dict) else {}
    tensors, problems, stored = _model_of(folder, look_at)
    details: dict[str, Any] = {"model": stored}
    if not values:
        problems.insert(0, "trainer_state.json cannot be read")
    for name in ("global_step", "epoch", "max_steps", "best_metric"):
        if isinstance(values.get(name), (int, float)):
            details[name] = values[name]
    versions: dict[str, str] = {}
    if isinstance(config, dict) and isinstance(config.get("transformers_version"), str):
        versions["transformers"] = clean(config["transformers_version"], 40)
    top = set(folder.top())
    if stored is None:
        problems.append("its model is missing")
    if not top & {"optimizer.pt", "optimizer.bin"} and stored != "dcp":
        problems.append("the optimizer's state is missing (optimizer.pt): training cannot go on as it was")
    if not any(name.startswith("rng_state") for name in top):
        problems.append("the random states are missing (rng_state.pth)")
    at = f" at step {details['global_step']}" if "global_step" in details else ""
    advice = [] if stored is None else [f"ckptmgr import {shlex.quote(folder.place)} RUN_DIR"]
    advice.append(f"trainer.train(resume_from_checkpoint={folder.place!r})")
    advice.append(compared("transformers", versions.get("transformers"), installed_version("transformers")))
    return Artifact(
        place=folder.place,
        kind="transformers-trainer",
        title=f"a checkpoint of the transformers Trainer{at}",
        certainty="certain",
        nbytes=folder.nbytes,
        versions=versions,
        tensors=tensors,
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=tuple(advice),
        details=details,
    )


def deepspeed(folder: Folder, look_at: LookAt) -> Artifact | None:
    """Describe a checkpoint of DeepSpeed; None if it is none."""
    zero = sorted(int(match.group(1)) for name in folder.files if (match := _ZERO.fullmatch(name)))
    models = sorted(name for name in folder.files if _MODEL_STATES.fullmatch(name))
    if not zero and not models:
        return None
    problems: list[str] = []
    if zero and sorted(set(zero)) != list(range(max(zero) + 1)):
        absent = sorted(set(range(min(max(zero) + 1, 10_000))) - set(zero))
        problems.append(f"the states of ranks are missing: {listed([str(rank) for rank in absent])}")
    if not models:
        problems.append("the model's states are missing (mp_rank_00_model_states.pt)")
    tag = folder.data("latest", limit=200)
    tensors = None
    if len(models) == 1:
        artifact = look_at(folder, models[0])
        tensors = artifact.tensors
        problems += [f"{models[0]}: {problem}" for problem in artifact.problems if "truncated" in problem]
    stage = " with ZeRO" if zero else ""
    return Artifact(
        place=folder.place,
        kind="deepspeed",
        title=f"a checkpoint of DeepSpeed{stage}" + (f", of {plural(len(set(zero)), 'rank')}" if zero else ""),
        certainty="certain",
        nbytes=folder.nbytes,
        tensors=tensors,
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=(
            "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict; it writes a file of"
            " weights, which `ckptmgr import` takes",
            compared("deepspeed", None, installed_version("deepspeed")),
        ),
        details={"tag": clean(tag.decode("utf-8", "replace").strip()) if tag else None, "ranks": len(set(zero))},
    )


def files_of_ranks(folder: Folder) -> Artifact | None:
    """Describe a directory of one file per rank, as FSDP's local state dicts are saved; None if it is none."""
    stems: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    for name in folder.top():
        match = _RANK.fullmatch(name)
        if match:
            stems.setdefault(match.group(1), {})[int(match.group(3)[:9])] = name
            if match.group(2):
                sizes[match.group(1)] = int(match.group(2)[:9])
    stem = max(stems, key=lambda each: (len(stems[each]), "model" in each), default=None)
    if stem is None or (len(stems[stem]) < 2 and stem not in sizes):
        return None
    ranks = sorted(stems[stem])
    size = min(sizes.get(stem, max(ranks) + 1), 100_000)
    absent = [str(rank) for rank in range(size) if rank not in stems[stem]]
    problems = [f"files of ranks are missing: {listed(absent)}"] if absent else []
    return Artifact(
        place=folder.place,
        kind="fsdp-shards",
        title=f"one file per rank, of {plural(size, 'rank')}: sharded state, such as FSDP's",
        certainty="likely",
        nbytes=folder.nbytes,
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=(
            "no file is a model alone: load each on its own rank with the same number of ranks, and save a full state"
            " dict or a distributed checkpoint from there",
            f"what one of them holds: ckptmgr doctor {shlex.quote(folder.place_of(stems[stem][ranks[0]]))}",
        ),
        details={"ranks": len(ranks), "world_size": size},
    )


def orbax(folder: Folder) -> Artifact | None:
    """Describe a checkpoint of Orbax; None if it is none."""
    prefix = next(
        (
            prefix
            for prefix in ("", "default/", "state/", "params/")
            if f"{prefix}manifest.ocdbt" in folder.files
            or (f"{prefix}_METADATA" in folder.files and isinstance(folder.json(f"{prefix}_METADATA"), dict))
        ),
        None,
    )
    has_sign = "_CHECKPOINT_METADATA" in folder.files or any(
        name.endswith(".orbax-checkpoint-tmp") for name in folder.top()
    )
    if prefix is None and not has_sign:
        return None
    metadata = folder.json(f"{prefix or ''}_METADATA")
    shapes = _orbax_shapes(folder, prefix or "")
    tensors: list[TensorFacts] = []
    entries = metadata.get("tree_metadata") if isinstance(metadata, dict) else None
    for entry in list(entries.values())[:50_000] if isinstance(entries, dict) else ():
        keys = entry.get("key_metadata") if isinstance(entry, dict) else None
        value = entry.get("value_metadata") if isinstance(entry, dict) else None
        if isinstance(keys, list) and isinstance(value, dict):
            name = ".".join(clean(str(key.get("key"))) for key in keys[:64] if isinstance(key, dict))
            shape = value.get("write_shape") or shapes.get(name)
            is_shape = isinstance(shape, list) and all(type(size) is int for size in shape[:64])
            tensors.append(TensorFacts(name[:300], "unknown", tuple(shape[:64]) if is_shape and shape else ()))
    problems = list(folder.problems)
    if prefix is not None and not any("/d/" in f"/{name}" for name in folder.files) and not shapes and not tensors:
        problems.append("its data are missing")
    if prefix is not None and f"{prefix}_METADATA" not in folder.files:
        problems.append("_METADATA is missing: the names of its arrays are unknown")
    return Artifact(
        place=folder.place,
        kind="orbax",
        title=f"an Orbax checkpoint (JAX) of {plural(len(tensors), 'array')}",
        certainty="certain" if prefix is not None else "likely",
        nbytes=folder.nbytes,
        tensors=tuple(tensors) if tensors else None,
        contents=contents_of(folder),
        problems=tuple(problems),
        advice=(
            f"orbax.checkpoint.StandardCheckpointer().restore({folder.place!r}) gives its arrays",
            compared("orbax-checkpoint", None, installed_version("orbax-checkpoint")),
        ),
    )


def _orbax_shapes(folder: Folder, prefix: str) -> dict[str, list[int]]:
    value = folder.json(f"{prefix}array_metadatas/process_0")
    shapes: dict[str, list[int]] = {}
    entries = value.get("array_metadatas") if isinstance(value, dict) else None
    for entry in entries[:50_000] if isinstance(entries, list) else ():
        inner = entry.get("array_metadata") if isinstance(entry, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("write_shape"), list):
            shapes[str(inner.get("param_name"))] = inner["write_shape"]
    return shapes
