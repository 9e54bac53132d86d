"""Names that differ by prefixes alone: whether one rule turns a checkpoint's names into those of a live module.

A wrapper that was recognised leaves no prefix behind. This is about what is left: a model that was an attribute of
another module when it was saved, such as ``model.`` of a LightningModule, and wrappers that nobody could recognise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

__all__ = ["NameRule", "Shapes", "find_rule", "nearest_rule", "prefix_votes", "shapes_of"]

Shapes: TypeAlias = Mapping[str, tuple[int, ...] | None]
"""Shapes by name; None for what is no tensor, or may change its shape."""

_WRAPPER_WORDS = ("module", "_orig_mod", "_checkpoint_wrapped_module")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class NameRule:
    """What has to be done to a checkpoint's names.

    Attributes:
        words: Parts of names that wrappers add; they are left out on both sides, wherever they stand.
        removed: What the checkpoint's names begin with, and the live ones do not.
        added: What the live names begin with, and the checkpoint's do not.
    """

    words: tuple[str, ...] = ()
    removed: str = ""
    added: str = ""

    def key_of_saved(self, name: str) -> str | None:
        """Return what a name of the checkpoint has in common with its live one; None if the rule is not for it."""
        name = _without(name, self.words)
        return self.added + name.removeprefix(self.removed) if name.startswith(self.removed) else None

    def key_of_live(self, name: str) -> str:
        """Return what a live name has in common with its one in the checkpoint."""
        return _without(name, self.words)

    def pairs(self, saved: Shapes, live: Shapes) -> dict[str, str]:
        """Return the live name of each name of the checkpoint that has one, of the same shape."""
        found = {self.key_of_live(name): name for name in live}
        keys = ((name, self.key_of_saved(name)) for name in saved)
        return {name: found[key] for name, key in keys if key in found and saved[name] == live[found[key]]}

    def __str__(self) -> str:
        parts = [f"without {self.removed!r} in front"] if self.removed else []
        if self.added:
            parts.append(f"with {self.added!r} in front")
        if self.words:
            parts.append(f"leaving {' and '.join(repr(f'{word}.') for word in self.words)} out of account")
        return ", ".join(parts)


def shapes_of(state: Mapping[str, object]) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of a state dict's tensors; extra state may change its shape, and lazy tensors have none."""
    return {name: _shape(name, item) for name, item in state.items()}


def find_rule(saved: Shapes, live: Shapes) -> tuple[NameRule, dict[str, str]] | None:
    """Return the rule that matches every name with one of equal shape, and the live names; None if there is not one.

    Nothing is guessed: with a name left over on either side, or with two rules that match differently, there is none.
    """
    if saved.keys() == live.keys():
        return None
    complete = _complete(saved, live)
    return complete[0] if len(complete) == 1 else None


def nearest_rule(saved: Shapes, live: Shapes) -> str | None:
    """Return a sentence about the rule that would nearly match, or about the several that do; None if none comes near.

    Near is what fits at least half of the live names, and more of them than their plain names do.
    """
    if len(complete := _complete(saved, live)) > 1:
        ways = "; or ".join(str(rule) for rule, _ in complete)
        return f"the checkpoint's names would fit in {len(complete)} ways, and nothing tells which one is meant: {ways}"
    votes = [(count, rule) for rule, count in prefix_votes(saved, live)]
    most = max((count for count, _ in votes), default=0)
    plain = sum(1 for name in saved if name in live and saved[name] == live[name])
    if most <= plain or 2 * most < len(live) or len(complete) == 1:
        return None
    best: list[tuple[NameRule, dict[str, str]]] = []
    for rule in (rule for count, rule in votes if count == most):
        pairs = rule.pairs(saved, live)
        if all(pairs != other for _, other in best):
            best.append((rule, pairs))
    if len(best) > 1:
        ways = "; or ".join(str(rule) for rule, _ in best[:_SHOWN])
        return f"{most} of {len(live)} of the checkpoint's names would fit {ways}: nothing tells which ones are meant"
    rule, pairs = best[0]
    reached = set(pairs.values())
    missing = _listed("missing", [name for name in live if name not in reached])
    left = _listed("left over", [name for name in saved if name not in pairs])
    how = f"{most} of {len(live)} would fit{missing}{left}"
    if rule == NameRule(removed=rule.removed):
        return f"the checkpoint's names begin with {rule.removed!r}: without it, {how}"
    if rule == NameRule(added=rule.added):
        return f"the live names begin with {rule.added!r}, the checkpoint's do not: with it, {how}"
    return f"{rule}, {how}"


def _complete(saved: Shapes, live: Shapes) -> list[tuple[NameRule, dict[str, str]]]:
    found: list[tuple[NameRule, dict[str, str]]] = []
    if len(saved) != len(live):
        return found
    for rule, count in prefix_votes(saved, live):
        if count == len(saved):
            pairs = rule.pairs(saved, live)
            if all(pairs != other for _, other in found):
                found.append((rule, pairs))
    return found


def prefix_votes(
    saved: Shapes, live: Shapes, *, wrapper_words: Sequence[str] = _WRAPPER_WORDS
) -> Iterator[tuple[NameRule, int]]:
    """Yield every rule that matches any names, with how many; those that leave the least out come first.

    Args:
        saved: The checkpoint's.
        live: The live module's.
        wrapper_words: Parts of names that wrappers may have added.
    """
    parts = {part for name in (*saved, *live) for part in name.split(".")[:-1]}
    present = [word for word in wrapper_words if word in parts]
    for size in range(len(present) + 1):
        for words in combinations(present, size):
            short_saved = {_without(name, words): shape for name, shape in saved.items()}
            short_live = {_without(name, words): shape for name, shape in live.items()}
            if len(short_saved) < len(saved) or len(short_live) < len(live):
                continue
            removed, added = _prefixes(short_saved, short_live), _prefixes(short_live, short_saved)
            for prefix, count in removed.items():
                yield NameRule(words, removed=prefix), count
            for prefix, count in added.items():
                if prefix:
                    yield NameRule(words, added=prefix), count


def _prefixes(longer: Shapes, shorter: Shapes) -> Counter[str]:
    """Count for how many names each prefix makes the difference."""
    counts: Counter[str] = Counter()
    for name, shape in longer.items():
        start = 0
        while True:
            tail = name[start:]
            if tail in shorter and shorter[tail] == shape:
                counts[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    return counts


def _without(name: str, words: tuple[str, ...]) -> str:
    if not words:
        return name
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in words), last])


def _shape(name: str, item: object) -> tuple[int, ...] | None:
    # Here, so that names can be compared without torch.
    import torch

    from ckptmgr.state.sharding import SavedPart

    if not isinstance(item, (torch.Tensor, SavedPart)) or name.rpartition(".")[2] == "_extra_state":
        return None
    return None if isinstance(item, torch.Tensor) and torch.nn.parameter.is_lazy(item) else tuple(item.shape)


def _listed(label: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; {label}: {', '.join(map(repr, names[:_SHOWN]))}{more}"
