"""Optimizer states of other tools: numbers, for which names have to be found.

torch numbers an optimizer's parameters in the order of its groups, and no file says which number is which parameter.
With the model at hand the names are exact. Without it they are guessed from the order of the state dict, and the guess
is kept only if number and shapes agree; else the state stays by position, and fits only the same groups again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.interop.live_model import LiveModel
from ckptmgr.interop.state_dicts import names_of_parameters
from ckptmgr.state.differences import dtype_and_shape
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.optimizer import OptimizerHandler
from ckptmgr.state.optimizer_names import is_numbered, to_names

__all__ = ["Naming", "name_optimizers"]

Certainty: TypeAlias = Literal["exact", "likely", "positional"]


@dataclass(frozen=True, slots=True)
class Naming:
    """Optimizer states by name.

    Attributes:
        entries: In the order of the states.
        certainty: How the names were found.
        note: The same as a sentence; None where nothing is in doubt.
    """

    entries: tuple[CapturedEntry, ...]
    certainty: Certainty
    note: str | None


def name_optimizers(
    states: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any],
    live: LiveModel | None,
    *,
    is_ordered: bool = True,
    entry: str = "model",
) -> Naming:
    """Name the parameters of optimizer states.

    Args:
        states: As `torch.optim.Optimizer.state_dict` gives them, in the order of the optimizers.
        model: The state dict beside them.
        live: The model of ``--model``, if it was given.
        is_ordered: The state dict has the order of the module. A safetensors file has not: it sorts by name.
        entry: Entry of the model, with which names begin.

    Raises:
        StateMismatchError: The model of ``--model`` is not the one of this state.
        UnsupportedStateError: A state is of an optimizer's own form.
    """
    for state in states:
        if not is_numbered(state):
            raise UnsupportedStateError(
                "the state of an optimizer is of a form of its own",
                why=f"it has {', '.join(map(str, list(state)[:8]))}, and not state and param_groups",
                next="--weights-only imports the model without it",
            )
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in states]
    if live is not None:
        named = live.optimizer_names(sizes)
        _check_exact(states, named, live, model)
        parameters: dict[str, torch.Tensor] = {f"{entry}/{name}": p for name, p in live.parameters.items()}
        return _naming(states, [[_prefixed(entry, names) for names in groups] for groups in named], parameters, "exact")
    candidates = names_of_parameters(model)
    guessed = _in_order(states, sizes, candidates) if is_ordered else None
    if guessed is not None:
        parameters = {f"{entry}/{name}": tensor for name, tensor in candidates.items()}
        return _naming(
            states, [[_prefixed(entry, names) for names in groups] for groups in guessed], parameters, "likely"
        )
    positional = [[[f"{g}/{i}" for i in range(size)] for g, size in enumerate(groups)] for groups in sizes]
    return _naming(states, positional, {}, "positional")


def _naming(
    states: Sequence[Mapping[str, Any]],
    named: Sequence[Sequence[Sequence[str]]],
    parameters: Mapping[str, torch.Tensor],
    certainty: Certainty,
) -> Naming:
    handler = OptimizerHandler()
    entries: list[CapturedEntry] = []
    for index, (state, groups) in enumerate(zip(states, named, strict=True)):
        tree = to_names(state, groups, positional=certainty == "positional")
        tree["imported"] = certainty
        if parameters:
            tree["parameters"] = {name: dtype_and_shape(parameters[name]) for names in groups for name in names}
        name = "optimizer" if len(states) == 1 else f"optimizer-{index}"
        entries.append(CapturedEntry(name, handler.name, handler.version, tree))
    notes = {
        "exact": None,
        "likely": "the names of the optimizer's parameters are likely, not certain: the order of the state dict, with "
        "which number and shapes agree; --model package.module:factory makes them exact",
        "positional": "the optimizer's parameters have no names that can be told from this file: its state is kept by "
        "position, and fits only the same groups again; --model package.module:factory names them",
    }
    return Naming(tuple(entries), certainty, notes[certainty] if states else None)


def _prefixed(entry: str, names: Sequence[str]) -> list[str]:
    return [f"{entry}/{name}" for name in names]


def _in_order(
    states: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]], candidates: Mapping[str, torch.Tensor]
) -> list[list[list[str]]] | None:
    """Deal the names out in their order; None if number or shapes do not agree."""
    names = list(candidates)
    if sum(size for groups in sizes for size in groups) != len(names):
        return None
    left = iter(names)
    dealt = [[[next(left) for _ in range(size)] for size in groups] for groups in sizes]
    for state, groups in zip(states, dealt, strict=True):
        if _first_misfit(state, groups, {name: tuple(t.shape) for name, t in candidates.items()}) is not None:
            return None
    return dealt


def _first_misfit(
    state: Mapping[str, Any], groups: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the first parameter whose state is of another shape than it is."""
    for group, names in zip(state["param_groups"], groups, strict=True):
        for number, name in zip(group["params"], names, strict=True):
            slots = state["state"].get(number, {})
            tensors = [item for item in slots.values() if isinstance(item, torch.Tensor) and item.dim() > 0]
            if any(tuple(item.shape) != shapes[name] for item in tensors):
                return name
    return None


def _check_exact(
    states: Sequence[Mapping[str, Any]],
    named: Sequence[Sequence[Sequence[str]]],
    live: LiveModel,
    model: Mapping[str, Any],
) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in live.parameters.items()}
    absent = [name for groups in named for names in groups for name in names if name not in model]
    wrong = [name for name in shapes if name in model and tuple(model[name].shape) != shapes[name]]
    misfits = wrong + [_first_misfit(state, groups, shapes) for state, groups in zip(states, named, strict=True)]
    wrong = absent or [name for name in misfits if name is not None]
    if wrong:
        raise StateMismatchError(
            f"the model of --model {live.text} is not the one of this file",
            why=f"{wrong[0]!r} is {'not in the file' if absent else 'of another shape than its state in the file'}",
            next="name the factory that built the model of the run, or leave --model out",
        )
