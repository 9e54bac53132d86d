"""A position in the batches of an `ElasticSampler`, which means the same for any number of ranks and any batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.elastic_sampler import ElasticSampler
from ckptmgr.state.loader_facts import describe_loader, differences, loader_kind, why_reading_may_differ

__all__ = ["begun_by_user", "count_elastically", "elastic_sampler_of", "sampler_state"]

_SIZES = {"batch_size": "batch size", "world_size": "world size"}


def elastic_sampler_of(loader: Any) -> ElasticSampler | None:
    """Return the sampler if a position in this loader can be one in its samples."""
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, ElasticSampler) and loader_kind(loader) == "map" else None


def begun_by_user(loader: Any) -> dict[str, Any] | None:
    """Return where an epoch begins that the sampler was told to go on with; None: at its beginning."""
    sampler = elastic_sampler_of(loader)
    if sampler is None or not sampler.position:
        return None
    return {"earlier": [], "began_at": 0, "samples": sampler.position}


def sampler_state(loader: Any, batch: int, recut: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a position says about the samples that were trained, by all ranks; nothing for other samplers.

    Args:
        loader: The live loader.
        batch: Index of the batch in the epoch, as the position counts it.
        recut: Where in the epoch the sizes that are in force began; None: at its beginning.
    """
    sampler = elastic_sampler_of(loader)
    if sampler is None:
        return {}
    start, began_at = (0, 0) if recut is None else (int(recut["samples"]), int(recut["began_at"]))
    return {"sampler": sampler.state_at(sampler.position_after(batch - began_at, start=start))}


def count_elastically(
    state: Mapping[str, Any], loader: Any, sampler: ElasticSampler
) -> tuple[dict[str, Any], str] | None:
    """Count a position in mid-epoch anew for another batch size or world size.

    Returns:
        What is new of the position, and a sentence for the user; None if no size has changed.

    Raises:
        StateMismatchError: The sampler gives another order, or something else of the loader differs besides the sizes.
    """
    saved, live = state["facts"], describe_loader(loader)
    sampler.check(state["sampler"])
    changed = [f"{words} {saved[name]} -> {live[name]}" for name, words in _SIZES.items() if saved[name] != live[name]]
    if not changed:
        return None
    others = differences(saved, {**live, **{name: saved[name] for name in (*_SIZES, "batches")}})
    if others:
        raise StateMismatchError(
            f"{' and '.join(changed)}, in the middle of epoch {state['epoch']}",
            why=f"the samples that are left of the epoch cannot be told: {'; '.join(others)}",
            next="resume with the loader of that run but for these sizes, or from a checkpoint at the end of an epoch",
        )
    position = int(state["sampler"]["position"])
    # The length of an epoch does not change in its middle: the index becomes the one at which it ends there.
    batch = len(sampler) - sampler.batches_left(position)
    new = {
        "batch": batch,
        "is_last_batch": batch >= len(sampler),
        "recut": {"earlier": [], "began_at": batch, "samples": position},
        "facts": live,
        "attributes": state["attributes"],
    }
    text = f"{', '.join(changed)}: going on after {position} samples of epoch {state['epoch']}"
    unproven = why_reading_may_differ(loader) if loader.num_workers or saved["num_workers"] else None
    if unproven is not None:
        text += f"; not exact: {unproven}, and they begin anew (wrap the data set in PerSampleSeed)"
    return new, text
