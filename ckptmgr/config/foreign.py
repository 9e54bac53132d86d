"""Configurations of other tools as input: recognised, and translated to our keys with notes on what changed."""

from __future__ import annotations

from ckptmgr.config.foreign_cli import is_lightning_cli, translate_lightning_cli
from ckptmgr.config.foreign_hydra import is_hydra, translate_hydra
from ckptmgr.config.tree import Tree
from ckptmgr.errors import ConfigError

__all__ = ["translate"]


def translate(tree: Tree, file: str) -> tuple[Tree, list[str]]:
    """Return a configuration with our keys, and sentences on what was translated and what was left out.

    A configuration of our own comes back as it is, without any note.

    Args:
        tree: What was read, unresolved.
        file: Where it was read.

    Raises:
        ConfigError: It is another tool's, and cannot be translated.
    """
    if isinstance(tree.get("defaults"), list):
        raise ConfigError(
            f"{file}: this is a source of Hydra, which is composed from several files",
            why="it has a list of defaults",
            next="give the composed one: .hydra/config.yaml of a run, or what `python app.py --cfg job` prints",
        )
    if is_hydra(tree, file):
        return translate_hydra(tree)
    if is_lightning_cli(tree):
        return translate_lightning_cli(tree, file)
    return tree, []
