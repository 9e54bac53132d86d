"""Classes that were reviewed here, and so need nobody's leave: layers of torch, torchvision's transforms, tokenizers.

A name from a file chooses among classes of these modules; no module is imported because a file names it.
"""

from __future__ import annotations

import builtins
from typing import Any

from torch import Tensor, nn

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.preprocess.class_names import class_name
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import library

__all__ = ["allowed_class", "is_same_class", "resolve_class"]

_PLAIN_TYPES = (
    "bool",
    "bytes",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "object",
    "set",
    "str",
    "tuple",
)
# Where torchvision offers its transforms, their enums and the types that they tell apart.
_TORCHVISION = (
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms._presets",
    "torchvision.transforms.functional",
    "torchvision.tv_tensors",
)


def resolve_class(name: str, allow: Allow) -> type[Any]:
    """Return the class of a recorded name: one that was reviewed, or one that the caller allows.

    Raises:
        CorruptCheckpointError: There is no such class in the library, or the name is none of a class.
        NotAllowedError: Nobody allows it.
        UsageError: The library is not installed.
    """
    if not isinstance(name, str):
        raise _no_class(repr(name))
    module, _, last = name.rpartition(".")
    found: Any
    if module == "builtins" and last in _PLAIN_TYPES:
        found = getattr(builtins, last)
    elif name in ("torch.Tensor", "torch._tensor.Tensor"):
        found = Tensor
    elif name == "torch.nn.modules.module.Module" or name.startswith("torch.nn.modules."):
        found = getattr(nn, last, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise _no_class(name)
    elif name.startswith(("torchvision.transforms.", "torchvision.tv_tensors.")):
        found = _of_torchvision(module, last)
    elif name.startswith("transformers."):
        # The package offers its public classes at its top, and loads their modules when they are asked for.
        found = getattr(library("transformers", extra="ckptmgr[transformers]"), last, None)
        if not (isinstance(found, type) and found.__module__.startswith("transformers.")):
            raise _no_class(name)
    else:
        found = allow(name)
    if not isinstance(found, type):
        raise _no_class(name)
    return found


def allowed_class(name: Any, allow: Allow) -> type[Any]:
    """Return a class that the caller allows, whichever library it is of.

    Raises:
        CorruptCheckpointError: The name is none of a class.
        NotAllowedError: Nobody allows it.
    """
    found = allow(name) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise _no_class(repr(name))
    return found


def is_same_class(value: object, name: Any) -> bool:
    """Say whether a recorded name means the class of a live object, also where its library has moved it since."""
    if class_name(value) == name:
        return True
    root = type(value).__module__.partition(".")[0]
    if root not in ("torch", "torchvision", "transformers") or not str(name).startswith(f"{root}."):
        return False
    try:
        return resolve_class(name, lambda _: None) is type(value)
    except CorruptCheckpointError:
        return False


def _of_torchvision(module: str, last: str) -> Any:
    nearest: Any = None
    for place in _TORCHVISION:
        found = getattr(library(place, extra="torchvision"), last, None)
        if isinstance(found, type) and found.__module__.startswith("torchvision."):
            if found.__module__ == module:
                return found
            # Releases move classes between private modules, but never between the two generations of transforms.
            if (".v2" in found.__module__) == (".v2" in module):
                nearest = nearest or found
    if nearest is None:
        raise _no_class(f"{module}.{last}")
    return nearest


def _no_class(name: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the preprocessor of the checkpoint is of the class {name}, which does not exist here",
        why="its library has no such class in the installed version",
        next="install the version of the library that the run used; the checkpoint's environment tells it",
    )
