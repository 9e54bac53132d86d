"""Export: one checkpoint of a run as files that other tools read. Every byte is checked against its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from ckptmgr.errors import UsageError
from ckptmgr.interop.huggingface_files import stored_files
from ckptmgr.interop.lightning_file import is_lightning_entry, lightning_checkpoint
from ckptmgr.interop.safetensors_files import is_weight_file, parse_size, write_folder, write_one
from ckptmgr.interop.stored import StoredCheckpoint, model_entry, open_checkpoint
from ckptmgr.interop.target import open_target
from ckptmgr.interop.torch_files import save_restricted
from ckptmgr.interop.weights import Weights, find_weights, without_prefix
from ckptmgr.lightning.assemble import with_versions
from ckptmgr.progress import progress
from ckptmgr.storage.redact import printable_url

__all__ = ["FORMATS", "Exported", "Format", "export_checkpoint"]

Format: TypeAlias = Literal["safetensors", "huggingface", "lightning", "state-dict"]
FORMATS: tuple[Format, ...] = get_args(Format)

_OF_SAFETENSORS = ("safetensors", "huggingface")


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written.

    Attributes:
        reference: Names the checkpoint.
        target: Where it was written, fit for printing.
        files: Names of the files.
        tensors: How many tensors they hold, where that is known.
        tied: Names of weights that are written under another name → that name.
        left_out: Names of what the checkpoint holds and the format does not.
        notes: What whoever loads it should know.
    """

    reference: str
    target: str
    files: tuple[str, ...]
    tensors: int | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export_checkpoint(
    reference: str,
    target: str,
    *,
    format: Format,
    entry: str | None = None,
    strip_prefix: str | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write one checkpoint of a run in another tool's format. Nothing is left at the target if that fails.

    Args:
        reference: ``RUN_DIR`` or ``RUN_DIR@SELECTOR``; saved by a Checkpointer or CheckpointManager, by any number of
            ranks.
        target: Path or URL. ``safetensors``: a directory, or one file if it ends so; ``huggingface``: a directory;
            ``lightning`` and ``state-dict``: a file.
        format: Which. The safetensors formats hold one tensor in memory at a time, the others all of them.
        entry: The module; by default ``model``, or the only one.
        strip_prefix: Export only what begins with this, without it: ``model.`` for the attribute of a LightningModule.
        max_shard_size: Cut the weights into files of at most this size, with an index: ``2GB``.
        force: Write over what is there.
        storage_options: For the run; never recorded.
        target_storage_options: For the target.

    Raises:
        UsageError: An option does not go with the format, or something is at the target.
        RunNotFoundError, CheckpointNotFoundError: Nothing answers to the reference.
        CorruptCheckpointError: Stored bytes are not those that were written.
        UnsupportedStateError: The format cannot hold something that must be in it.
        StorageError: The target cannot be written.
    """
    _check_options(format, target, entry, strip_prefix, max_shard_size)
    checkpoint = open_checkpoint(reference, storage_options=storage_options)
    options = dict(target_storage_options) if target_storage_options else None
    if format == "lightning":
        return _export_lightning(checkpoint, target, force, options)
    name = model_entry(checkpoint, entry)
    if format == "state-dict":
        return _export_state_dict(checkpoint, name, strip_prefix, target, force, options)
    weights = find_weights(checkpoint, name)
    if strip_prefix:
        weights = without_prefix(weights, strip_prefix)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    return _export_safetensors(checkpoint, format, weights, limit, target, force, options)


def _check_options(
    format: str, target: str, entry: str | None, strip_prefix: str | None, max_shard_size: str | None
) -> None:
    if format not in FORMATS:
        raise UsageError(f"{format!r} is no format", next=f"choose one of {', '.join(FORMATS)}")
    is_file = format == "safetensors" and _is_one_file(target)
    wrong: dict[str, str] = {}
    if max_shard_size is not None and (format not in _OF_SAFETENSORS or is_file):
        wrong["--max-shard-size"] = "it cuts the weights into several safetensors files, in a directory"
    if format == "lightning" and (entry is not None or strip_prefix is not None):
        wrong["--entry" if entry is not None else "--strip-prefix"] = "Lightning's file is about the whole Trainer"
    for option, why in wrong.items():
        raise UsageError(
            f"{option} does not go with --format {format}{' and one file' if is_file else ''}",
            why=why,
            next="leave it out, or choose another format",
        )


def _is_one_file(target: str) -> bool:
    return target.endswith(".safetensors")


def _file_name(target: str) -> str:
    return target.rstrip("/").rpartition("/")[2]


def _export_safetensors(
    checkpoint: StoredCheckpoint,
    format: Format,
    weights: Weights,
    limit: int | None,
    target: str,
    force: bool,
    options: dict[str, Any] | None,
) -> Exported:
    is_folder = format == "huggingface" or not _is_one_file(target)
    files = stored_files(checkpoint) if format == "huggingface" else {}
    if format == "huggingface" and not files:
        raise UsageError(
            f"{checkpoint.reference} holds neither a config.json nor a tokenizer",
            why="they come with an import of a Hugging Face directory, or with a tokenizer as the preprocessor",
            next="--format safetensors writes the weights; put the config.json of the model beside them",
        )
    notes = [] if not files or "config.json" in files else ["put the config.json of the model beside them"]
    with (
        progress(f"exporting step {checkpoint.manifest.step}", weights.nbytes) as advance,
        open_target(
            target, is_folder=is_folder, force=force, is_stale=is_weight_file, storage_options=options
        ) as opened,
    ):
        reader = checkpoint.watched(advance).reader
        if not is_folder:
            names = [_file_name(target)]
            with opened.create(names[0]) as file:
                write_one(file, weights.weights, reader)
        else:
            for name, content in files.items():
                with opened.create(name) as file:
                    file.write(content)
            names = [*files]
            names += write_folder(opened, weights, reader, max_shard_nbytes=limit)
    return Exported(
        checkpoint.reference,
        printable_url(target),
        tuple(names),
        len(weights.weights),
        weights.tied,
        weights.left_out,
        tuple(notes),
    )


def _export_state_dict(
    checkpoint: StoredCheckpoint,
    name: str,
    strip_prefix: str | None,
    target: str,
    force: bool,
    options: dict[str, Any] | None,
) -> Exported:
    with progress(f"exporting step {checkpoint.manifest.step}", checkpoint.nbytes_of([name])) as advance:
        tree = checkpoint.watched(advance).load([name]).entries[name].tree
        state = {**tree["tensors"], **tree.get("values", {})}
        versions = tree.get("versions", {})
        left_out: list[str] = []
        if strip_prefix:
            prefix = strip_prefix.rstrip(".") + "."
            left_out = [key for key in state if not key.startswith(prefix)]
            versions = {key[len(prefix) :]: item for key, item in versions.items() if key.startswith(prefix)}
            state = {key[len(prefix) :]: item for key, item in state.items() if key.startswith(prefix)}
            if not state:
                raise UsageError(
                    f"no name begins with {prefix!r}",
                    why=f"the first names are {', '.join(left_out[:5])}",
                    next="give another prefix, or none",
                )
        with open_target(target, is_folder=False, force=force, storage_options=options) as opened:
            file_name = _file_name(target)
            with opened.create(file_name) as file:
                save_restricted(with_versions(state, versions), file)
    return Exported(checkpoint.reference, printable_url(target), (file_name,), len(state), left_out=tuple(left_out))


def _export_lightning(
    checkpoint: StoredCheckpoint, target: str, force: bool, options: dict[str, Any] | None
) -> Exported:
    names = [name for name in checkpoint.handlers if is_lightning_entry(name)]
    with progress(f"exporting step {checkpoint.manifest.step}", checkpoint.nbytes_of(names)) as advance:
        built, notes = lightning_checkpoint(checkpoint.watched(advance))
        with open_target(target, is_folder=False, force=force, storage_options=options) as opened:
            file_name = _file_name(target)
            with opened.create(file_name) as file:
                save_restricted(built, file)
    return Exported(
        checkpoint.reference, printable_url(target), (file_name,), len(built["state_dict"]), notes=tuple(notes)
    )
