"""From a configuration to a plan: resolved, its shape checked, every target allowed. Nothing is imported or built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptmgr.config.changes import Change, changes_between
from ckptmgr.config.overrides import apply_overrides
from ckptmgr.config.references import unused_keys
from ckptmgr.config.resolving import resolve
from ckptmgr.config.stored import StoredConfig, config_to_store, refuse_redacted
from ckptmgr.config.yaml_source import parse_config
from ckptmgr.experiment.slots import DEFAULTS, SLOTS, Kind, check_slots
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.secret_arguments import refuse_secret_arguments
from ckptmgr.instantiate.targets import Target, check_targets, find_targets

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["Plan", "apply_to_slots", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """An experiment that may be built.

    Attributes:
        kind: ``lightning`` or ``plain``.
        config: The configuration, unresolved.
        tree: The same, resolved, as plain containers; every slot is there.
        targets: Every target in it, by key.
        allow: What allowed them.
        stored: What may be written of the configuration.
    """

    kind: Kind
    config: DictConfig
    tree: Mapping[str, Any]
    targets: tuple[Target, ...]
    allow: AllowList
    stored: StoredConfig

    def changes_since(self, older: DictConfig) -> list[Change]:
        """Return how the configuration differs from an older one. Where the run lies is no difference."""
        # As it is stored: a secret that was taken out is no difference.
        mine = parse_config(self.stored.config, where="the configuration")
        return [change for change in changes_between(older, mine) if change.key not in ("run_dir", "name")]


def make_plan(config: DictConfig, *, where: str, allow: AllowList) -> Plan:
    """Check all of a configuration that can be checked without importing what it names.

    Args:
        config: What `apply_to_slots` returned.
        where: Its name, for messages.
        allow: Which targets may be used.

    Raises:
        ConfigError: It cannot be meant as it was written.
        NotAllowedError: It names code that nobody has allowed, or gives a secret to what is built in.
    """
    refuse_redacted(config, where=where)
    tree = {**DEFAULTS, **resolve(config, where=where)}
    kind = check_slots(tree, unused=unused_keys(config, SLOTS))
    targets = tuple(find_targets({slot: tree[slot] for slot in DEFAULTS}))
    check_targets(targets, allow)
    for slot in DEFAULTS:
        if isinstance(tree[slot], (Mapping, list)):
            refuse_secret_arguments(tree[slot], slot, allow)
    return Plan(kind, config, tree, targets, allow, config_to_store(config))


def apply_to_slots(
    config: DictConfig, overrides: Sequence[str], values: Mapping[str, object] | None = None
) -> DictConfig:
    """Apply overrides to a configuration in which every slot may be set, whether or not the file names it.

    Args:
        config: Composed, unresolved.
        overrides: As they were typed.
        values: Slots to set besides, as they are.

    Raises:
        ConfigError: An override does not parse, or names what is not there.
    """
    from omegaconf import DictConfig, OmegaConf

    # `+seed=1` is right too, where the file does not name it.
    added = {re.split(r"[=.\[]", override[1:])[0] for override in overrides if override.startswith("+")}
    named = [str(key) for key in config if key in SLOTS]
    # Those that the file names come first, so that it is printed and stored in its own order.
    empty = {slot: DEFAULTS[slot] for slot in (*named, *DEFAULTS) if slot in named or slot not in added}
    every_slot = OmegaConf.merge(OmegaConf.create(empty), config)
    OmegaConf.set_struct(every_slot, True)
    assert isinstance(every_slot, DictConfig)
    changed = apply_overrides(every_slot, overrides)
    for key, value in (values or {}).items():
        OmegaConf.update(changed, key, value)
    return _without_empty_slots(changed)


def _without_empty_slots(config: DictConfig) -> DictConfig:
    """Return the configuration without slots that are null: they say nothing."""
    from omegaconf import OmegaConf

    texts = OmegaConf.to_container(config, resolve=False)
    assert isinstance(texts, dict)
    kept = [str(key) for key, value in texts.items() if value is not None or key not in SLOTS]
    fuller = OmegaConf.masked_copy(config, kept)
    OmegaConf.set_struct(fuller, True)
    return fuller
