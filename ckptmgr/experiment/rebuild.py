"""Parts of a run's experiment built again from its stored configuration, outside of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptmgr.experiment.construct import Construction, Part
from ckptmgr.experiment.plan import apply_to_slots, make_plan
from ckptmgr.experiment.stored_run import read_experiment
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.run.catalog import Catalog
from ckptmgr.state.rng import preserved_rng

__all__ = ["rebuild"]

_MODEL, _PREPROCESSOR = "model", "preprocessor"


def rebuild(catalog: Catalog, attempt: int, allow: AllowList, *, parts: tuple[str, ...]) -> dict[str, Any]:
    """Build the model or the preprocessor of a run as its configuration says. Random numbers stay what they were.

    Args:
        catalog: The run.
        attempt: The attempt that wrote the checkpoint.
        allow: What the configuration may name.
        parts: Which: ``model``, ``preprocessor``.

    Returns:
        What was built, by part. Empty where the run was not built from a configuration, or that does not name them.

    Raises:
        NotAllowedError: It names code that nobody has allowed. Nothing was imported.
        ConfigError, CorruptCheckpointError: It is damaged, or cannot be built.
    """
    stored = read_experiment(catalog, attempt=attempt)
    if stored is None:
        return {}
    where = f"the configuration of {catalog.storage.url}"
    plan = make_plan(apply_to_slots(stored.config, ()), where=where, allow=allow)
    nodes = {name: node for name in parts if (node := _node(plan.tree, name)) is not None}
    making = Construction(plan, [Part(name, None, "", node) for name, node in nodes.items()])
    with preserved_rng():
        return {name: making.one(name) for name in nodes}


def _node(tree: Mapping[str, Any], name: str) -> Any:
    if name == _MODEL:
        return tree[_MODEL]
    # A plain loop has it among the state, a Trainer's manager as an argument.
    return (tree["state"] or {}).get(_PREPROCESSOR) or (tree["checkpoint"] or {}).get(_PREPROCESSOR)
