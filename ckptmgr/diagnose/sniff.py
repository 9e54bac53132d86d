"""What a file or directory is: recognised by its content, never executed, within bounds of memory and time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.byte_source import LocalFile, RemoteFile
from ckptmgr.diagnose.directories import foreign_directory
from ckptmgr.diagnose.file_kinds import sniff_source
from ckptmgr.diagnose.folder import Folder, LocalFolder, RemoteFolder
from ckptmgr.diagnose.kinds import KINDS
from ckptmgr.diagnose.model_directories import hugging_face, tensorflow_checkpoint
from ckptmgr.diagnose.own_runs import checkpoint_folder, reference_of, run_checkpoint, run_directory
from ckptmgr.diagnose.plain_words import clean
from ckptmgr.diagnose.small_signs import annex_pointer
from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError, UsageError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.storage.redact import printable_url

__all__ = ["KINDS", "sniff"]

LOCAL_CHECK_NBYTES = 256 << 20
REMOTE_CHECK_NBYTES = 0
_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")


def sniff(
    place: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    check_nbytes: int | None = None,
) -> Artifact:
    """Tell what a file or directory is, what is wrong with it, and what reads it.

    Nothing of it is executed, imported or unpickled, and only what lies in it is read. What is damaged, truncated or
    hostile is described, not raised.

    Args:
        place: A path, a URL that fsspec knows, or a reference to a checkpoint of a run, ``RUN_DIR@REF``.
        storage_options: What fsspec's filesystem takes. Never shown.
        check_nbytes: How many bytes may be read in order to compare checksums; by default 256 MiB of a local file,
            none of any other.

    Raises:
        CheckpointNotFoundError: Nothing is there, or the run has no such checkpoint.
        StorageError: It cannot be read.
        UsageError: The place cannot be meant so.

    Example:
        >>> sniff("last.ckpt").kind  # doctest: +SKIP
        'lightning-checkpoint'
    """
    return _fit_to_show(_sniff(os.fspath(place), storage_options, check_nbytes))


def _fit_to_show(artifact: Artifact) -> Artifact:
    """Spell out what would write over a terminal: names of files and texts in them are whoever's made them."""
    return dataclasses.replace(
        artifact,
        title=clean(artifact.title, 600),
        problems=tuple(clean(problem, 2000) for problem in artifact.problems),
        advice=tuple(clean(line, 4000) for line in artifact.advice),
        contents={clean(name, 300): clean(words, 300) for name, words in artifact.contents.items()},
    )


def _sniff(text: str, storage_options: Mapping[str, Any] | None, check_nbytes: int | None) -> Artifact:
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"{clean(str(text))!r} is no place", next="give a file, a directory or a URL")
    scheme, separator, rest = text.partition("://")
    if separator and scheme in ("file", "local"):
        text, separator = rest, ""
    with suppress(RuntimeError):  # `~name` of nobody is a name like any other
        text = text if separator else str(Path(text).expanduser())
    reference = reference_of(text)
    if reference is not None:
        return run_checkpoint(*reference, storage_options, place=text)
    if separator:
        return _remote(text, storage_options, REMOTE_CHECK_NBYTES if check_nbytes is None else check_nbytes)
    return _local(text, LOCAL_CHECK_NBYTES if check_nbytes is None else check_nbytes)


def _local(path: str, check_nbytes: int) -> Artifact:
    if Path(path).is_dir():
        folder = LocalFolder(path, path)
        return _directory(path, folder, None, partial(_in_folder, check_nbytes=min(check_nbytes, 16 << 20)))
    target = str(Path(path).readlink()) if Path(path).is_symlink() else ""
    if not Path(path).exists():
        if "annex/objects/" in target:
            return annex_pointer(path, target.rpartition("/")[2])
        if target:
            raise CheckpointNotFoundError(f"{path} is a link to {clean(target, 200)}, where nothing is")
        beside = _beside(path)
        if beside is not None:
            return beside
    with LocalFile(path) as source:
        artifact = sniff_source(source, path, is_sparse=source.is_sparse, check_nbytes=check_nbytes)
    return _with_neighbours(artifact, str(Path(path).parent), Path(path).name)


def _remote(url: str, options: Mapping[str, Any] | None, check_nbytes: int) -> Artifact:
    shown = printable_url(url)
    try:
        source = RemoteFile(url, options)
        is_file = source.is_file
    except CheckpointNotFoundError:
        is_file = False
    if is_file:
        return sniff_source(source, shown, is_sparse=False, check_nbytes=check_nbytes)
    folder = RemoteFolder(url, options)
    if not folder.files:
        raise CheckpointNotFoundError(f"nothing is at {shown}", next="check how the place is spelled")
    return _directory(url, folder, options, partial(_in_folder, check_nbytes=check_nbytes))


def _in_folder(folder: Folder, name: str, *, check_nbytes: int) -> Artifact:
    """Describe one file of a folder; what cannot be read is a problem of it."""
    place = folder.place_of(name)
    try:
        source = folder.open(name)
    except (CkptmgrError, FileNotFoundError) as error:
        return Artifact(place, "unknown", "a file that cannot be read", "unknown", problems=(str(error),))
    try:
        return sniff_source(source, place, is_sparse=False, check_nbytes=check_nbytes)
    finally:
        getattr(source, "close", lambda: None)()


def _directory(place: str, folder: Folder, options: Mapping[str, Any] | None, look_at: Any) -> Artifact:
    manifests = any(name.startswith("checkpoints/") and name.endswith("/manifest.json") for name in folder.files)
    try:
        if RUN_MARKER in folder.files or manifests:
            return run_directory(place, options)
        of_run = checkpoint_folder(place if "://" in place else os.path.abspath(place))  # noqa: PTH100 - resolve() would follow links
        if of_run is not None and "manifest.json" in folder.files:
            return run_checkpoint(*of_run, options, place=folder.place)
    except CkptmgrError as error:
        found = foreign_directory(folder, look_at)
        return dataclasses.replace(
            found,
            kind="run",
            title="a run of ckptmgr that cannot be read",
            problems=(clean(str(error).replace("\n", ";"), 500), *found.problems),
        )
    return foreign_directory(folder, look_at)


def _beside(path: str) -> Artifact | None:
    """Describe a checkpoint of TensorFlow by the name that it goes by, which is that of no file."""
    parent, name = str(Path(path).parent), Path(path).name
    if not Path(f"{path}.index").is_file():
        return None
    folder = LocalFolder(parent, parent)
    return tensorflow_checkpoint(folder, name) if f"{name}.index" in folder.files else None


def _with_neighbours(artifact: Artifact, parent: str, name: str) -> Artifact:
    """Add to a file what only the files beside it tell."""
    if name.endswith(_INDEX_ENDINGS) and artifact.kind == "json":
        folder = LocalFolder(parent, parent)
        look_at = partial(_in_folder, check_nbytes=1 << 20)
        whole = hugging_face(folder, look_at)
        return dataclasses.replace(whole, place=artifact.place) if whole is not None else artifact
    wanted = artifact.details.get("external_files")
    if artifact.kind == "onnx" and wanted:
        folder = LocalFolder(parent, parent)
        missing = [
            f"the file {each!r}, which holds weights of it, is missing" for each in wanted if each not in folder.files
        ]
        return dataclasses.replace(artifact, problems=(*artifact.problems, *missing))
    return artifact
