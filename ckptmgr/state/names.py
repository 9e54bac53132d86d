"""Names of parameters as their owner wrote them: no wrapper's prefix, whichever wrappers are around the module now."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ckptmgr.state.entry import TensorScope
from ckptmgr.state.sharding import LiveShards, is_sharded

__all__ = ["ParameterNames", "WrapperPrefixes", "buffer_scopes", "module_names", "unwrapped_module"]

# Looked up only where the program has imported the module: importing torch._dynamo takes seconds, and a module that
# nobody imported has no instances.
_LAZY_WRAPPERS = {
    "torch._dynamo.eval_frame": ("OptimizedModule", "_orig_mod"),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper": ("ActivationWrapper", "_checkpoint_wrapped_module"),
}


def _wrapped_attribute(module: nn.Module) -> str | None:
    """Return the attribute below which a wrapper holds the wrapped module; None for a module that is no wrapper.

    By type only: an attribute of a user that happens to be called ``module`` is a name and stays.
    """
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    for place, (kind, attribute) in _LAZY_WRAPPERS.items():
        cls = getattr(sys.modules.get(place), kind, None)
        if cls is not None and isinstance(module, cls):
            return attribute
    return None


def unwrapped_module(module: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers that are around it."""
    while (attribute := _wrapped_attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


class WrapperPrefixes:
    """Translates the keys of a module's ``state_dict()`` into its own names and back.

    Args:
        module: The module, wrapped or not, with wrappers anywhere inside.
    """

    def __init__(self, module: nn.Module) -> None:
        # Prefix in the state dict, and what stands there without wrappers; the longest first, for it knows the outer
        # ones.
        self._rules = sorted(_prefix_rules(module, "", ""), key=lambda rule: -len(rule[0]))

    def own_name(self, key: str) -> str:
        """Return a state dict's key without the prefixes of wrappers."""
        for prefix, own in self._rules:
            if key.startswith(prefix):
                return own + key[len(prefix) :]
        return key


def _prefix_rules(module: nn.Module, prefix: str, own: str) -> Iterator[tuple[str, str]]:
    attribute = _wrapped_attribute(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        if name != attribute:
            yield from _prefix_rules(child, f"{prefix}{name}.", f"{own}{name}.")
        elif name == "_checkpoint_wrapped_module":
            # This wrapper's own hook takes its prefix out of the state dict.
            yield from _prefix_rules(child, prefix, own)
        else:
            yield f"{prefix}{name}.", own
            yield from _prefix_rules(child, f"{prefix}{name}.", own)


def module_names(module: nn.Module, key: str = "", own: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Yield every module that is no wrapper, with the prefix that torch knows it by and the prefix of its own names."""
    attribute = _wrapped_attribute(module)
    if attribute is None:
        yield module, key, own
    for name, child in module._modules.items():
        if child is not None:
            yield from module_names(child, f"{key}{name}.", own if name == attribute else f"{own}{name}.")


def buffer_scopes(
    module: nn.Module, own: str = "", scope: TensorScope = "compared"
) -> Iterator[tuple[str, TensorScope]]:
    """Yield every persistent buffer by its own name, with the scope that DDP, around it or not, gives it."""
    if isinstance(module, DistributedDataParallel):
        scope = "rank-0" if module.broadcast_buffers else "per-rank"
    attribute = _wrapped_attribute(module)
    if attribute is None:
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and not is_sharded(buffer):
                yield own + name, scope
    for name, child in module._modules.items():
        if child is not None:
            yield from buffer_scopes(child, own if name == attribute else f"{own}{name}.", scope)


def _named_parameters(module: nn.Module, own: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under every name that it has."""
    for part, _, prefix in module_names(module, own=own):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter


class ParameterNames:
    """Knows the parameters of all modules in a state by name: ``<entry>/<parameter name>``.

    Args:
        modules: The modules of the state by entry.

    Attributes:
        is_empty: The state holds no module at all.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.is_empty = not modules
        self._names: dict[int, tuple[str, ...]] = {}
        # Keeps the parameters alive, or an id could come to mean another one.
        self._parameters: list[nn.Parameter] = []
        for entry, module in modules.items():
            _put_shards_back(module)
            for name, parameter in _named_parameters(module, f"{entry}/"):
                self._names[id(parameter)] = (*self._names.get(id(parameter), ()), name)
                self._parameters.append(parameter)

    @classmethod
    def of_state(cls, state: Mapping[str, object]) -> ParameterNames:
        """Collect the names from every module among the values of a state."""
        return cls({entry: value for entry, value in state.items() if isinstance(value, nn.Module)})

    def shards(self) -> LiveShards:
        """Return the parameters of which this rank holds a part, by name."""
        return LiveShards({name: p for p in self._parameters if is_sharded(p) for name in self._names[id(p)]})

    def of(self, parameter: torch.Tensor) -> str | None:
        """Return the parameter's first name; None if it is in no module of the state."""
        return self._names.get(id(parameter), (None,))[0]

    def all_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Return all names of a parameter; a tied one has several."""
        return self._names.get(id(parameter), ())


def _put_shards_back(module: nn.Module) -> None:
    """Let FSDP2 put its sharded parameters back: after a forward without a backward whole ones stand there."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        for part in module.modules():
            if isinstance(part, kind):
                part.reshard()
