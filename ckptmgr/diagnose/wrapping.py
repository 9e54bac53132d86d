"""Proposals for names that differ by what stands in front: wrappers' prefixes, or another module around the model."""

from __future__ import annotations

import re

from ckptmgr.diagnose.difference import Candidate, Proposal, SelectionPart
from ckptmgr.diagnose.draft import MAX_NAME, Draft
from ckptmgr.diagnose.torch_code import rename_line
from ckptmgr.state.prefixes import NameRule, prefix_votes

__all__ = ["propose_prefixes"]

WRAPPER_WORDS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
_MAX_PARTS = 64
_MAX_CANDIDATES = 8


def propose_prefixes(draft: Draft) -> None:
    """Propose the one rule that makes most names fit, where it makes more of them fit than fit already."""
    saved = {name: it.shape for name, it in draft.current.items() if _is_short(name)}
    live = {name: it.shape for name, it in draft.live.items() if _is_short(name)}
    if saved.keys() == live.keys() or not saved or not live:
        return
    votes = [(count, rule) for rule, count in prefix_votes(saved, live, wrapper_words=WRAPPER_WORDS)]
    most = max((count for count, _ in votes), default=0)
    plain = sum(1 for name, shape in saved.items() if live.get(name) == shape)
    if most <= plain:
        return
    best: list[tuple[NameRule, dict[str, str]]] = []
    for rule in (rule for count, rule in votes if count == most):
        pairs = rule.pairs(saved, live)
        if all(pairs != other for _, other in best):
            best.append((rule, pairs))
        if len(best) == _MAX_CANDIDATES:
            break
    if len(best) > 1:
        _say_which(draft, best, most)
        return
    rule, pairs = best[0]
    names = _every(draft, rule, pairs)
    if all(old == new for old, new in names.items()):
        return
    changed = {old: new for old, new in names.items() if old != new}
    is_complete = set(names.values()) >= live.keys() or len(pairs) == len(saved)
    how = f"{len(pairs)} of {len(live)} names of the model are then there, with equal shapes"
    draft.propose(
        Proposal(
            kind="prefix",
            certainty="certain" if is_complete else "likely",
            summary=_summary(rule),
            reason=f"{how}; as it is, {plain} are" + ("; no other prefix fits as many" if len(votes) > 1 else ""),
            covers=draft.pairs({old: new if new in draft.live else None for old, new in changed.items()}),
            code=rename_line(changed, draft.current, _steps(rule)),
            selection=SelectionPart(rename=_selection(rule, changed, draft)),
        )
    )
    draft.rename(changed)


def _every(draft: Draft, rule: NameRule, pairs: dict[str, str]) -> dict[str, str]:
    """Extend the pairs of equal shape to all names that the rule is for, as far as nothing collides."""
    names = dict(pairs)
    taken = set(names.values())
    keys = {rule.key_of_live(name): name for name in draft.live}
    rest = {name for name in draft.current if name not in names}
    for name in draft.current:
        if name in names or not _is_short(name):
            continue
        key = rule.key_of_saved(name)
        if name in draft.live and key not in keys:
            continue
        # What the model has not is renamed too: it may be a layer that has another name, below the same prefix.
        new = keys.get(key, key) if key is not None and key else name
        if key is not None and new not in taken and (new == name or new not in rest):
            names[name] = new
            taken.add(new)
    for name in rest - names.keys():
        if name in taken:
            # Some other tensor gets this name: the two cannot be told apart by one rule.
            return pairs
    return names


def _say_which(draft: Draft, best: list[tuple[NameRule, dict[str, str]]], most: int) -> None:
    covers = {old: new for _, pairs in reversed(best) for old, new in pairs.items()}
    draft.propose(
        Proposal(
            kind="prefix",
            certainty="unknown",
            summary="a prefix, but which one is not to be seen",
            reason=f"{len(best)} prefixes make {most} names fit with equal shapes, each for other tensors",
            covers=draft.pairs(covers),
            candidates=tuple(
                Candidate(_summary(rule), rename_line(pairs, draft.current, ()), SelectionPart(rename=pairs))
                for rule, pairs in best
            ),
        )
    )


def _summary(rule: NameRule) -> str:
    parts = [f"leave out {rule.removed!r} in front"] if rule.removed else []
    if rule.added:
        parts.append(f"put {rule.added!r} in front")
    if rule.words:
        parts.append(f"leave out {' and '.join(repr(f'{word}.') for word in rule.words)} wherever it stands")
    return " and ".join(parts) or "take the names as they are"


def _steps(rule: NameRule) -> tuple[tuple[str, str], ...]:
    steps = [(rf"(?<![^.])(?:{'|'.join(map(re.escape, rule.words))})\.", "")] if rule.words else []
    if rule.removed or rule.added:
        steps.append((rf"^{re.escape(rule.removed)}", rule.added.replace("\\", r"\\")))
    return tuple(steps)


def _selection(rule: NameRule, changed: dict[str, str], draft: Draft) -> dict[str, str]:
    if rule.words or any(old != rule.removed + new.removeprefix(rule.added) for old, new in changed.items()):
        return changed
    short = f"{rule.removed}*"
    is_same = all(name in changed for name in draft.current if name.startswith(rule.removed))
    return {short: f"{rule.added}*"} if is_same else changed


def _is_short(name: str) -> bool:
    return len(name) <= MAX_NAME and name.count(".") < _MAX_PARTS
