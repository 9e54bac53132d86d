"""The modules in a pickle, told by the attributes that every `torch.nn.Module` has."""

from __future__ import annotations

from typing import Final

from ckptmgr.diagnose.pickle_values import Dict, Object, Set, Symbol, as_mapping

__all__ = ["OF_EVERY_MODULE", "attributes_of", "is_module", "parts_of_module"]

# Makes a traced module from its attributes; its code, which that would run, stands among them.
_GRAPH_MODULE: Final = "torch.fx.graph_module.reduce_graph_module"
OF_EVERY_MODULE: Final = frozenset(
    [
        "training",
        "_backend",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_buffers",
        "_compiled_call_impl",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    ]
)
"""Attributes of which every module has some, whatever its class: they tell nothing about it."""


def is_module(value: Symbol) -> bool:
    """Say whether an object is a `torch.nn.Module`, by the attributes that it is given."""
    state = attributes_of(value)
    return state is not None and {"_parameters", "_modules"} <= set(state.keys())


def attributes_of(value: Symbol) -> Dict | None:
    """Return the attributes that an object is given, by name; None where there are none, or in a form of its own."""
    if not isinstance(value, Object):
        return None
    given = value.args if value.of == _GRAPH_MODULE else value.state
    state = given[0] if isinstance(given, tuple) and given else given
    return state if isinstance(state, Dict) else None


def parts_of_module(
    value: Symbol,
) -> tuple[list[tuple[str, Symbol]], list[tuple[str, Symbol]], list[tuple[str, Symbol]]]:
    """Return a module's own parameters, its buffers, and its children, by name, as its state dict would have them.

    A parameter that is None is none, and a buffer that is not persistent is in no state dict.
    """
    attributes = attributes_of(value) or Dict()
    groups = [as_mapping(attributes.get(name)) or Dict() for name in ("_parameters", "_buffers", "_modules")]
    parameters, buffers, children = (
        [(name, item) for name, item in group.items() if item is not None] for group in groups
    )
    transient = attributes.get("_non_persistent_buffers_set")
    if isinstance(transient, Set):
        left_out = {name for name in transient.members if type(name) is str}
        buffers = [(name, item) for name, item in buffers if name not in left_out]
    return parameters, buffers, children
