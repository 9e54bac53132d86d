"""What an import is given: recognised as the doctor does it, and its files, none of which may lie outside of it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ckptmgr.diagnose.artifact import Artifact, is_damaged
from ckptmgr.diagnose.kinds import KINDS
from ckptmgr.diagnose.sniff import sniff
from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError, CorruptCheckpointError, UsageError
from ckptmgr.storage.redact import printable_url

__all__ = ["is_archive", "kind_words", "member", "open_source", "recognise_source"]

_DIRECTORIES: Final = {
    "dcp": "dcp",
    "safetensors-sharded": "safetensors-sharded",
    "transformers-trainer": "transformers-trainer",
    "accelerate": "accelerate",
    "hf-model": "hf-model",
    "peft-adapter": "safetensors-sharded",
}
_TORCH_WEIGHTS: Final = frozenset(["pytorch_model.bin", "pytorch_model.bin.index.json"])
_TORCH_CONTAINERS: Final = ("torch-zip", "torch-legacy", "pickle")
_OTHER_PICKLES: Final = ("sklearn-pickle", "joblib")


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


def recognise_source(place: Path) -> tuple[str, Artifact]:
    """Tell what a file or directory is. Nothing of it is executed.

    Returns:
        How it is to be read, and all that is known about it. The former is ``torch`` for a file of torch or a pickle,
        else one of the words of `ckptmgr.diagnose.kinds`.

    Raises:
        UsageError: It is nothing that can be imported. Says what it is, if that is known.
        CorruptCheckpointError: It is empty, cut off or damaged.
    """
    # Looked at before it is opened: a pipe would be waited for.
    if not place.is_dir() and not place.is_file():
        raise UsageError(f"{place} is no regular file", next="give a file or a directory")
    artifact = sniff(place)
    reader = _directory_reader(place, artifact) if place.is_dir() else _file_reader(artifact)
    if reader is None:
        raise _refused(place, artifact)
    if reader == "torch" and is_damaged(artifact):
        raise _refused(place, artifact)
    return reader, artifact


def kind_words(kind: str) -> str:
    """Return what a thing is, in words that fit into a sentence.

    Example:
        >>> kind_words("state-dict")
        'a state dict'
    """
    return KINDS[kind].partition(":")[0].partition(",")[0]


def _file_reader(artifact: Artifact) -> str | None:
    if artifact.kind == "safetensors":
        return "safetensors"
    details: Mapping[str, object] = artifact.details
    is_torch = details.get("container") in _TORCH_CONTAINERS and "compressed" not in details
    return "torch" if is_torch and artifact.kind not in (*_OTHER_PICKLES, "torch-truncated") else None


def _directory_reader(place: Path, artifact: Artifact) -> str | None:
    reader = _DIRECTORIES.get(artifact.kind)
    names = {entry.name for entry in place.iterdir()}
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if artifact.kind == "directory" and has_safetensors:
        return "safetensors-sharded"
    # Which of them are missing or damaged is told by their readers.
    has_weights = has_safetensors or (reader != "safetensors-sharded" and bool(names & _TORCH_WEIGHTS))
    return reader if reader == "dcp" or has_weights else None


def _refused(place: Path, artifact: Artifact) -> CkptmgrError:
    told = "; ".join((artifact.title, *artifact.problems[:3]))
    next = artifact.advice[0] if artifact.advice else f"`ckptmgr doctor {place}` tells more about it"
    if artifact.kind in ("run", "run-checkpoint"):
        return UsageError(
            f"{place} is a run of ckptmgr already",
            next="resume it, or fork it: ckptmgr resume RUN_DIR@STEP --to OTHER",
        )
    if is_damaged(artifact):
        what = "is empty" if artifact.kind == "empty" else "cannot be read"
        return CorruptCheckpointError(f"{place} {what}", why=told, next=next)
    if not place.is_dir():
        return UsageError(f"{place} is nothing that can be imported", why=f"it is {told}", next=next)
    if artifact.details.get("model") == "dcp":
        parts = ", ".join(sorted(path.parent.name for path in place.glob("*/.metadata")))
        return UsageError(
            f"{place} is no directory that can be imported as a whole",
            why=f"it is {artifact.title}, whose parts are distributed checkpoints: {parts}",
            next="import the one that holds the model: ckptmgr import DIRECTORY RUN_DIR",
        )
    return UsageError(
        f"{place} is no directory that can be imported",
        why=f"it is {told}",
        next="give one of the files, or a directory with model.safetensors, pytorch_model.bin or .metadata in it",
    )


def is_archive(path: Path) -> bool:
    """Say whether a file is a zip archive, as torch.save writes it."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        # It has the end of one, and that contradicts itself.
        return True


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
