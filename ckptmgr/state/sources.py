"""Where the code of a module comes from, and a digest of its source: a class that changed since can then be named."""

from __future__ import annotations

import hashlib
import inspect
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["class_sources", "module_of", "source_digest", "text_digest"]

_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "torchvision", "transformers", "torchmetrics")


def source_digest(obj: Any) -> str | None:
    """Return a digest of the source of a class or function; None where there is none to read.

    What the source calls is not looked at.
    """
    try:
        return text_digest(inspect.getsource(obj))
    except (OSError, TypeError):
        return None


def text_digest(source: str) -> str:
    """Return a digest of source text, 32 hex digits.

    Indentation of the whole and white space at the ends of lines do not count.
    """
    lines = [line.rstrip() for line in textwrap.dedent(source).strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:32]


_known_digest = cache(source_digest)


def class_sources(module: nn.Module) -> dict[str, str | None]:
    """Return the classes that a module and its parts are made of, those of well-known libraries aside.

    Their versions are in the environment. What a class derives from counts too. A class of the script that runs is
    named as if the script had been imported.

    Returns:
        ``module.qualified_name`` → digest of its source, 32 hex digits; None where it cannot be read. Sorted.
    """
    kinds = {base for part in module.modules() for base in type(part).__mro__}
    own = [
        kind for kind in kinds if kind.__module__.partition(".")[0] not in (*_LIBRARIES, "builtins", "abc", "typing")
    ]
    found = {f"{module_of(kind)}.{kind.__qualname__}": _known_digest(kind) for kind in own}
    return dict(sorted(found.items()))


def module_of(obj: Any) -> str:
    """Return the module of a class or function; of the script that runs, the name by which others import it."""
    module = str(obj.__module__)
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return "__main__" if file is None else Path(file).stem
