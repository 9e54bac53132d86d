"""The versions that a checkpoint was written with, so that drift can be named later. Imports none of the packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

__all__ = ["recorded_versions"]

_PACKAGES = (
    "ckptmgr",
    "torch",
    "lightning",
    "pytorch-lightning",
    "numpy",
    "safetensors",
    "torchdata",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "scikit-learn",
    "skops",
    "pandas",
    "accelerate",
)

_CUDA = re.compile(r"^cuda\s*(?::[^=\n]*)?=\s*['\"]([0-9][0-9.]{0,15})['\"]", re.MULTILINE)
_MAX_VERSION_FILE = 64 * 1024


def recorded_versions() -> dict[str, str]:
    """Return package name → version, for those that are installed, and Python's own.

    ``cuda`` is the version that torch was built for, where it was; ``machine`` is the kind of processor.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in versions and (cuda := _cuda()) is not None:
        versions["cuda"] = cuda
    if machine := platform.machine():
        versions["machine"] = machine
    return versions


def _cuda() -> str | None:
    """Return what torch says about CUDA in its file of versions, which is read as text: importing it takes seconds."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    for place in spec.submodule_search_locations or () if spec is not None else ():
        try:
            with (Path(place) / "version.py").open(encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_VERSION_FILE)
        except OSError:
            continue
        found = _CUDA.search(text)
        return found[1] if found else None
    return None
