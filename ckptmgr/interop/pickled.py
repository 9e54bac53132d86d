"""Files of ``torch.save``, read by torch's restricted loader alone: tensors, plain values, and what the user allows."""

from __future__ import annotations

import importlib
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptmgr.diagnose.artifact import Artifact, is_damaged
from ckptmgr.diagnose.known_globals import verdict_of
from ckptmgr.diagnose.sniff import sniff
from ckptmgr.errors import CorruptCheckpointError, NotAllowedError, UsageError
from ckptmgr.interop.source import is_archive

__all__ = ["MAX_NODES", "check_allowed", "damaged", "load_restricted", "needed_globals", "refuse_overgrown"]

MAX_NODES = 5_000_000
"""Values in a file beyond which it is taken for one that was made to fill the memory."""


# Of these no class may be allowed, although to import it does no harm: it calls, reads or holds what the file says.
_NEVER_ALLOWED = (
    "_functools.",
    "_io.",
    "_operator.",
    "functools.",
    "io.",
    "joblib.",
    "logging.",
    "operator.",
    "torch._dynamo.",
    "torch._inductor.",
    "torch.fx.",
    "torch.storage._load",
    "torch.utils.",
    "types.",
)
# Functions that only put arrays and tensors together.
_BUILDING_FUNCTIONS = frozenset(
    f"{module}.{name}"
    for module in ("numpy._core.multiarray", "numpy.core.multiarray")
    for name in ("_reconstruct", "scalar")
)


def load_restricted(path: Path, *, allow: Sequence[str] = (), artifact: Artifact | None = None) -> Any:
    """Load a file onto the CPU. No class or function is imported but those of ``allow``.

    Args:
        path: The file.
        allow: Names, such as ``my_package.Config``, that the file may use besides.
        artifact: What `sniff` says of it, where that is known already.

    Raises:
        NotAllowedError: It needs more than that; lists all of it. Or an allowed name is dangerous.
        CorruptCheckpointError: It is damaged, or was made to fill the memory.
    """
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = list(check_allowed(allow))
    if artifact is None:
        artifact = sniff(path)
    if is_damaged(artifact):
        raise damaged(path, "; ".join((artifact.title, *artifact.problems[:3])))
    if artifact.kind == "torchscript":
        raise UsageError(
            f"{path} is a TorchScript archive",
            why="it holds code beside the weights",
            next="load it with torch.jit.load, and save its state_dict()",
        )
    needed = needed_globals(artifact, allow)
    if needed:
        raise _not_allowed(path, needed, artifact)
    is_zip = is_archive(path)
    if is_zip:
        _check_archive(path)
    if "numpy.dtype" in allow:
        # Of each dtype NumPy has a class of its own, whose name stands in no file.
        allowed += [item for item in vars(np.dtypes).values() if isinstance(item, type)]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        # torch warns of what its own loader does, for quantized tensors.
        warnings.simplefilter("ignore")
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
        except pickle.UnpicklingError as error:
            raise _refused(path, error) from error
        except Exception as error:
            # Whatever torch meets in a damaged file: EOFError, RuntimeError, KeyError, UnicodeDecodeError …
            raise damaged(path, f"{type(error).__name__}: {_first_line(error)}") from error
    refuse_overgrown(value, path)
    return value


def needed_globals(artifact: Artifact, allow: Sequence[str] = ()) -> list[str]:
    """Return the classes and functions that loading a file would import, beyond tensors, plain values and ``allow``."""
    return sorted(use.name for use in artifact.globals if use.verdict != "plain" and use.name not in allow)


def check_allowed(allow: Sequence[str]) -> list[tuple[Any, str]]:
    """Import what the user typed: each class with its name.

    Raises:
        NotAllowedError: It is a function, or could run commands, read files or evaluate code.
        UsageError: It cannot be imported.
    """
    return [(_allowed(name), name) for name in allow]


def _allowed(name: str) -> Any:
    """Import a name that the user typed."""
    module, _, attribute = name.rpartition(".")
    if not module:
        raise UsageError(f"--allow {name!r} names no module", next="write it in full: --allow package.module.Class")
    _refuse_dangerous(name, name)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--allow {name!r} cannot be imported",
            why=_first_line(error),
            next="install the package that defines it, or import on a machine that has it",
        ) from error
    # A name may be an alias of something else.
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    _refuse_dangerous(home, name)
    if not isinstance(found, type) and name not in _BUILDING_FUNCTIONS:
        raise NotAllowedError(
            f"--allow {name!r} is refused",
            why="it is a function, and unpickling would call it with whatever the file says; classes can be allowed",
            next="load the file with the program that wrote it, and save a plain state dict",
        )
    return found


def _refuse_dangerous(name: str, typed: str) -> None:
    module, _, attribute = name.rpartition(".")
    if verdict_of(module, attribute) == "dangerous" or name.startswith(_NEVER_ALLOWED):
        raise NotAllowedError(
            f"--allow {typed!r} is refused",
            why=f"{name.lstrip('.')} can run commands, read files or evaluate code",
            next="do not load this file; if you wrote it, save a plain state dict from the program that wrote it",
        )


def _not_allowed(path: Path, needed: Sequence[str], artifact: Artifact) -> NotAllowedError:
    dangerous = [use.name for use in artifact.globals if use.verdict == "dangerous"]
    alone = "--weights-only takes its tensors alone, and imports and runs nothing"
    if dangerous:
        return NotAllowedError(
            f"{path} is not loaded: it would run {', '.join(dangerous)}",
            why="these can run commands, read files or evaluate code; they cannot be allowed",
            next=f"do not trust this file; {alone}",
        )
    if artifact.details.get("container") == "pickle":
        return NotAllowedError(
            f"{path} is a pickle that torch.save has not written",
            why=f"to load it would import and call {', '.join(needed)}; nothing was loaded",
            next=alone,
        )
    options = " ".join(f"--allow {name}" for name in needed)
    return NotAllowedError(
        f"{path} holds more than tensors and plain values: {', '.join(needed)}",
        why="unpickling would import and call these; nothing was loaded",
        next=f"{alone}; if you know where the file is from: {options}",
    )


def _refused(path: Path, error: Exception) -> NotAllowedError | CorruptCheckpointError:
    text = str(error)
    if "Unsupported operand" in text:
        return NotAllowedError(
            f"{path} is a pickle that torch.save has not written",
            why="it may hold any object, and to load it would run its code; nothing was loaded",
            next="load it with the program that wrote it, and save its state_dict() with torch.save",
        )
    # torch's message is a page of advice, with the reason somewhere in it.
    lines = [line.strip() for line in text.splitlines() if "GLOBAL" in line or "nsupported" in line]
    if lines:
        return NotAllowedError(
            f"{path} holds more than tensors and plain values",
            why=lines[0][:300],
            next="if you know where the file is from, allow what it needs by name: --allow package.Class",
        )
    return damaged(path, text.partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or _first_line(error))


def _check_archive(path: Path) -> None:
    """Refuse an archive that would unpack to more than it is; torch writes its entries uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise damaged(path, _first_line(error)) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise damaged(path, "its entries are compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise damaged(path, "its entries overlap")


def refuse_overgrown(value: Any, path: Path) -> None:
    """Refuse a value that is larger in memory than in its file: the same list in itself a thousand times, and so on."""
    budget = MAX_NODES
    stack = [value]
    while stack:
        item = stack.pop()
        budget -= 1
        if budget < 0:
            raise damaged(path, f"it holds more than {MAX_NODES} values: it was made to fill the memory")
        if isinstance(item, torch.Tensor):
            _refuse_expanded(item, path)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)


def _refuse_expanded(tensor: torch.Tensor, path: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes > 2**26 and nbytes > 2 * tensor.untyped_storage().nbytes():
        raise damaged(path, f"a tensor of {tuple(tensor.shape)} has {tensor.untyped_storage().nbytes()} bytes only")


def damaged(path: Path, why: str) -> CorruptCheckpointError:
    """Return the error for a file that cannot be read."""
    return CorruptCheckpointError(
        f"{path} cannot be read", why=why, next="copy or download it again; `ckptmgr doctor` tells more about it"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
