"""The model that a user names with ``--model``: it tells which number of an optimizer's state is which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ckptmgr.diagnose.live_model import call_named
from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import group_names, unwrap_optimizer

__all__ = ["LiveModel", "build_model"]

_ENTRY = "model"


class LiveModel:
    """A model, and the optimizers over it, as the user's program builds them.

    Args:
        text: What the user typed.
        module: The model.
        optimizers: In the order in which the program has them; empty where nobody says.

    Attributes:
        parameters: Name → parameter, tied ones once.
    """

    def __init__(self, text: str, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.text = text
        self.module = module
        self.parameters = dict(module.named_parameters())
        self._optimizers = list(optimizers)

    def optimizer_names(self, sizes: Sequence[Sequence[int]]) -> list[list[list[str]]]:
        """Return the names of each group of each optimizer.

        Args:
            sizes: How many parameters each group of each stored optimizer has.

        Raises:
            StateMismatchError: The program's groups are not those of the file.
        """
        if self._optimizers:
            names = ParameterNames({_ENTRY: self.module})
            found = [
                [[name.removeprefix(f"{_ENTRY}/") for name in group] for group in group_names(optimizer, names)[0]]
                for optimizer in self._optimizers
            ]
            if [[len(group) for group in groups] for groups in found] == [list(groups) for groups in sizes]:
                return found
            raise self._others([[len(group) for group in groups] for groups in found], sizes)
        total = sum(size for groups in sizes for size in groups)
        trainable = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        for listed in (list(self.parameters), trainable):
            if len(listed) == total:
                left = iter(listed)
                return [[[next(left) for _ in range(size)] for size in groups] for groups in sizes]
        raise self._others([[len(trainable)]], sizes)

    def _others(self, live: Any, sizes: Any) -> StateMismatchError:
        return StateMismatchError(
            f"the optimizer of the file is not over the parameters of --model {self.text}",
            why=f"its groups are of {sizes} parameters, those of the program of {live}",
            next="let the factory return {'model': model, 'optimizer': optimizer}, as the run built them",
        )


def build_model(text: str, arguments: Mapping[str, Any] | None = None) -> LiveModel:
    """Import and call what the user named.

    Args:
        text: ``package.module:factory``; what it names is called, and gives a module, a LightningModule (its
            ``configure_optimizers`` is asked), or a dict of modules and optimizers by name.
        arguments: Keyword arguments for it.

    Raises:
        UsageError: It cannot be imported, fails, or gives something else.
    """
    built = call_named(text, arguments)
    if isinstance(built, Mapping):
        modules = [value for value in built.values() if isinstance(value, nn.Module)]
        if len(modules) == 1:
            return LiveModel(text, modules[0], _optimizers_in(list(built.values())))
    if isinstance(built, nn.Module):
        return LiveModel(text, built, _configured(built))
    raise UsageError(
        f"--model {text!r} gives a {type(built).__qualname__}",
        why="it must give one module, or a dict with one module and its optimizers",
        next="write a function that returns {'model': model, 'optimizer': optimizer}",
    )


def _configured(module: nn.Module) -> list[Optimizer]:
    configure = getattr(module, "configure_optimizers", None)
    if not callable(configure):
        return []
    try:
        return _optimizers_in(configure())
    except Exception:
        # Many ask their Trainer for something, and there is none: then the order of the parameters has to do.
        return []


def _optimizers_in(value: Any) -> list[Optimizer]:
    """Return the optimizers in what ``configure_optimizers`` may return, in their order."""
    if isinstance(unwrap_optimizer(value), Optimizer):
        return [unwrap_optimizer(value)]
    if isinstance(value, Mapping):
        return _optimizers_in(value.get("optimizer"))
    if isinstance(value, list | tuple):
        return [optimizer for item in value for optimizer in _optimizers_in(item)]
    return []
