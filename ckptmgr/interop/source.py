"""What an import is given: its kind, and its files, none of which may lie outside of it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.storage.redact import printable_url

__all__ = ["KINDS", "is_archive", "kind_of", "member", "open_source"]

KINDS = {
    "torch-file": "a file of torch.save",
    "safetensors": "a safetensors file",
    "safetensors-directory": "a directory of safetensors files",
    "dcp": "a checkpoint of torch.distributed.checkpoint",
    "accelerate-state": "a directory of Accelerator.save_state",
    "transformers-trainer": "a checkpoint of transformers' Trainer",
    "huggingface-model": "a Hugging Face model directory",
}

_MAX_HEADER_NBYTES = 100 * 1000 * 1000
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_NOT_A_MODEL = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"<", "a page of HTML or XML, as a failed download leaves it", "download it again, and log in first if need be"),
    (b"GGUF", "a GGUF file", "convert it with the tool that wrote it, to safetensors"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it", "load it with Keras, and save its weights as safetensors"),
    (b"\x93NUMPY", "a NumPy array", "save a state dict with torch.save or safetensors"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
)


def open_source(place: str) -> Path:
    """Return the path of a source.

    Raises:
        UsageError: It is a URL.
        CheckpointNotFoundError: Nothing is there.
    """
    if "://" in place:
        raise UsageError(
            f"{printable_url(place)} is a URL",
            why="an import reads local files, so that they are looked at before anything of them is loaded",
            next="copy it here first",
        )
    path = Path(place).expanduser()
    if not path.exists():
        raise CheckpointNotFoundError(f"nothing to import at {place}", why="there is no such file or directory")
    return path


def kind_of(place: Path) -> str:
    """Return what a file or directory is, one of `KINDS`. Nothing of it is executed.

    Raises:
        UsageError: It is nothing that can be imported. Says what it is, if that is known.
        CorruptCheckpointError: It is empty, or cut off.
    """
    if place.is_dir():
        return _kind_of_directory(place)
    # Looked at before it is opened: a pipe would be waited for.
    if not place.is_file():
        raise UsageError(f"{place} is no regular file", next="give a file or a directory")
    with place.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CorruptCheckpointError(f"{place} is empty", next="copy or download it again")
    if is_archive(place):
        return "torch-file"
    if head.startswith(b"PK"):
        raise CorruptCheckpointError(
            f"{place} is cut off",
            why="it begins as a file of torch.save, and the directory at its end is missing",
            next="copy or download it again",
        )
    nbytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 0 < nbytes <= _MAX_HEADER_NBYTES:
        return "safetensors"
    for begin, what, advice in _NOT_A_MODEL:
        if head.lstrip().startswith(begin) or head.startswith(begin):
            raise UsageError(f"{place} holds no checkpoint", why=f"it is {what}", next=advice)
    if head[0] == 0x80:
        return "torch-file"
    raise UsageError(
        f"{place} is nothing that can be imported",
        why=f"it begins with {head[:8]!r}",
        next=f"`ckptmgr doctor {place}` tells what it may be",
    )


def is_archive(path: Path) -> bool:
    """Say whether a file is a zip archive, as torch.save writes it."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        # It has the end of one, and that contradicts itself.
        return True


def _kind_of_directory(place: Path) -> str:
    names = {entry.name for entry in place.iterdir()}
    if RUN_MARKER in names:
        raise UsageError(
            f"{place} is a run of ckptmgr already",
            next="resume it, or fork it: ckptmgr resume RUN_DIR@STEP --fork-to OTHER",
        )
    if ".metadata" in names:
        return "dcp"
    has_weights = any(name in names for name in _WEIGHTS)
    if has_weights and "trainer_state.json" in names:
        return "transformers-trainer"
    if has_weights and any(name.startswith("random_states_") for name in names):
        return "accelerate-state"
    if has_weights and "config.json" in names:
        return "huggingface-model"
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "safetensors-directory"
    raise UsageError(
        f"{place} is no directory that can be imported",
        why=f"it holds {', '.join(sorted(names)[:8]) or 'nothing'}",
        next="give one of the files, or a directory with model.safetensors, pytorch_model.bin or .metadata in it",
    )


def member(directory: Path, name: str) -> Path:
    """Return the path of a file that a directory, or an index in it, names.

    Raises:
        UsageError: The name, or a link that stands there, leads out of the directory.
        CorruptCheckpointError: There is no such file.
    """
    path = directory / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise UsageError(
            f"{name!r} in {directory} leads out of the directory",
            why="an index may only name files beside it",
            next="do not trust this directory",
        )
    try:
        resolved = path.resolve(strict=True)
    except (FileNotFoundError, RuntimeError) as error:
        raise CorruptCheckpointError(
            f"{name!r} is missing in {directory}",
            why="not all files have travelled",
            next="copy the whole directory again",
        ) from error
    if not resolved.is_relative_to(_root_of(directory.resolve())):
        raise UsageError(
            f"{name!r} in {directory} is a link that leads out of the directory",
            why=f"it points to {resolved}",
            next="replace the link by the file, if you trust it",
        )
    if not resolved.is_file():
        raise UsageError(f"{name!r} in {directory} is no regular file")
    return resolved


def _root_of(directory: Path) -> Path:
    """Return what the links of a directory may point into: itself, or the repository of a Hugging Face cache."""
    # A cache has models--x/snapshots/<revision>/config.json -> ../../blobs/<digest>.
    if directory.parent.name == "snapshots" and (directory.parent.parent / "blobs").is_dir():
        return directory.parent.parent
    return directory
