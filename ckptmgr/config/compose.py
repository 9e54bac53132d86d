"""Compose a configuration: a file, and the files that it includes.

A file names others under ``includes:``, a list of paths relative to itself. An include is a fragment with the same
keys. Later ones override earlier ones, and the file overrides its includes: mappings merge key by key, lists are
replaced, and a mapping with another ``_target_`` is another object and replaces the one below it whole. The result has
no includes any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ckptmgr.config.foreign import translate
from ckptmgr.config.includes import load_with_includes
from ckptmgr.config.tree import freeze

__all__ = ["Composition", "compose"]


@dataclass(frozen=True, slots=True)
class Composition:
    """A composed configuration, and where it comes from.

    Attributes:
        config: In struct mode. Interpolations stand as text; includes are merged in.
        files: Files that were read, in the order in which they were merged.
        notes: Sentences for the user: what was translated from Hydra or LightningCLI, and what was left out.
    """

    config: DictConfig
    files: tuple[str, ...]
    notes: tuple[str, ...]


def compose(path: str | Path) -> Composition:
    """Read a configuration with its includes.

    Args:
        path: A YAML file: our own, Hydra's ``.hydra/config.yaml`` or the directory that holds it, or the
            ``config.yaml`` that LightningCLI saves.

    Raises:
        ConfigError: A file cannot be read. Names it, and the files that led to it.
    """
    tree, files = load_with_includes(path)
    tree, notes = translate(tree, files[-1])
    config = freeze(tree, where=files[-1])
    return Composition(config=config, files=tuple(files), notes=tuple(notes))
