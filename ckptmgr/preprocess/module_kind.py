"""Modules as preprocessors: classes and attributes of all their parts, and their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptmgr.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from ckptmgr.preprocess.class_names import class_name
from ckptmgr.preprocess.encoded import as_tensors
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.parts import Parts
from ckptmgr.preprocess.reading import reading_state
from ckptmgr.preprocess.reviewed import is_same_class, resolve_class
from ckptmgr.state.module import ModuleHandler
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.trees import copied_tree

__all__ = ["ModuleKind", "module_settings"]

# The mode is the caller's: what is built is for prediction.
_RESERVED = frozenset(vars(nn.Module()))
_HANDLER = ModuleHandler()


def module_settings(module: nn.Module, parts: Parts, where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the attributes of a module itself that have a stored form, sorted, and the names of those that have none.

    Parameters, buffers and submodules are no attributes in this sense.
    """
    settings: dict[str, Any] = {}
    omitted: list[str] = []
    for name, value in sorted(vars(module).items()):
        if name in _RESERVED:
            continue
        try:
            settings[name] = parts.capture(value, f"{where}.{name}".lstrip("."))
        except UnsupportedStateError:
            omitted.append(name)
    return settings, omitted


class ModuleKind:
    """Any `torch.nn.Module`. Its state may be trained with the model.

    The tree is ``{"class", "modules": {path: {"class", "settings", ...} or {"same_as"}}, "parameters":
    {name: requires_grad}, "buffers": [name], "ties": {name: first name}, "temporary": {name: tensor}, "state": as
    ModuleHandler's}``. It is built without calling anybody's constructor: attributes are set as they were. A module
    with attributes that have no stored form can be restored in place, and not be built.
    """

    name = "module"
    version = 1
    changes_in_training = True

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def handles(self, value: object) -> bool:
        """Say whether it is a module."""
        return isinstance(value, nn.Module)

    def capture(self, value: nn.Module) -> dict[str, Any]:
        """Return structure, attributes and state; the tensors are the live ones."""
        modules: dict[str, dict[str, Any]] = {}
        first: dict[int, str] = {}
        for path, module in value.named_modules(remove_duplicate=False):
            if (known := first.setdefault(id(module), path)) != path:
                modules[path] = {"same_as": known}
                continue
            settings, omitted = module_settings(module, self._parts, path)
            modules[path] = {"class": class_name(module), "settings": settings}
            if omitted:
                modules[path]["omitted"] = omitted
            # A layer without bias has one that is None.
            for place, named in (("parameters", module._parameters), ("buffers", module._buffers)):
                if absent := [name for name, item in named.items() if item is None]:
                    modules[path][f"absent_{place}"] = absent
        persistent = value.state_dict(keep_vars=True)
        buffers = dict(value.named_buffers(remove_duplicate=False))
        state = _HANDLER.capture(value, ParameterNames.of_state({}))
        return {
            "class": class_name(value),
            "modules": modules,
            "parameters": {name: p.requires_grad for name, p in value.named_parameters(remove_duplicate=False)},
            "buffers": [name for name in buffers if name in persistent],
            "ties": _ties(value),
            "temporary": {name: buffer for name, buffer in buffers.items() if name not in persistent},
            "state": state,
        }

    def build(self, tree: Any, allow: Allow) -> nn.Module:
        """Make a module of the recorded classes, attributes and tensors, in evaluation mode."""
        with reading_state(self.name):
            modules = {path: self._bare(path, described, allow) for path, described in tree["modules"].items()}
            for path, described in tree["modules"].items():
                if "same_as" in described:
                    modules[path] = modules[described["same_as"]]
            for path in modules:
                if path:
                    parent, _, name = path.rpartition(".")
                    modules[parent].add_module(name, modules[path])
            self._set_tensors(modules, tree)
            _HANDLER.check(modules[""], tree["state"], ParameterNames.of_state({}))
            _HANDLER.restore(modules[""], copied_tree(tree["state"]), ParameterNames.of_state({}))
            module: nn.Module = modules[""]
            return module.eval()

    def is_restorable(self, value: Any) -> bool:
        """Say yes: a module takes a state in place."""
        return True

    def restore(self, value: nn.Module, tree: Any) -> None:
        """Copy the saved tensors into the live module. Its attributes are the program's, and stay."""
        names = ParameterNames.of_state({})
        if not is_same_class(value, tree["class"]):
            raise StateMismatchError(
                f"the preprocessor of the checkpoint is a {tree['class']}, the live one a {class_name(value)}",
                next="build the module as in the run that saved",
            )
        _HANDLER.check(value, tree["state"], names)
        _HANDLER.restore(value, tree["state"], names)

    def encode(self, value: nn.Module, raw: Any) -> Any:
        """Call the module, without gradients; adds no batch dimension."""
        with torch.no_grad():
            return as_tensors(value(as_tensors(raw)))

    def _bare(self, path: str, described: Any, allow: Allow) -> Any:
        if "same_as" in described:
            return None
        if described.get("omitted"):
            names = ", ".join(map(repr, described["omitted"][:5]))
            raise UnsupportedStateError(
                f"the module {path or 'itself'!r} of the preprocessor cannot be built from the checkpoint alone",
                why=f"its attributes {names} have no stored form",
                next="build it in the program and restore into it, or give the class to_dict() and from_dict()",
            )
        cls = resolve_class(described["class"], allow)
        if not issubclass(cls, nn.Module):
            raise CorruptCheckpointError(
                f"the preprocessor of the checkpoint names the module class {described['class']}, which is none",
                next="the checkpoint was altered; do not load it",
            )
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name, setting in described["settings"].items():
            if name in _RESERVED or name.startswith("__"):
                raise ValueError(f"{name!r} is no attribute of a module's own")
            vars(module)[name] = self._parts.build(setting, allow)
        for name in described.get("absent_parameters", ()):
            module.register_parameter(name, None)
        for name in described.get("absent_buffers", ()):
            module.register_buffer(name, None)
        return module

    def _set_tensors(self, modules: dict[str, nn.Module], tree: Any) -> None:
        """Register parameters and buffers with the shapes of the saved ones, and with their ties."""
        tensors, ties = tree["state"]["tensors"], tree["ties"]
        made: dict[str, Any] = {}
        for name, requires_grad in tree["parameters"].items():
            if name in ties:
                made[name] = made[ties[name]]
            else:
                made[name] = nn.Parameter(torch.empty_like(tensors[name]), requires_grad=bool(requires_grad))
        for name in tree["buffers"]:
            made[name] = made[ties[name]] if name in ties else torch.empty_like(tensors[name])
        for name, tensor in made.items():
            parent, _, own = name.rpartition(".")
            owner = modules[parent]
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(own, tensor)
            else:
                owner.register_buffer(own, tensor)
        for name, tensor in tree["temporary"].items():
            parent, _, own = name.rpartition(".")
            modules[parent].register_buffer(own, tensor.clone(), persistent=False)


def _ties(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if (known := first.setdefault(id(tensor), name)) != name:
            ties[name] = known
    return ties
