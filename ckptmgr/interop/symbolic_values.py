"""What a pickle holds, without unpickling it: modules as their state dicts, plain values, tensors of the file's bytes.

So the weights of a whole pickled module are read where its class is gone, and those of a checkpoint that holds objects
of any class; no name in the file is imported.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ckptmgr.diagnose.artifact import Artifact
from ckptmgr.diagnose.byte_source import LocalFile
from ckptmgr.diagnose.known_globals import EXAMINED
from ckptmgr.diagnose.pickle_modules import attributes_of, is_module, parts_of_module
from ckptmgr.diagnose.pickle_values import Dict, Object, Symbol, Tensor, as_mapping, type_words
from ckptmgr.diagnose.pickled_storages import UnreadablePickleError, locate_storages
from ckptmgr.diagnose.plain_words import clean, listed
from ckptmgr.errors import UnsupportedStateError
from ckptmgr.interop.pickled import damaged, refuse_overgrown
from ckptmgr.interop.symbolic_tensors import TensorReader

__all__ = ["SymbolicFile", "read_symbolic"]

_MAX_DEPTH: Final = 60
_MAX_NAMES: Final = 250_000
_MAX_NAMES_NBYTES: Final = 64 << 20
_SHOWN: Final = 20
_WRAPPERS: Final = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}


class UnreadObject:
    """Stands for an object that only its class could make."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __repr__(self) -> str:
        return f"an {self.words}"


@dataclass(frozen=True, slots=True)
class SymbolicFile:
    """What was read of a file without unpickling it.

    Attributes:
        value: Dicts, lists, plain values and tensors; each module as a dict of its tensors.
        notes: Which classes were not imported, and where they were looked for.
        buffers: Those of the tensors in ``value`` that are buffers of a module.
        unreadable: Tensors without elements in ``value``, each with why the real one could not be read.
    """

    value: Any
    notes: tuple[str, ...]
    buffers: tuple[torch.Tensor, ...]
    unreadable: tuple[tuple[torch.Tensor, str], ...]

    def refuse_unreadable(self, state: Mapping[str, Any], where: str) -> None:
        """Refuse a state dict with tensors that could not be read.

        Raises:
            UnsupportedStateError: Names them.
        """
        reasons = {id(tensor): why for tensor, why in self.unreadable}
        found = {name: reasons[id(item)] for name, item in state.items() if id(item) in reasons}
        if found:
            raise UnsupportedStateError(
                f"{len(found)} of the tensors in {where} cannot be read without its classes",
                why="; ".join(f"{clean(name)!r}: {clean(why)}" for name, why in list(found.items())[:5]),
                next="load it with the program that wrote it, and save its state_dict() as plain tensors",
            )


def read_symbolic(path: Path, artifact: Artifact) -> SymbolicFile:
    """Read a file of torch or a pickle without unpickling it.

    Args:
        path: The file.
        artifact: What `sniff` says of it: its container, and the classes that it names.

    Raises:
        CorruptCheckpointError: It cannot be followed to its end, a tensor lies outside of its storage, or it was made
            to fill the memory.
    """
    with LocalFile(str(path)) as source:
        try:
            pickled = locate_storages(source, str(artifact.details.get("container")))
        except UnreadablePickleError as error:
            raise damaged(path, clean(str(error), 500)) from error
    reader = TensorReader(path, pickled)
    values = _Values(path, reader)
    value = values.of_root(pickled.root)
    refuse_overgrown(value, path)
    return SymbolicFile(value, _notes(artifact, list(values.classes)), tuple(values.buffers), tuple(reader.unreadable))


class _Values:
    """Turns symbols into values; each symbol once, so that what is shared stays shared."""

    def __init__(self, path: Path, reader: TensorReader) -> None:
        self.classes: dict[str, None] = {}
        self.buffers: list[torch.Tensor] = []
        self._path = path
        self._reader = reader
        self._made: dict[int, Any] = {}
        self._parts: dict[int, tuple[list[tuple[str, Symbol]], ...]] = {}
        self._nnames = 0
        self._names_nbytes = 0

    def of_root(self, root: Symbol) -> Any:
        """Return the value of the whole; of an object that is no module its attributes."""
        attributes = attributes_of(root)
        if attributes is not None and not is_module(root) and as_mapping(root) is None:
            return self._value(attributes, 0)
        return self._value(root, 0)

    def _value(self, symbol: Symbol, depth: int) -> Any:
        if symbol is None or isinstance(symbol, bool | int | float | str):
            return symbol
        if isinstance(symbol, Tensor):
            return self._reader.tensor(symbol)
        if id(symbol) not in self._made:
            if depth >= _MAX_DEPTH:
                return UnreadObject("object that is nested too deep")
            self._made[id(symbol)] = self._container(symbol, depth)
        return self._made[id(symbol)]

    def _container(self, symbol: Symbol, depth: int) -> Any:
        if is_module(symbol):
            return self._state_of(symbol)
        mapping = as_mapping(symbol)
        if mapping is not None:
            return self._dict(symbol, mapping, depth)
        if isinstance(symbol, list):
            made: list[Any] = []
            self._made[id(symbol)] = made
            made += [self._value(item, depth + 1) for item in symbol]
            return made
        if isinstance(symbol, tuple):
            # A tuple can hold itself only through something else, which then stands for it.
            self._made[id(symbol)] = UnreadObject("tuple within itself")
            return tuple(self._value(item, depth + 1) for item in symbol)
        return UnreadObject(clean(type_words(symbol)))

    def _dict(self, symbol: Symbol, mapping: Dict, depth: int) -> dict[Any, Any]:
        made: OrderedDict[Any, Any] = OrderedDict()
        self._made[id(symbol)] = made
        for key, item in mapping.pairs:
            if key is None or isinstance(key, bool | int | float | str):
                made[key] = self._value(item, depth + 1)
        versions = as_mapping(mapping.state.get("_metadata")) if isinstance(mapping.state, Dict) else None
        if versions is not None:
            # Where torch keeps the versions of the modules.
            made._metadata = {  # type: ignore[attr-defined]
                prefix: {"version": inner.get("version")}
                for prefix, item in versions.items()
                if (inner := as_mapping(item)) is not None
            }
        return made

    def _state_of(self, module: Symbol) -> dict[str, torch.Tensor]:
        """Return the state dict that a module would give: its parameters and buffers, then those of its children."""
        state: dict[str, torch.Tensor] = {}
        while isinstance(module, Object) and module.of in _WRAPPERS:
            inner = dict(parts_of_module(module)[2]).get(_WRAPPERS[module.of])
            if not is_module(inner):
                break
            self.classes.setdefault(clean(module.of, 200))
            module = inner
        pending = [("", module, 0)]
        while pending:
            prefix, part, depth = pending.pop()
            if not is_module(part):
                continue
            if depth > _MAX_DEPTH:
                raise damaged(self._path, f"its modules are nested more than {_MAX_DEPTH} deep")
            self.classes.setdefault(clean(part.of, 200))
            if id(part) not in self._parts:
                self._parts[id(part)] = parts_of_module(part)
            parameters, buffers, children = self._parts[id(part)]
            for name, item in (*parameters, *buffers):
                self._count(prefix, name)
                full = f"{prefix}{name}"
                if full in state:
                    raise damaged(self._path, f"two of its tensors are called {clean(full)!r}")
                is_tensor = isinstance(item, Tensor)
                state[full] = (
                    self._reader.tensor(item)
                    if is_tensor
                    else self._reader.stand_in(f"it is an {clean(type_words(item))}")
                )
            self.buffers += [state[f"{prefix}{name}"] for name, _ in buffers]
            for name, _ in children:
                self._count(prefix, name)
            pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children)]
        return state

    def _count(self, prefix: str, name: str) -> None:
        self._nnames += 1
        self._names_nbytes += len(prefix) + len(name)
        if self._nnames > _MAX_NAMES or self._names_nbytes > _MAX_NAMES_NBYTES:
            raise damaged(self._path, "it names more tensors than any model has: it was made to fill the memory")


def _notes(artifact: Artifact, classes: list[str]) -> tuple[str, ...]:
    places = {use.name: use.found for use in artifact.globals}
    told = [f"{name} ({place})" if (place := places.get(name)) else name for name in classes]
    notes = ["nothing was unpickled, and no class imported: the tensors were read from the bytes of the file"]
    if told:
        notes.append(f"the module is of class {told[0]}")
    if len(told) > 1:
        notes.append(f"its parts are of {listed(told[1:], _SHOWN)}")
    others = [use for use in artifact.globals if use.verdict != "plain" and use.name not in classes]
    # Python's own are nobody's that could be gone; nor is what makes a tensor of a plain pickle.
    code = [use for use in others if use.verdict == "code" and use.found and use.name != EXAMINED]
    if code:
        notes.append(
            f"not read, as they are objects of {listed([f'{use.name} ({use.found})' for use in code], _SHOWN)}"
        )
    dangerous = [use.name for use in artifact.globals if use.verdict == "dangerous"]
    if dangerous:
        notes.append(f"unpickling it would run {listed(dangerous, _SHOWN)}: do not load it in another way")
    return tuple(notes)
