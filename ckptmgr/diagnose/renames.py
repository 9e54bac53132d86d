"""Proposals for names that have changed: units of equal shapes, matched by the likeness of names and by context."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Candidate, Proposal, SelectionPart
from ckptmgr.diagnose.draft import Draft, is_proposable
from ckptmgr.diagnose.name_words import likeness, split_name, words_of
from ckptmgr.diagnose.rename_rules import Found, propose_rules
from ckptmgr.diagnose.units import Alignment, Shape, Unit, align, as_it_is, as_units, turned, without_rows

__all__ = ["propose_renames"]

_MAX_TENSORS = 20_000
_MAX_COMPARISONS = 60_000
_MAX_CANDIDATES = 6
_MAX_SWEEPS = 20
_MAX_ROUNDS = 4
_MARGIN = 0.06
_ENOUGH = 0.3
_SAME_PARENT, _SAME_LAYERS, _SAME_NEIGHBOUR, _POSITION = 0.35, 0.2, 0.12, 0.1


_TABLES = {"embedding", "token", "vocab", "head", "classifier", "lm"}
_SHAPES: dict[Callable[[Shape], Shape], str] = {
    as_it_is: "the shapes are equal",
    turned: "one is the other transposed",
    without_rows: "the shapes are equal but for the number of rows",
}


@dataclass(frozen=True, slots=True)
class _Pass:
    """One way of looking at what is left; each is less strict than the one before."""

    shape_of: Callable[[Shape], Shape]
    nstars: int
    by_tensor: bool = False


_ALL = 64
_PASSES = (
    _Pass(as_it_is, _ALL),
    _Pass(turned, _ALL),
    # The second number of a name may be a place in a Sequential, where there was an attribute before.
    _Pass(as_it_is, 1),
    _Pass(turned, 1),
    _Pass(as_it_is, 0),
    _Pass(without_rows, _ALL),
    _Pass(as_it_is, 1, by_tensor=True),
    _Pass(turned, 1, by_tensor=True),
)


def propose_renames(draft: Draft) -> None:
    """Propose other names for what is unexpected, where something that is missing is of the same shapes."""
    if not draft.missing() or not draft.unexpected():
        return
    search = _Search(draft)
    for each in _PASSES:
        search.run(each)
    propose_rules(draft, search.found)
    for proposal in search.unclear():
        draft.propose(proposal)


class _Search:
    """Pairs of units, decided one after the other; those that are decided help with the others."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._budget = _MAX_COMPARISONS
        self._saved = {it.name: it for it in draft.unexpected()[:_MAX_TENSORS]}
        self._live = {it.name: it for it in draft.missing()[:_MAX_TENSORS]}
        orders = list(draft.current), list(draft.live)
        self._positions = tuple({name: i / len(names) for i, name in enumerate(names)} for names in orders)
        self._neighbours = tuple(map(_neighbours, orders))
        self._same: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
        self._parents: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
        self._usual = Counter(it.shape for name, it in draft.live.items() if name not in self._live)
        self._unclear: dict[tuple[str, ...], tuple[str, tuple[tuple[str, ...], ...]]] = {}
        self._set_aside: dict[tuple[str, ...], tuple[str, tuple[tuple[str, ...], ...]]] = {}
        self._modules: dict[str, str] = {}
        self._came_from: dict[str, str] = {}
        self.found: list[Found] = []
        for name in draft.current:
            if name in draft.live and is_proposable(name):
                parts = split_name(name).skeleton
                self._vote(parts, parts)

    def run(self, each: _Pass) -> None:
        """Decide what can be decided in one way of looking at it."""
        for _ in range(_MAX_ROUNDS):
            self._unclear = dict(self._set_aside)
            if not self._round(each):
                break
        self._set_aside = dict(self._unclear)
        # What could be several things is not taken for one of them because something else is looked at.
        for names, (_, candidates) in self._unclear.items():
            for name in names:
                self._saved.pop(name, None)
            for name in (it for candidate in candidates for it in candidate):
                self._live.pop(name, None)

    def _round(self, each: _Pass) -> int:
        saved = list(self._units(self._saved.values(), each, self._positions[0]))
        live = list(self._units(self._live.values(), each, self._positions[1]))
        buckets: dict[object, tuple[list[Unit], list[Unit]]] = defaultdict(lambda: ([], []))
        for side, units in enumerate((saved, live)):
            for unit in units:
                buckets[self._key(unit, each)][side].append(unit)
        decided = 0
        for mine, others in sorted(buckets.values(), key=lambda bucket: len(bucket[0]) * len(bucket[1])):
            if mine and others:
                decided += self._decide(mine, others, each)
        return decided

    def _units(self, tensors: Iterable[TensorFacts], each: _Pass, whole: dict[str, float]) -> Iterator[Unit]:
        units = as_units(list(tensors), whole=whole, nstars=each.nstars)
        if not each.by_tensor:
            yield from units
            return
        for unit in units:
            # The leaf is a part of the name: `gamma` may be called `weight` now.
            single: dict[str, Unit] = {}
            for numbers, leaves in unit.tensors.items():
                for leaf, tensor in leaves.items():
                    own = single.setdefault(leaf, Unit((*unit.skeleton, leaf), {}, unit.position))
                    own.tensors[numbers] = {"": tensor}
            yield from single.values()

    def _key(self, unit: Unit, each: _Pass) -> object:
        signature = unit.signature(each.shape_of)
        if not each.by_tensor:
            return signature
        return (signature, next(iter(next(iter(unit.tensors.values())).values())).dtype.rstrip("0123456789"))

    def _decide(self, mine: list[Unit], others: list[Unit], each: _Pass) -> int:
        scores: dict[tuple[int, int], float] = {}
        alignments: dict[tuple[int, int], Alignment] = {}
        for i, j in self._comparisons(mine, others):
            alignment = align(mine[i], others[j], each.shape_of)
            if alignment is not None:
                alignments[i, j] = alignment
                scores[i, j] = self._score(mine[i], others[j])
        return self._take(mine, others, scores, alignments, each)

    def _comparisons(self, mine: list[Unit], others: list[Unit]) -> Iterator[tuple[int, int]]:
        if len(mine) * len(others) <= self._budget:
            self._budget -= len(mine) * len(others)
            yield from ((i, j) for i in range(len(mine)) for j in range(len(others)))
            return
        # Too many to compare each with each: those that end alike are compared.
        by_end: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for j, unit in enumerate(others):
            by_end[unit.skeleton[-2:]].append(j)
        for i, unit in enumerate(mine):
            for j in by_end.get(unit.skeleton[-2:], ()):
                if self._budget <= 0:
                    return
                self._budget -= 1
                yield i, j

    def _score(self, mine: Unit, other: Unit) -> float:
        score = likeness(mine.skeleton, other.skeleton)
        if self._parents[mine.skeleton[:-1], other.skeleton[:-1]]:
            score += _SAME_PARENT
        layers = _layers(mine.skeleton), _layers(other.skeleton)
        if layers[0] and self._parents[layers[0], layers[1]]:
            score += _SAME_LAYERS
        if self._draft.is_in_order:
            for side in (0, 1):
                near = [
                    both[side].get(unit.skeleton) for both, unit in zip(self._neighbours, (mine, other), strict=True)
                ]
                if (near[0], near[1]) in self._same:
                    score += _SAME_NEIGHBOUR
            score += _POSITION * (1 - abs(mine.position - other.position))
        return score

    def _take(
        self,
        mine: list[Unit],
        others: list[Unit],
        scores: dict[tuple[int, int], float],
        alignments: dict[tuple[int, int], Alignment],
        each: _Pass,
    ) -> int:
        """Take the pairs of which each is clearly the best for both, as long as there are any."""
        ndecided = 0
        is_alone = len(mine) == len(others) == 1
        order = sorted(scores, key=lambda pair: -scores[pair])
        free = {*range(len(mine))}, {*range(len(others))}
        for _ in range(_MAX_SWEEPS):
            order = [pair for pair in order if pair[0] in free[0] and pair[1] in free[1]]
            best: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
            for pair in order:
                for side in (0, 1):
                    best[side].setdefault(pair[side], []).append(scores[pair])
            clear = [pair for pair in order if _is_clear(pair, scores[pair], best)]
            before = ndecided
            for i, j in clear:
                reason = self._reason(mine[i], others[j], is_alone=is_alone, score=scores[i, j], each=each)
                if reason is None:
                    continue
                self._note(mine[i], others[j], alignments[i, j], reason, each, is_only=is_alone)
                free[0].discard(i)
                free[1].discard(j)
                ndecided += 1
            if ndecided == before:
                break
        near: dict[int, list[int]] = defaultdict(list)
        for i, j in order:
            if i in free[0] and j in free[1] and len(near[i]) < _MAX_CANDIDATES:
                near[i].append(j)
        for i in sorted(near):
            self._unclear[_names(mine[i])] = _SHAPES[each.shape_of], tuple(_names(others[j]) for j in near[i])
        return ndecided

    def _reason(self, unit: Unit, other: Unit, *, is_alone: bool, score: float, each: _Pass) -> str | None:
        """Return why two units are the same; None if that is too little to go by."""
        shape = _SHAPES[each.shape_of]
        if each.shape_of is without_rows:
            # Only where it can be a table that has grown.
            tables = [{word for part in it.skeleton for word in words_of(part)} & _TABLES for it in (unit, other)]
            return f"{shape}, and the names are near" if all(tables) and score >= _ENOUGH else None
        if each.by_tensor and not self._is_together(unit, other):
            return None
        if not is_alone:
            # Places alone would be a guess: query, key and value may be declared in any order.
            near = f"{shape}, and of those that have them the names, and what lies beside them, are clearly the nearest"
            return near if likeness(unit.skeleton, other.skeleton) >= _ENOUGH else None
        shapes = {it.shape for leaves in unit.tensors.values() for it in leaves.values()}
        is_usual = any(self._usual[it] for it in shapes) or all(len(it) < 2 for it in shapes)
        if score < _ENOUGH + _POSITION and (is_usual or each.by_tensor):
            return None
        return f"{shape}, and nothing else that is missing or left over has them"

    def _is_together(self, unit: Unit, other: Unit) -> bool:
        """Say whether a tensor would not be torn from its module: the rest of that goes to the same place, or can."""
        mine, their = (next(iter(next(iter(it.tensors.values())).values())) for it in (unit, other))
        module, target = mine.name.rpartition(".")[0], their.name.rpartition(".")[0]
        if self._modules.get(module, target) != target or self._came_from.get(target, module) != module:
            return False
        # A weight that would fit leaves no bias behind that would not.
        for leaf in ("weight", "bias"):
            one, there = self._saved.get(f"{module}.{leaf}"), self._live.get(f"{target}.{leaf}")
            if one is not None and there is not None and turned(one.shape) != turned(there.shape):
                return False
        return True

    def _note(self, unit: Unit, other: Unit, alignment: Alignment, reason: str, each: _Pass, *, is_only: bool) -> None:
        names = {}
        for mine, others in alignment.layers:
            for leaf, tensor in unit.tensors[mine].items():
                names[tensor.name] = other.tensors[others][leaf].name
        if not alignment.is_same:
            reason += "; the layers are numbered otherwise, and taken in their order"
        elif not alignment.is_whole:
            reason += "; not all layers are in both"
        self.found.append(Found(names, reason, alignment.is_same, is_only, each.nstars))
        for old, new in names.items():
            del self._saved[old], self._live[new]
            self._modules[old.rpartition(".")[0]] = new.rpartition(".")[0]
            self._came_from[new.rpartition(".")[0]] = old.rpartition(".")[0]
        self._vote(unit.skeleton, other.skeleton)

    def _vote(self, mine: tuple[str, ...], others: tuple[str, ...]) -> None:
        self._same.add((mine, others))
        for depth in range(1, min(len(mine), len(others))):
            if mine[:-depth].count("*") == others[:-depth].count("*"):
                self._parents[mine[:-depth], others[:-depth]] += 1
        if _layers(mine) and mine.count("*") == others.count("*"):
            self._parents[_layers(mine), _layers(others)] += 1

    def unclear(self) -> Iterator[Proposal]:
        """Yield what could have other names, and could be several things."""
        taken = {new for found in self.found for new in found.names.values()}
        for names, (shapes, candidates) in self._set_aside.items():
            near = [it for it in candidates if taken.isdisjoint(it)]
            if not near:
                continue
            yield Proposal(
                kind="rename",
                certainty="unknown",
                summary=f"{_example(names)}: maybe another name",
                reason=f"{shapes} with something that is missing, but neither the names nor their places tell that it "
                "is the same",
                covers=self._draft.pairs(dict.fromkeys(names)),
                candidates=tuple(self._candidate(names, it) for it in near),
            )

    def _candidate(self, names: tuple[str, ...], others: tuple[str, ...]) -> Candidate:
        pairs = dict(zip(names, others, strict=False)) if len(names) == len(others) else {}
        if not pairs or any(split_name(old).leaf != split_name(new).leaf for old, new in pairs.items()):
            return Candidate(_example(others))
        lines = tuple(f"state[{new!r}] = state.pop({old!r})" for old, new in pairs.items())
        return Candidate(_example(others), lines, SelectionPart(rename=pairs))


def _is_clear(pair: tuple[int, int], score: float, best: tuple[dict[int, list[float]], dict[int, list[float]]]) -> bool:
    """Say whether a pair is the best for both of its sides, by a margin."""
    both = [best[side][pair[side]] for side in (0, 1)]
    return all(score == scores[0] and (len(scores) == 1 or score - scores[1] >= _MARGIN) for scores in both)


def _neighbours(names: Sequence[str]) -> tuple[dict[tuple[str, ...], tuple[str, ...]], ...]:
    """Return what comes before each unit and what comes after it, where it occurs first."""
    order = list(dict.fromkeys(split_name(name).skeleton for name in names if is_proposable(name)))
    return {b: a for a, b in pairwise(order)}, dict(pairwise(order))


def _layers(skeleton: tuple[str, ...]) -> tuple[str, ...]:
    """Return a name up to its last number."""
    last = max((i for i, part in enumerate(skeleton) if part == "*"), default=-1)
    return skeleton[: last + 1]


def _names(unit: Unit) -> tuple[str, ...]:
    return tuple(it.name for leaves in unit.tensors.values() for it in leaves.values())


def _example(names: tuple[str, ...]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
