"""Which entry and which tensor of one side belongs to which of the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckptmgr.diff.documents import ABSENT, ValueChange
from ckptmgr.diff.records import EntryChange
from ckptmgr.diff.sides import WEIGHTS, OpenSide
from ckptmgr.diff.tensors import Key, WholeTensor
from ckptmgr.format.manifest import EntryRecord

__all__ = ["EntryPairs", "TensorPair", "pair_entries", "pair_tensors"]

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
    def prefixes(self) -> dict[str, str]:
        """What names of the second side begin with → what they are told by, where an entry is called otherwise."""
        return {f"{name}/": f"{told}/" for told, name in self.second.items() if told != name}


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
    for entry in left[0]:
        alike = [[other for other in side if other.handler == entry.handler] for side in left]
        if len(alike[0]) == len(alike[1]) == 1:
            names[entry.name] = alike[1][0].name
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
    common = {name: sum(tensor.entry == name and tensor.name in known for tensor in run.tensors) for name in modules}
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
    tells_ties = a.manifest is not None and b.manifest is not None
    found: dict[tuple[int, int, int | None], TensorPair] = {}
    ties: list[ValueChange] = []
    for key in sides[0] | sides[1]:
        entry, name, rank = key
        first, second = (_like(key, side, ranks) for side, ranks in zip(sides, own, strict=True))
        if rank is None and (
            (first is None and (entry, name) in own[0]) or (second is None and (entry, name) in own[1])
        ):
            # It is compared rank by rank.
            continue
        is_alias = [one is not None and one.name != name for one in (first, second)]
        if first is None or second is None:
            lacking = sides[0] if first is None else sides[1]
            present = first or second
            if any(is_alias) and present is not None and (entry, present.name, rank) in lacking:
                if tells_ties:
                    ties.append(_tie(key, first, second))
                continue
        elif tells_ties and is_alias[0] != is_alias[1]:
            ties.append(_tie(key, first, second))
        identity = (id(first), id(second), rank)
        known = found.get(identity)
        found[identity] = (
            TensorPair(key, first, second) if known is None else replace(known, aliases=(*known.aliases, name))
        )
    return list(found.values()), ties


def _like(key: Key, side: dict[Key, WholeTensor], own: set[tuple[str, str]]) -> WholeTensor | None:
    """Return a side's tensor of a key; for a rank, what all ranks have together if none has it for itself."""
    entry, name, rank = key
    if key not in side and rank is not None and (entry, name) not in own:
        return side.get((entry, name, None))
    return side.get(key)


def _tie(key: Key, a: WholeTensor | None, b: WholeTensor | None) -> ValueChange:
    entry, name, rank = key
    words = [
        ABSENT if one is None else f"tied to {one.name}" if one.name != name else "a tensor of its own"
        for one in (a, b)
    ]
    return ValueChange(f"{entry}/{name}", words[0], words[1], rank)


def _told_second(side: OpenSide, entries: EntryPairs) -> Iterable[WholeTensor]:
    return _told(side.tensors, entries.second, entries.prefixes, entries)


def _told(
    tensors: Sequence[WholeTensor], names: dict[str, str], prefixes: dict[str, str], entries: EntryPairs
) -> Iterable[WholeTensor]:
    """Call the tensors of one side as they are told by; those of entries without a like are left out."""
    told = {name: shown for shown, name in names.items()}
    for tensor in tensors:
        entry = told.get(tensor.entry)
        if entry is None:
            continue
        if entry in entries.optimizers and prefixes:
            aliases = tuple(_with_prefix(alias, prefixes) for alias in tensor.aliases)
            yield replace(tensor, entry=entry, name=_with_prefix(tensor.name, prefixes), aliases=aliases)
        else:
            yield tensor if entry == tensor.entry else replace(tensor, entry=entry)


def _with_prefix(name: str, prefixes: dict[str, str]) -> str:
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), name)


def _by_key(tensors: Iterable[WholeTensor]) -> dict[Key, WholeTensor]:
    listed = list(tensors)
    named = {tensor.key: tensor for tensor in listed}
    for tensor in listed:
        for alias in tensor.aliases:
            named.setdefault((tensor.entry, alias, tensor.rank), tensor)
    return named
