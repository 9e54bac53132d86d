"""Objects that give and take their own state: schedulers, scalers, generators, and anything ``Stateful``.

What they do with a state is theirs alone, so a restore of one can fail halfway; capture.py then puts back what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.carried_groups import regrouped, sources_of
from ckptmgr.state.entry import EntryScope
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.rng import capture_generator, is_generator, restore_generator
from ckptmgr.state.trees import same_structure_copy

__all__ = ["GeneratorHandler", "GradScalerHandler", "SchedulerHandler", "StatefulHandler"]


class StatefulHandler:
    """Captures what ``state_dict()`` gives and hands it to ``load_state_dict``."""

    name = "stateful"
    version = 1
    scope: EntryScope = "per-rank"

    def handles(self, value: object) -> bool:
        """Say whether the object gives and takes its state."""
        return not isinstance(value, type) and all(
            callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")
        )

    def capture(self, value: Any, names: ParameterNames) -> Any:
        """Return the object's state dict."""
        return value.state_dict()

    def check(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Accept everything: only the object knows what it can load."""

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Hand the state to the object."""
        value.load_state_dict(same_structure_copy(tree))


class SchedulerHandler(StatefulHandler):
    """Captures learning-rate schedulers as torch does; functions in them are the program's, and stay.

    The tree is ``{"type": [class name, [nested], ...], "state": state_dict}``. Of a state that another tool saved
    nobody knows the type, and it is None.
    """

    name = "scheduler"
    scope: EntryScope = "replicated"

    def handles(self, value: object) -> bool:
        """Say whether the value is one of torch's schedulers, or derived from one."""
        return isinstance(value, LRScheduler)

    def capture(self, value: LRScheduler, names: ParameterNames) -> dict[str, Any]:
        """Return the scheduler's state and kind."""
        return {"type": _kind(value), "state": value.state_dict()}

    def check(self, value: LRScheduler, tree: Any, names: ParameterNames) -> None:
        """Compare the kind and the number of groups."""
        live_kind = _kind(value)
        if tree["type"] is None:
            _check_keys(value, tree["state"])
        elif tree["type"] != live_kind:
            raise StateMismatchError(
                f"the scheduler of the checkpoint is {_kind_text(tree['type'])}, the live one {_kind_text(live_kind)}",
                why="the state of one kind means nothing to another",
                next="build the same scheduler; to change the schedule, leave it out of the restored entries",
            )
        saved, live = _by_group(tree["state"]), _by_group(vars(value))
        if saved is None or live is None:
            return
        sources = sources_of(getattr(value, "optimizer", None), len(saved))
        if sources is not None and None in sources:
            raise StateMismatchError(
                f"group {sources.index(None)} of the optimizer that the scheduler drives holds new parameters only",
                why="the checkpoint has no base learning rate for it",
                next="put new parameters into a group that the run that saved had, or make their group's learning rate "
                "constant in an optimizer of its own",
            )
        if sources is None and len(saved) != len(live):
            raise StateMismatchError(
                f"the scheduler of the checkpoint drives {len(saved)} parameter groups, the live one {len(live)}",
                why="each group has its own base learning rate",
                next="build the optimizer with the same groups as in the run that saved, or put it into the state "
                "before its scheduler: groups that were split or merged are then matched by their parameters",
            )

    def restore(self, value: LRScheduler, tree: Any, names: ParameterNames) -> None:
        """Load the scheduler's state; the learning rates themselves are the optimizer's."""
        state = same_structure_copy(tree["state"])
        nsaved = len(_by_group(state) or ())
        sources = sources_of(getattr(value, "optimizer", None), nsaved)
        if sources is not None and None not in sources and sources != tuple(range(nsaved)):
            state = regrouped(state, nsaved, sources)
        value.load_state_dict(state)


class GradScalerHandler(StatefulHandler):
    """Captures the loss scale and its growth counter."""

    name = "grad-scaler"
    scope: EntryScope = "replicated"

    def handles(self, value: object) -> bool:
        """Say whether the value is torch's gradient scaler."""
        return isinstance(value, GradScaler)

    def check(self, value: GradScaler, tree: Any, names: ParameterNames) -> None:
        """Refuse an enabled scaler where a disabled one was saved: it has no scale to go on from."""
        if value.is_enabled() and not tree:
            raise StateMismatchError(
                "the gradient scaler of the checkpoint was disabled, the live one is enabled",
                why="the checkpoint holds no scale",
                next="train in the precision of the run that saved, or leave the scaler out of the restored entries",
            )


class GeneratorHandler:
    """Captures a random number generator that the program holds."""

    name = "generator"
    version = 1

    def handles(self, value: object) -> bool:
        """Say whether the value is a generator of torch, NumPy or Python."""
        return is_generator(value)

    def capture(self, value: Any, names: ParameterNames) -> dict[str, Any]:
        """Return the generator's state."""
        return capture_generator(value)

    def check(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Compare the kinds."""
        kind = capture_generator(value)["kind"]
        if not isinstance(tree, dict) or tree.get("kind") != kind:
            raise StateMismatchError(
                "the random number generator of the checkpoint is of another kind",
                why=f"the live one is a {kind} generator ({type(value).__qualname__})",
                next="create the generator as in the run that saved",
            )

    def restore(self, value: Any, tree: Any, names: ParameterNames) -> None:
        """Put the generator into the saved state."""
        restore_generator(value, tree)


def _check_keys(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Tell another kind of scheduler by what it keeps."""
    live, saved = scheduler.state_dict().keys(), state.keys()
    # A later version of torch may keep more, and a first step too.
    if {name for name in saved ^ live if not name.startswith("_")}:
        raise StateMismatchError(
            f"the scheduler that was imported is none of the live kind, {type(scheduler).__qualname__}",
            why=f"it keeps {', '.join(sorted(map(str, saved)))}; the live one {', '.join(sorted(live))}",
            next="build the scheduler that the run had; to change the schedule, leave it out of the restored entries",
        )


def _by_group(state: Mapping[str, Any]) -> list[Any] | None:
    """Return a list that has a value for each group of the optimizer."""
    values = state.get("base_lrs", state.get("_last_lr"))
    return values if isinstance(values, list) else None


def _kind(scheduler: Any) -> list[Any]:
    return [type(scheduler).__qualname__, *(_kind(inner) for inner in getattr(scheduler, "_schedulers", ()))]


def _kind_text(kind: list[Any]) -> str:
    name, *inner = kind
    return f"{name}({', '.join(_kind_text(item) for item in inner)})" if inner else str(name)
