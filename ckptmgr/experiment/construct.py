"""Building the objects of a plan, slot by slot, each of the base that its slot needs: all are checked, then built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptmgr.experiment.plan import Plan
from ckptmgr.instantiate.build import build, check_build, load_target
from ckptmgr.instantiate.targets import Target

__all__ = ["Construction", "Part", "by_name", "class_of", "optimizer_parts"]

Node = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """What is built for one slot.

    Attributes:
        slot: Its name.
        base: What it must be an instance of; None for anything.
        base_name: How messages call that.
        node: What the configuration says there, with defaults; of a slot that holds several, by name.
        n_args: How many positional arguments come before those of the configuration.
        extra: Names of the keyword arguments that are given besides.
        is_several: ``node`` holds a node for each name.
        is_partial: It is called later, by whoever gets it.
    """

    slot: str
    base: Any = None
    base_name: str = ""
    node: Mapping[str, Any] | None = None
    n_args: int = 0
    extra: tuple[str, ...] = ()
    is_several: bool = False
    is_partial: bool = False

    def nodes(self) -> Iterator[tuple[str, str, Node]]:
        """Yield name, key and node of everything that the slot holds."""
        if self.node is None:
            return
        if not self.is_several:
            yield self.slot, self.slot, self.node
            return
        for name, node in self.node.items():
            # Null switches one off that an include has.
            if node is not None:
                yield name, f"{self.slot}.{name}", node


class Construction:
    """Builds one plan.

    Args:
        plan: What to build.
        parts: How, for each slot. Only those that the configuration names are built.

    Raises:
        ConfigError, NotAllowedError: Something cannot be built. Everything that is named was imported, nothing built.
    """

    def __init__(self, plan: Plan, parts: Sequence[Part]) -> None:
        self._allow = plan.allow
        self._parts = {part.slot: part for part in parts}
        for part in parts:
            for _, key, node in part.nodes():
                extra = dict.fromkeys(part.extra)
                check_build(
                    # As the whole call that it will be, so that a missing argument is found now.
                    _to_call(node, part, is_partial=False),
                    key=key,
                    allow=self._allow,
                    base=part.base,
                    base_name=part.base_name,
                    n_args=part.n_args,
                    extra=extra,
                )

    def one(self, slot: str, *args: object, **extra: object) -> Any:
        """Build what a slot says; None where it says nothing."""
        return self.several(slot, *args, **extra).get(slot)

    def several(self, slot: str, *args: object, **extra: object) -> dict[str, Any]:
        """Build each node of a slot that holds several, by name."""
        part = self._parts[slot]
        return {
            name: build(
                _to_call(node, part, is_partial=part.is_partial),
                key=key,
                allow=self._allow,
                base=part.base,
                base_name=part.base_name,
                args=args,
                extra=extra,
            )
            for name, key, node in part.nodes()
        }


def _to_call(node: Node, part: Part, *, is_partial: bool) -> Node:
    # Hydra's configurations leave an optimizer to whoever has the parameters: here they are at hand.
    return {**node, "_partial_": is_partial} if part.is_partial or part.n_args else node


def optimizer_parts(optimizer: Node | None, scheduler: Node | None) -> list[Part]:
    """Return how optimizer and scheduler are built, whoever trains: with the parameters, and with the optimizer."""
    optim = torch.optim
    return [
        Part("optimizer", optim.Optimizer, "a torch.optim.Optimizer", optimizer, n_args=1),
        Part("scheduler", optim.lr_scheduler.LRScheduler, "an LRScheduler of torch.optim", scheduler, n_args=1),
    ]


def by_name(nodes: Mapping[str, Node] | Sequence[Node] | None) -> Mapping[str, Node] | None:
    """Return the nodes of a slot by name; those of a list by position."""
    if nodes is None or isinstance(nodes, Mapping):
        return nodes
    return {str(position): node for position, node in enumerate(nodes)}


def class_of(plan: Plan, key: str, node: Node) -> Callable[..., Any]:
    """Import what a node names."""
    return load_target(Target(key, node["_target_"]), plan.allow)
