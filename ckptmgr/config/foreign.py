"""Configurations of other tools as input: recognised, and translated to our keys with notes on what changed."""

from __future__ import annotations

from ckptmgr.config.foreign_cli import is_lightning_cli, translate_lightning_cli
from ckptmgr.config.foreign_hydra import is_hydra, translate_hydra
from ckptmgr.config.tree import MISSING, Tree
from ckptmgr.errors import ConfigError

__all__ = ["refuse_open_classes", "translate"]


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


def refuse_open_classes(tree: Tree, *, where: str) -> None:
    """Refuse a translated configuration whose model or data have no class after the overrides.

    Raises:
        ConfigError: Names the override to give.
    """
    slots = {slot: tree[slot] for slot in ("model", "data") if isinstance(tree.get(slot), dict)}
    still_open = [slot for slot, node in slots.items() if node.get("_target_") == MISSING]
    if still_open:
        raise ConfigError(
            f"{where}: the class of {' and of '.join(still_open)} is not in the file",
            why="LightningCLI's program names it, and saves its arguments only",
            next=f"add {' '.join(f'{slot}._target_=your_package.YourClass' for slot in still_open)}",
        )
