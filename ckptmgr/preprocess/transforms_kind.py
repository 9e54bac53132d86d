"""torchvision's transforms, of both generations, and the presets that come with its weights."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ckptmgr.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from ckptmgr.preprocess.class_names import class_name
from ckptmgr.preprocess.encoded import as_tensors
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.parts import Parts
from ckptmgr.preprocess.reading import reading_state
from ckptmgr.preprocess.reviewed import is_same_class, resolve_class

__all__ = ["TransformsKind"]

_RESERVED = frozenset(vars(nn.Module()))


class TransformsKind:
    """Transforms: what was given to their constructors is read back from their attributes.

    The tree is ``{"class": name, "settings": {attribute: value}}``; transforms inside of others stand in the settings
    in the same form.
    """

    name = "transforms"
    version = 1
    changes_in_training = False

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def handles(self, value: object) -> bool:
        """Say whether its class is one of torchvision's transforms, or derived from one."""
        return not isinstance(value, type) and _is_transform(type(value))

    def capture(self, value: Any) -> dict[str, Any]:
        """Return class and attributes.

        Raises:
            UnsupportedStateError: An attribute, such as a lambda, has no stored form; or it has parameters.
        """
        if isinstance(value, nn.Module) and (value._parameters or value._buffers):
            raise UnsupportedStateError(
                f"the transform {class_name(value)} has parameters or buffers",
                why="transforms are stored as the arguments of their constructors",
                next="keep the tensors in a module of its own",
            )
        name = type(value).__name__
        return {"class": class_name(value), "settings": self._settings(value, name)}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make the transform with its constructor; where that gives other attributes, with the saved attributes."""
        with reading_state(self.name):
            cls = resolve_class(tree["class"], allow)
            if not _is_transform(cls):
                raise CorruptCheckpointError(
                    f"the preprocessor of the checkpoint names the transform {tree['class']}, which is none",
                    next="the checkpoint was altered; do not load it",
                )
            settings = {name: self._parts.build(setting, allow) for name, setting in tree["settings"].items()}
            if any(name in _RESERVED or name.startswith("__") for name in settings):
                raise ValueError("an attribute of the transform has a reserved name")
            value = _constructed(cls, settings)
            # A constructor may take an argument in another form than it keeps it: the presets do.
            if value is None or fingerprint(self._settings(value, cls.__name__)) != fingerprint(tree["settings"]):
                value = _with_attributes(cls, settings)
            return value

    def is_restorable(self, value: Any) -> bool:
        """Say yes: a transform is its attributes."""
        return True

    def restore(self, value: Any, tree: Any) -> None:
        """Give the live transform the attributes of the saved one, whose functions the live one must already have.

        Raises:
            StateMismatchError: The classes differ, or the saved one holds code that the live one does not.
        """
        if not is_same_class(value, tree["class"]):
            raise StateMismatchError(
                f"the preprocessor of the checkpoint is a {tree['class']}, the live one a {class_name(value)}",
                next="build the transform as in the run that saved",
            )

        def allow(name: str) -> Any:
            if name == class_name(value):
                return type(value)
            raise StateMismatchError(
                f"the transform of the checkpoint holds {name}",
                why="nothing is imported because a checkpoint names it",
                next="build the transform as in the run that saved",
            )

        saved = self.build(tree, allow)
        vars(value).clear()
        vars(value).update(vars(saved))

    def encode(self, value: Any, raw: Any) -> Any:
        """Call the transform on one raw input; adds no batch dimension."""
        return as_tensors(value(raw))

    def _settings(self, value: Any, where: str) -> dict[str, Any]:
        own = {name: item for name, item in vars(value).items() if name not in _RESERVED}
        if isinstance(value, nn.Module):
            own.update(value._modules)
        return {name: self._parts.capture(item, f"{where}.{name}") for name, item in sorted(own.items())}


def _is_transform(cls: type[Any]) -> bool:
    if issubclass(cls, enum.Enum) or not any("__call__" in vars(base) for base in cls.__mro__):
        return False
    return any(base.__module__.startswith("torchvision.transforms") for base in cls.__mro__)


def _constructed(cls: type[Any], settings: Mapping[str, Any]) -> Any:
    """Call the constructor with what its attributes tell about its arguments; None if they do not tell enough."""
    arguments: dict[str, Any] = {}
    rest: tuple[Any, ...] = ()
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return None
    for name, parameter in signature.parameters.items():
        # Lambda(function, *types) keeps the types under the name of the parameter.
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = tuple(settings.get(name, ()))
        elif name in settings or f"_{name}" in settings:
            arguments[name] = settings[name] if name in settings else settings[f"_{name}"]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            return None
    try:
        return cls(*arguments.values(), *rest) if rest else cls(**arguments)
    except (TypeError, ValueError):
        return None


def _with_attributes(cls: type[Any], settings: Mapping[str, Any]) -> Any:
    value: Any = object.__new__(cls)
    if isinstance(value, nn.Module):
        nn.Module.__init__(value)
    for name, setting in settings.items():
        if isinstance(value, nn.Module) and isinstance(setting, nn.Module):
            value.add_module(name, setting)
        else:
            vars(value)[name] = setting
    return value
