"""The versions that a checkpoint was written with, so that drift can be named later. Imports none of the packages."""

from __future__ import annotations

import importlib.metadata
import platform

__all__ = ["recorded_versions"]

_PACKAGES = ("ckptmgr", "torch", "lightning", "pytorch-lightning", "numpy", "safetensors", "torchdata")


def recorded_versions() -> dict[str, str]:
    """Return package name → version, for those that are installed, and Python's own."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
