"""Which entry and which tensor of one side belongs to which of the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias

from ckptmgr.diff.documents import ABSENT, ValueChange, renamed_path
from ckptmgr.diff.records import EntryChange
from ckptmgr.diff.sides import WEIGHTS, OpenSide
from ckptmgr.diff.tensors import Key, WholeTensor
from ckptmgr.format.manifest import EntryRecord

__all__ = ["EntryPairs", "TensorPair", "pair_entries", "pair_tensors"]

_Resolved: TypeAlias = tuple[Key, WholeTensor | None, WholeTensor | None]

_MODULE, _OPTIMIZER = "module", "optimizer"


@dataclass(frozen=True, slots=True)
class EntryPairs:
    """The entries that both sides have, by the name that they are told by.

    Attributes:
        first: That name → name on the first side.
        second: That name → name on the second side.
        changes: Those that one side lacks, that are called otherwise, or that another handler has captured.
        optimizers: Those whose tensors are called after the entry of their module.
        notes: What was taken for what.
    """

    first: dict[str, str]
    second: dict[str, str]
    changes: tuple[EntryChange, ...] = ()
    optimizers: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def renamed(self) -> dict[str, str]:
        """Name on the second side → name that it is told by, where that is another one."""
        return {name: told for told, name in self.second.items() if told != name}


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Two tensors of one name.

    Attributes:
        key: As the first side calls it.
        a: None where the first side has none.
        b: None where the second has none.
        aliases: Further names of the pair.
    """

    key: Key
    a: WholeTensor | None
    b: WholeTensor | None
    aliases: tuple[str, ...] = ()


def pair_entries(a: OpenSide, b: OpenSide) -> EntryPairs:
    """Pair entries by name; of those that are left, by handler where only one on each side has it.

    Weights alone are compared with the module that has most of their names.
    """
    if a.manifest is None or b.manifest is None:
        return _with_weights(a, b)
    first, second = ({entry.name: entry for entry in side.manifest.entries} for side in (a, b) if side.manifest)
    names = {name: name for name in first if name in second}
    left = [[entry for entry in one.values() if entry.name not in names] for one in (first, second)]
    counts = [Counter(entry.handler for entry in side) for side in left]
    lonely = {entry.handler: entry.name for entry in left[1] if counts[1][entry.handler] == 1}
    names |= {
        entry.name: lonely[entry.handler]
        for entry in left[0]
        if counts[0][entry.handler] == 1 and entry.handler in lonely
    }
    changes = [
        EntryChange(name, _captured_by(entry), _captured_by(second[other]), other if other != name else None)
        for name, entry in first.items()
        if (other := names.get(name)) is not None
        and (other != name or _captured_by(entry) != _captured_by(second[other]))
    ]
    changes += [EntryChange(name, _captured_by(entry), None) for name, entry in first.items() if name not in names]
    taken = set(names.values())
    changes += [EntryChange(name, None, _captured_by(entry)) for name, entry in second.items() if name not in taken]
    optimizers = frozenset(name for name in names if first[name].handler == _OPTIMIZER)
    return EntryPairs({name: name for name in names}, names, tuple(changes), optimizers)


def _with_weights(a: OpenSide, b: OpenSide) -> EntryPairs:
    run = next((side for side in (a, b) if side.manifest is not None), None)
    if run is None or run.manifest is None:
        return EntryPairs({WEIGHTS: WEIGHTS}, {WEIGHTS: WEIGHTS})
    weights = b if run is a else a
    modules = [entry.name for entry in run.manifest.entries if entry.handler == _MODULE]
    if not modules:
        note = f"{run.label} has no module, so there is nothing to compare {weights.label} with"
        return EntryPairs({}, {}, notes=(note,))
    known = {tensor.name for tensor in weights.tensors}
    common = Counter(tensor.entry for tensor in run.tensors if tensor.name in known)
    entry = max(modules, key=lambda name: common[name])
    note = f"{weights.label} is weights alone: compared with the entry {entry!r} of {run.label}"
    names = ({entry: entry}, {entry: WEIGHTS})
    return EntryPairs(*(names if run is a else names[::-1]), notes=(note,))


def _captured_by(entry: EntryRecord) -> str:
    return f"{entry.handler} v{entry.handler_version}"


def pair_tensors(a: OpenSide, b: OpenSide, entries: EntryPairs) -> tuple[list[TensorPair], list[ValueChange]]:
    """Pair the tensors of paired entries by name and rank, in the order of the first side.

    What is the same on all ranks of one side is compared with what each rank of the other has for itself. Names of one
    tensor are one pair.

    Returns:
        The pairs, and what is tied on one side alone. Files say nothing about ties.
    """
    sides = (_by_key(_told(a.tensors, entries.first, {}, entries)), _by_key(_told_second(b, entries)))
    own = [{(entry, name) for entry, name, rank in side if rank is not None} for side in sides]
    resolved: list[_Resolved] = []
    matched: set[int] = set()
    for key in sides[0] | sides[1]:
        entry, name, rank = key
        first, second = (_like(key, side, ranks) for side, ranks in zip(sides, own, strict=True))
        # What ranks have for themselves on one side alone is compared rank by rank.
        is_cut = (first is None and (entry, name) in own[0]) or (second is None and (entry, name) in own[1])
        if rank is not None or not is_cut:
            resolved.append((key, first, second))
        if first is not None and second is not None:
            matched |= {id(first), id(second)}
    tells_ties = a.manifest is not None and b.manifest is not None
    found: dict[tuple[int, int, int | None], tuple[_Resolved, list[str]]] = {}
    ties: list[ValueChange] = []
    for key, first, second in resolved:
        if first is None or second is None:
            # It may be there by another name.
            is_tied_otherwise = id(first or second) in matched
        else:
            is_tied_otherwise = _is_apart(key, first, second, sides[1]) or _is_apart(key, second, first, sides[0])
        if is_tied_otherwise and tells_ties:
            ties.append(_tie(key, first, second))
        if is_tied_otherwise and (first is None or second is None):
            continue
        identity = (id(first), id(second), key[2])
        if identity in found:
            found[identity][1].append(key[1])
        else:
            found[identity] = ((key, first, second), [])
    return [TensorPair(*pair, tuple(aliases)) for pair, aliases in found.values()], ties


def _is_apart(key: Key, tensor: WholeTensor, like: WholeTensor, other: dict[Key, WholeTensor]) -> bool:
    """Say whether a name of a tensor, and its first name, are two tensors on the other side."""
    first = other.get((key[0], tensor.name, key[2]))
    return first is not None and first is not like


def _like(key: Key, side: dict[Key, WholeTensor], own: set[tuple[str, str]]) -> WholeTensor | None:
    """Return a side's tensor of a key; for a rank, what all ranks have together if none has it for itself."""
    entry, name, rank = key
    if key not in side and rank is not None and (entry, name) not in own:
        return side.get((entry, name, None))
    return side.get(key)


def _tie(key: Key, a: WholeTensor | None, b: WholeTensor | None) -> ValueChange:
    entry, name, rank = key
    words: list[str] = []
    for one in (a, b):
        names = () if one is None else chain((one.name,), one.aliases)
        tied_to = next((each for each in names if each != name), None)
        words.append(ABSENT if one is None else f"tied to {tied_to}" if tied_to else "a tensor of its own")
    return ValueChange(f"{entry}/{name}", words[0], words[1], rank)


def _told_second(side: OpenSide, entries: EntryPairs) -> Iterable[WholeTensor]:
    return _told(side.tensors, entries.second, entries.renamed, entries)


def _told(
    tensors: Sequence[WholeTensor], names: dict[str, str], renamed: dict[str, str], entries: EntryPairs
) -> Iterable[WholeTensor]:
    """Call the tensors of one side as they are told by; those of entries without a like are left out."""
    told = {name: shown for shown, name in names.items()}
    for tensor in tensors:
        entry = told.get(tensor.entry)
        if entry is None:
            continue
        if entry in entries.optimizers and renamed:
            aliases = tuple(renamed_path(alias, renamed) for alias in tensor.aliases)
            yield replace(tensor, entry=entry, name=renamed_path(tensor.name, renamed), aliases=aliases)
        else:
            yield tensor if entry == tensor.entry else replace(tensor, entry=entry)


def _by_key(tensors: Iterable[WholeTensor]) -> dict[Key, WholeTensor]:
    listed = list(tensors)
    named = {tensor.key: tensor for tensor in listed}
    for tensor in listed:
        for alias in tensor.aliases:
            named.setdefault((tensor.entry, alias, tensor.rank), tensor)
    return named
