"""Another batch size, or another number of ranks, than that of a saved position in the train loaders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.batch_sizes import SIZE_ATTRIBUTE, recut_position
from ckptmgr.state.changed_options import OptionChange
from ckptmgr.state.elastic_position import elastic_sampler_of
from ckptmgr.state.loader_facts import describe_loader

__all__ = ["changed_batch_sizes", "counted_anew", "refuse_other_ranks"]


def changed_batch_sizes(position: Mapping[str, Any], loaders: list[Any]) -> list[OptionChange]:
    """Return the batch sizes that differ from those of a saved position."""
    name = "train loader" if len(loaders) == 1 else "train loader {}"
    pairs = [
        (saved["facts"]["batch_size"], describe_loader(loader)["batch_size"])
        for saved, loader in zip(position["loaders"], loaders, strict=False)
    ]
    return [OptionChange(name.format(i), "batch_size", was, now) for i, (was, now) in enumerate(pairs) if was != now]


def refuse_other_ranks(position: Mapping[str, Any], loaders: list[Any]) -> None:
    """Refuse a position in mid-epoch that was counted on another number of ranks, and does not mean the same here.

    Raises:
        StateMismatchError: It is one.
    """
    for saved, loader in zip(position["loaders"], loaders, strict=False):
        facts = describe_loader(loader)
        was, now = saved["facts"].get("world_size") or 1, facts.get("world_size") or 1
        is_elastic = ("sampler" in saved and elastic_sampler_of(loader) is not None) or facts.get("is_elastic")
        if was != now and not is_elastic:
            raise StateMismatchError(
                f"batch {position['batches']} of epoch {position['epoch']} was counted on {_ranks(was)}, "
                f"and this job has {_ranks(now)}",
                why="the sampler of the run that saved gave each rank a part of the epoch, so the samples that are "
                "left of it cannot be told on another number of ranks",
                next=f"go on with {_ranks(was)} until the end of the epoch, or from a checkpoint at the end of one; "
                "with DataLoader(batch_sampler=ElasticSampler(...)) from the start, any number of ranks goes on",
            )


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def counted_anew(position: Mapping[str, Any], loader: Any) -> tuple[Mapping[str, Any], str]:
    """Count a position of one loader anew if the live one has another batch size.

    Returns:
        The position, and a sentence for the user; the same position and no sentence if the size has not changed.

    Raises:
        StateMismatchError: The rest of the epoch cannot be told with this loader.
    """
    (saved,) = position["loaders"]
    state = {
        "epoch": position["epoch"],
        "batch": position["batches"],
        "recut": position.get("recut"),
        "facts": saved["facts"],
        "attributes": saved["attributes"],
        **({"sampler": saved["sampler"]} if "sampler" in saved else {}),
    }
    found = recut_position(state, loader)
    if found is None:
        return position, ""
    new, message = found
    start = position["start"]
    (at_start,) = start["attributes"]
    # Beginning an epoch and reading change other numbers than this one.
    at_start = {name: new["attributes"][name] if name == SIZE_ATTRIBUTE else value for name, value in at_start.items()}
    anew = {
        "batches": new["batch"],
        "is_last": new["is_last_batch"],
        "recut": new["recut"],
        "start": {**start, "attributes": [at_start]},
        "loaders": [{**saved, "facts": new["facts"], "attributes": new["attributes"]}],
    }
    return {**position, **anew}, message
