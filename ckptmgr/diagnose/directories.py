"""What a directory is, by the files in it."""

from __future__ import annotations

import shlex

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.dcp_directory import dcp_directory, is_dcp
from ckptmgr.diagnose.folder import Folder
from ckptmgr.diagnose.model_directories import LookAt, contents_of, hugging_face, saved_model, tensorflow_checkpoint
from ckptmgr.diagnose.plain_words import listed, plural
from ckptmgr.diagnose.training_directories import accelerate, deepspeed, files_of_ranks, orbax, trainer
from ckptmgr.format.layout import RUN_MARKER

__all__ = ["foreign_directory"]

_ENDINGS = (
    ".ckpt",
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".gguf",
    ".onnx",
    ".keras",
    ".h5",
    ".npz",
    ".pkl",
    ".msgpack",
)


def foreign_directory(folder: Folder, look_at: LookAt) -> Artifact:
    """Describe a directory that is none of our runs.

    Args:
        folder: Its files.
        look_at: Describes one of them.
    """
    found = trainer(folder, look_at) or accelerate(folder, look_at) or deepspeed(folder, look_at)
    if found is None and is_dcp(folder):
        found = dcp_directory(folder)
    found = found or saved_model(folder) or orbax(folder) or hugging_face(folder, look_at)
    found = found or tensorflow_checkpoint(folder) or files_of_ranks(folder)
    return found or _with_something_below(folder)


def _with_something_below(folder: Folder) -> Artifact:
    """Describe a directory that is nothing itself, by what lies in it."""
    runs = sorted(name.removesuffix(f"/{RUN_MARKER}") for name in folder.files if name.endswith(f"/{RUN_MARKER}"))
    models = sorted(name for name in folder.files if name.lower().endswith(_ENDINGS))
    sharded = sorted({name.rpartition("/")[0] for name in folder.files if name.endswith("/.metadata")})
    problems = list(folder.problems)
    if runs:
        title = f"a directory with {plural(len(runs), 'run')} of ckptmgr below it"
        advice = [f"ckptmgr ls {shlex.quote(folder.place)}"]
    elif models or sharded:
        below = sharded or models
        title = f"a directory with {plural(len(below), 'file')} that may be models: {listed(below)}"
        advice = [f"name one of them: ckptmgr doctor {shlex.quote(folder.place_of(name))}" for name in below[:3]]
    elif not folder.files:
        title, advice = "an empty directory", ["nothing was saved there, or it was moved"]
        problems.insert(0, "it holds no file")
    else:
        title, advice = f"a directory of {plural(len(folder.files), 'file')}, none of which looks like a model", []
    return Artifact(
        place=folder.place,
        kind="directory",
        title=title,
        certainty="likely" if folder.is_partial else "certain",
        nbytes=folder.nbytes,
        contents=contents_of(folder),
        problems=tuple(problems),
        advice=tuple(advice),
    )
