"""Options that optimizers and LR schedulers are built with, and where today's differ from those of a checkpoint.

A restore puts the checkpoint's values back, so a program that was changed to ``lr=0.01`` would go on with the old rate
without a word. To notice it, the options as built, before any restore, are stored beside the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import group_names, unwrap_optimizer
from ckptmgr.state.optimizer_carry import LIVE_OPTIONS
from ckptmgr.state.optimizer_names import is_numbered

__all__ = ["LEARNING_RATE", "OptionChange", "changed_options", "describe_options"]

LEARNING_RATE = "lr"
"""The option that stands for what a group was built with, whatever a scheduler has made of it since."""

_NO_GROUP_OPTIONS = frozenset({"params", "param_names", LEARNING_RATE, "initial_lr", *LIVE_OPTIONS})
# What a schedule counts, or derives from the optimizer's rates.
_COUNTERS = frozenset(
    {"last_epoch", "base_lrs", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "mode_worse", "verbose"}
)
_PRIVATE_OPTIONS = frozenset({"_milestones", "_schedule_phases", "_anneal_func_type"})
_WORDS = {LEARNING_RATE: "learning rate", "weight_decay": "weight decay", "batch_size": "batch size"}
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class OptionChange:
    """One option that the live program was built with another value of.

    Attributes:
        entry: Name of the object in the state.
        option: Name of the option.
        was: Its value in the program that the checkpoint comes from.
        now: Its value in the live program.
        group: Index of the parameter group in the live optimizer; None for schedulers, and for other objects.
        group_name: What the user called the group, else a parameter of it; empty where there is only one group.
        inner: Where a scheduler lies inside of others: the index at each level.
    """

    entry: str
    option: str
    was: Any
    now: Any
    group: int | None = None
    group_name: str = ""
    inner: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What is changed, for people."""
        place = f"{self.entry}.{self.group} ({self.group_name})" if self.group_name else self.entry
        inside = "".join(f".{index}" for index in self.inner)
        return f"{_WORDS.get(self.option, self.option.lstrip('_'))} of {place}{inside}"

    def __str__(self) -> str:
        return f"{self.label}: {self.was} -> {self.now}"


def describe_options(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that optimizers and schedulers were built with, as plain JSON values.

    Call it before anything is restored. An optimizer that has state already was used, so that what it was built with is
    not known; it is left out, with its schedulers, as are optimizers with a state dict of their own form.

    Args:
        objects: Optimizers, schedulers and the modules that name the parameters, by entry; others are ignored.

    Returns:
        ``{entry: {"groups": [{"of": parameter, "name": text or None, "options": {...}}]}}`` for an optimizer, and
        ``{entry: {"options": {...}, "schedulers": [nested]}}`` for a scheduler.
    """
    names = ParameterNames.of_state(objects)
    described: dict[str, Any] = {}
    for entry, value in objects.items():
        optimizer = unwrap_optimizer(value)
        if isinstance(optimizer, Optimizer) and _is_as_built(optimizer):
            groups = _describe_groups(optimizer, names)
            if groups is not None:
                described[entry] = {"groups": groups}
        elif isinstance(value, LRScheduler) and _is_as_built(getattr(value, "optimizer", None)):
            described[entry] = _describe_scheduler(value)
    return described


def changed_options(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[OptionChange]:
    """Compare what two programs were built with.

    Options that only one of them has are not compared: another version of torch has added or removed them. Neither are
    groups without counterpart; `regrouped_options.by_live_groups` finds it for groups that were split or merged.

    Args:
        saved: From a checkpoint, by `describe_options`.
        live: From this program.
    """
    changes: list[OptionChange] = []
    for entry, now in live.items():
        was = saved.get(entry)
        if not isinstance(was, Mapping) or was.keys() != now.keys():
            continue
        if "groups" in now:
            changes += _changed_groups(entry, was["groups"], now["groups"])
        else:
            changes += _changed_scheduler(entry, was, now, ())
    return changes


def _is_as_built(optimizer: Any) -> bool:
    if not isinstance(optimizer, Optimizer):
        return False
    # Adagrad makes its state when it is built, with a step of 0.
    return all(isinstance(slots, Mapping) and slots.get("step", 1) == 0 for slots in optimizer.state.values())


def _describe_groups(optimizer: Optimizer, names: ParameterNames) -> list[dict[str, Any]] | None:
    if not is_numbered(optimizer.state_dict()):
        return None
    try:
        listed, _ = group_names(optimizer, names)
    except UnsupportedStateError:
        # Whoever captures the optimizer says so.
        return None
    described = []
    for group, group_listed in zip(optimizer.param_groups, listed, strict=True):
        options = {key: _plain(value) for key, value in group.items() if key not in _NO_GROUP_OPTIONS}
        # A warm-up lowers the rate when it is made; what the user gave is then here.
        options[LEARNING_RATE] = _plain(group.get("initial_lr", group.get(LEARNING_RATE)))
        name = group.get("name")
        described.append(
            {
                # A parameter is in one group only, so one of them is enough to find the group again.
                "of": min(group_listed, default=""),
                "name": name if isinstance(name, str) else None,
                "options": {key: value for key, value in options.items() if value is not _ABSENT},
            }
        )
    return described


def _describe_scheduler(scheduler: Any) -> dict[str, Any]:
    options = {
        key: _plain(value)
        for key, value in vars(scheduler).items()
        if key not in _COUNTERS and (key in _PRIVATE_OPTIONS or not key.startswith("_"))
    }
    return {
        "options": {key: value for key, value in options.items() if value is not _ABSENT},
        "schedulers": [_describe_scheduler(inner) for inner in getattr(scheduler, "_schedulers", ())],
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; ``_ABSENT`` for what is no plain value, such as a function."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            return _ABSENT
        number = value.detach().cpu()
        # The shortest text of a float32: a rate that became a tensor is not another rate.
        return float(str(number.numpy().reshape(()))) if number.dtype == torch.float32 else number.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Counter):
        return _plain(sorted(value.elements()))
    if isinstance(value, Mapping):
        items = {key: _plain(item) for key, item in value.items()}
        return items if all(isinstance(k, str) and v is not _ABSENT for k, v in items.items()) else _ABSENT
    if isinstance(value, list | tuple):
        listed = [_plain(item) for item in value]
        return listed if all(item is not _ABSENT for item in listed) else _ABSENT
    return _ABSENT


def _changed_groups(entry: str, saved: Sequence[Any], live: Sequence[Any]) -> Iterator[OptionChange]:
    known = {group["of"]: group for group in saved}
    for index, group in enumerate(live):
        was = known.get(group["of"])
        if was is None:
            continue
        name = (group["name"] or f"{group['of']}, …") if len(live) > 1 else ""
        for option, old, new in _different(was["options"], group["options"]):
            yield OptionChange(entry, option, old, new, group=index, group_name=name)


def _changed_scheduler(
    entry: str, saved: Mapping[str, Any], live: Mapping[str, Any], inner: tuple[int, ...]
) -> Iterator[OptionChange]:
    for option, old, new in _different(saved["options"], live["options"]):
        yield OptionChange(entry, option, old, new, inner=inner)
    for index, (was, now) in enumerate(zip(saved["schedulers"], live["schedulers"], strict=False)):
        yield from _changed_scheduler(entry, was, now, (*inner, index))


def _different(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    # The learning rate first: it is what people look for.
    for option in sorted(live, key=lambda option: option != LEARNING_RATE):
        if option in saved and saved[option] != live[option]:
            yield option, saved[option], live[option]
