"""Proposals for numbered layers that stand in another order or begin at another number: names that still exist."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Candidate, Proposal, SelectionPart
from ckptmgr.diagnose.draft import Draft, is_proposable
from ckptmgr.diagnose.torch_code import rename_line

__all__ = ["propose_reordered"]

_MAX_LAYERS = 2_000

Layer: TypeAlias = dict[str, tuple[int, ...]]
"""Names below a layer → shapes."""


def propose_reordered(draft: Draft) -> None:
    """Propose another numbering where the shapes of the numbered layers are those of others, each of exactly one."""
    suspect = {it.name for it, _ in draft.differing()}
    suspect |= {it.name for it in (*draft.missing(), *draft.unexpected())}
    saved, live = _stacks(draft.current), _stacks(draft.live)
    for stack, layers in saved.items():
        others = live.get(stack)
        if others is None or layers == others or len(layers) > _MAX_LAYERS:
            continue
        if any(name in suspect for n, layer in layers.items() for name in _names(stack, n, layer)):
            _look_at(draft, stack, layers, others)


def _look_at(draft: Draft, stack: str, layers: dict[str, Layer], others: dict[str, Layer]) -> None:
    moved = {n: layer for n, layer in layers.items() if layer and others.get(n) != layer}
    targets = {n: layer for n, layer in others.items() if layer and layers.get(n) != layer}
    if not moved or not targets:
        return
    kinds = _by_kind(layers), _by_kind(others)
    if (
        all(len(found) == 1 for kind, found in kinds[1].items())
        and kinds[0].keys() == kinds[1].keys()
        and all(len(found) == 1 for found in kinds[0].values())
    ):
        pairs = {found[0]: kinds[1][kind][0] for kind, found in kinds[0].items()}
        _propose(draft, stack, layers, pairs, "each has the shapes of exactly one layer there")
    elif len(layers) == len(others) and len(kinds[0]) == 1 and kinds[0].keys() == kinds[1].keys():
        # The layers are all alike, and only their numbers differ.
        first, second = sorted(layers, key=int), sorted(others, key=int)
        offset = int(second[0]) - int(first[0])
        if all(int(b) - int(a) == offset for a, b in zip(first, second, strict=True)):
            _say_both(draft, stack, layers, others, offset)


def _propose(draft: Draft, stack: str, layers: dict[str, Layer], pairs: dict[str, str], reason: str) -> None:
    names = {
        old: _name(stack, new, rest)
        for number, new in pairs.items()
        if number != new
        for rest, old in ((rest, _name(stack, number, rest)) for rest in layers[number])
    }
    if not names or any(new in draft.current and new not in names for new in names.values()):
        return
    told = ", ".join(f"{old} -> {new}" for old, new in list(pairs.items())[:4] if old != new)
    draft.propose(
        Proposal(
            kind="rename",
            certainty="likely",
            summary=f"renumber the layers of {stack or 'the model'}: {told}",
            reason=reason,
            covers=draft.pairs(names),
            code=rename_line(names, draft.current, ()),
            selection=SelectionPart(rename=names),
        )
    )
    draft.rename(names)


def _say_both(draft: Draft, stack: str, layers: dict[str, Layer], others: dict[str, Layer], offset: int) -> None:
    gone = sorted(layers.keys() - others.keys(), key=int)
    new = sorted(others.keys() - layers.keys(), key=int)
    if not (layers.keys() & others.keys()):
        return
    shifted = {
        _name(stack, n, rest): _name(stack, str(int(n) + offset), rest) for n, layer in layers.items() for rest in layer
    }
    draft.propose(
        Proposal(
            kind="rename",
            certainty="unknown",
            summary=f"{stack}: the layers {', '.join(gone)} are gone and {', '.join(new)} are new",
            reason="all of them have the same shapes, so that either their numbers were shifted, and those that are "
            "called alike are not the same, or some were taken out and others put in",
            covers=draft.pairs({_name(stack, n, rest): None for n in gone for rest in layers[n]}),
            candidates=(
                Candidate(
                    f"the number of each layer is {offset:+d} now",
                    rename_line(shifted, draft.current, ()),
                    SelectionPart(rename=shifted),
                ),
                Candidate("layers of equal numbers are the same"),
            ),
        )
    )


def _stacks(tensors: dict[str, TensorFacts]) -> dict[str, dict[str, Layer]]:
    """Return the numbered layers below each name: by the first number that stands in a tensor's name."""
    found: dict[str, dict[str, Layer]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        parts = name.split(".") if is_proposable(name) else []
        for index, part in enumerate(parts[:-1]):
            if part.isascii() and part.isdecimal() and len(part) <= 9 and str(int(part)) == part:
                found[".".join(parts[:index])][part][".".join(parts[index + 1 :])] = tensor.shape
                break
    return {stack: {n: dict(layer) for n, layer in layers.items()} for stack, layers in found.items()}


def _by_kind(layers: dict[str, Layer]) -> dict[object, list[str]]:
    kinds: dict[object, list[str]] = defaultdict(list)
    for number, layer in layers.items():
        kinds[tuple(sorted(layer.items()))].append(number)
    return kinds


def _name(stack: str, number: str, rest: str) -> str:
    return f"{stack}.{number}.{rest}" if stack else f"{number}.{rest}"


def _names(stack: str, number: str, layer: Layer) -> list[str]:
    return [_name(stack, number, rest) for rest in layer]
