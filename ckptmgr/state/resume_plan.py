"""Decide how a loader gets back to a saved position: exactly where that is possible, and said aloud where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch.utils.data import DataLoader, IterableDataset

from ckptmgr.state.batch_sizes import batches_passed
from ckptmgr.state.loader_facts import describe_loader, differences, why_reading_may_differ

__all__ = ["How", "OnResume", "ResumePlan", "is_boundary", "plan_resume"]

OnResume: TypeAlias = Literal["auto", "skip", "replay", "restart"]
How: TypeAlias = Literal["boundary", "skip", "load", "replay"]

_REMEDY = "wrap the data set in PerSampleSeed"


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """How to get to a saved position.

    Attributes:
        how: ``"boundary"``: the epoch is over or has not begun; start one. ``"skip"``: run the sampler only.
            ``"load"``: give the loader its own state. ``"replay"``: read the trained batches again and discard them.
        messages: What the user should know: the cost of a replay, and whatever is not exact.
    """

    how: How
    messages: tuple[str, ...] = ()


def is_boundary(state: Mapping[str, Any]) -> bool:
    """Say whether a saved position lies between two epochs, so that it means the same with another loader."""
    return bool(state["is_exhausted"] or state["is_last_batch"] or state["epoch_start"] is None)


def plan_resume(state: Mapping[str, Any], loader: Any, *, on_resume: OnResume) -> ResumePlan:
    """Decide how ``loader`` gets to the position ``state``; looks at both and changes neither.

    Args:
        state: A position saved by :class:`~ckptmgr.state.data_position.DataPosition`, from a loader of the same shape,
            or at a boundary.
        loader: The live loader.
        on_resume: What the user wants.
    """
    saved, live = state["facts"], describe_loader(loader)
    if state["epoch_start"] is None or state["is_exhausted"]:
        return ResumePlan("boundary")
    if state["is_last_batch"] and differences(saved, live):
        return ResumePlan("boundary")
    why_only_read = _why_only_read(loader, state) if batches_passed(state) else None
    if why_only_read is not None:
        # The end of an epoch that has no batch left could only be reached by reading all of it.
        return ResumePlan("boundary") if state["is_last_batch"] else _replay(state, why_only_read)
    if live["kind"] == "read":
        return ResumePlan("replay")
    if on_resume == "replay":
        return _replay(state, "on_resume='replay'")
    cheap: How = "skip" if live["kind"] == "map" else "load"
    if not live["num_workers"] and not saved["num_workers"]:
        # Samples are read in this process, under the RNG of the checkpoint. What is missing after a skip is only what
        # reading leaves behind on the data set.
        if cheap == "skip" and on_resume == "auto" and state["reading_changes_dataset"]:
            return _replay(state, "the data set counts what it reads")
        return ResumePlan(cheap)
    return _plan_with_workers(state, loader, live, on_resume, cheap)


def _plan_with_workers(
    state: Mapping[str, Any], loader: DataLoader[Any], live: Mapping[str, Any], on_resume: OnResume, cheap: How
) -> ResumePlan:
    saved = state["facts"]
    messages: list[str] = []
    if live["keeps_workers"] != saved["keeps_workers"]:
        messages.append("not exact: persistent_workers has changed, and with it what is drawn when an epoch begins")
    unproven = _why_unproven(loader)
    live_on = live["keeps_workers"] or saved["keeps_workers"]
    if unproven is None or (state["is_last_batch"] and not live_on):
        # Workers that end with the epoch take their RNG with them.
        return ResumePlan(cheap, tuple(messages))
    if live["num_workers"] != saved["num_workers"]:
        was, is_now = saved["num_workers"], live["num_workers"]
        return _inexact(cheap, messages, f"num_workers was {was} and is {is_now}, and {unproven}")
    if live_on and (state["workers"] is None or state["workers"]["are_reused"]):
        return _inexact(cheap, messages, f"the workers had lived through earlier epochs, and {unproven}")
    if on_resume == "skip":
        return _inexact(cheap, messages, f"on_resume='skip', and {unproven}")
    if cheap == "load" and isinstance(loader.dataset, IterableDataset):
        return _inexact(cheap, messages, f"a loader's state does not hold the RNG of its workers, and {unproven}")
    return _replay(state, f"{unproven}; {_REMEDY} to skip without reading", messages)


def _replay(state: Mapping[str, Any], reason: str, messages: list[str] | None = None) -> ResumePlan:
    passed = batches_passed(state)
    cost = [f"replaying {passed} batches of epoch {state['epoch']} because {reason}"] if passed else []
    return ResumePlan("replay", (*(messages or ()), *cost))


def _inexact(how: How, messages: list[str], reason: str) -> ResumePlan:
    text = f"not exact: {reason}; random augmentation may differ from that of an uninterrupted run ({_REMEDY})"
    return ResumePlan(how, (*messages, text))


def _why_only_read(loader: object, state: Mapping[str, Any]) -> str | None:
    dataset = getattr(loader, "dataset", None)
    name = type(dataset).__qualname__
    if state["facts"]["kind"] == "read":
        if isinstance(dataset, IterableDataset):
            return f"{name} is an IterableDataset; a StatefulDataLoader can go on without reading"
        return f"{type(loader).__qualname__} can only be read from its beginning"
    if isinstance(loader, DataLoader) and isinstance(dataset, IterableDataset):
        # torchdata's loader would read again by itself, but under whatever RNG there is.
        if not _holds(state["loader_state"], ("dataset_state", "dataset_iter_state")):
            return f"{name} has no state_dict() of its own"
        # A worker that has read its share and is loaded begins it again, while others are still reading theirs.
        if loader.num_workers and _holds(state["loader_state"], ("fetcher_ended",)):
            return "torchdata would let a worker that had finished its share begin it again"
    return None


def _why_unproven(loader: Any) -> str | None:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return why_reading_may_differ(loader)
    dataset = getattr(loader, "dataset", loader)
    return f"{type(dataset).__qualname__} may draw random numbers in the workers"


def _holds(value: object, keys: tuple[str, ...]) -> bool:
    """Say whether one of ``keys`` has a value that is neither None nor False, anywhere in a loader's state."""
    if isinstance(value, Mapping):
        return any(
            (key in keys and item is not None and item is not False) or _holds(item, keys)
            for key, item in value.items()
        )
    return isinstance(value, list | tuple) and any(_holds(item, keys) for item in value)
