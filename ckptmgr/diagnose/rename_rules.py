"""Pairs of names put into rules: one with wildcards for a whole subtree, where it says neither more nor less."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptmgr.diagnose.artifact import Certainty
from ckptmgr.diagnose.difference import Proposal, SelectionPart
from ckptmgr.diagnose.draft import Draft
from ckptmgr.diagnose.torch_code import rename_line

__all__ = ["Found", "propose_rules"]

_MAX_RULES = 100
_MAX_NARROW = 24


@dataclass(frozen=True, slots=True)
class Found:
    """Tensors of a module, in all layers, that have other names now.

    Attributes:
        names: Old names and new ones.
        reason: Why it is thought so.
        is_same: The numbers of its layers are the same in both.
        is_only: Nothing else has its shapes, on either side.
        nstars: How many numbers of a name, from the first on, are those of layers.
    """

    names: Mapping[str, str]
    reason: str
    is_same: bool
    is_only: bool
    nstars: int


@dataclass(slots=True)
class _Rule:
    """What a rule is made of.

    Attributes:
        old, new: Parts of names that differ, with ``*`` for numbers.
        has_rest: Something equal follows them.
        names: Old names and new ones.
        reasons: Why.
        modules: How many modules it renames.
        is_only: Nothing else has the shapes of any of them.
        nstars: As in `Found`, where it can be narrowed to one for each module.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    has_rest: bool
    names: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)
    modules: set[int] = field(default_factory=set)
    is_only: bool = True
    nstars: int | None = None


def propose_rules(draft: Draft, found: Sequence[Found]) -> None:
    """Propose rules for pairs of names, as few as say the same, and apply them to the draft.

    Args:
        draft: What there is before.
        found: Pairs of which no two have a name in common.
    """
    rules: dict[object, _Rule] = {}
    odd: list[_Rule] = []
    for number, each in enumerate(found):
        if not each.is_same:
            odd.append(_Rule((), (), False, dict(each.names), {each.reason: None}))
            continue
        for old, new in each.names.items():
            rule = _differing(old, new, each.nstars)
            kept = rules.setdefault((rule.old, rule.new, rule.has_rest), rule)
            kept.names[old] = new
            kept.reasons[each.reason] = None
            kept.modules.add(number)
            kept.is_only = kept.is_only and each.is_only
    pending = sorted((*rules.values(), *odd), key=lambda rule: -len(rule.names))
    rest = pending[_MAX_RULES:]
    # The narrow ones come first: a wide one may then be for all that is left.
    pending = sorted(pending[:_MAX_RULES], key=lambda rule: -len(rule.old))
    if rest:
        # What no rule makes shorter is told as one list.
        pending.append(_together(rest))
    while pending:
        possible = next((it for it in pending if _is_possible(draft, it)), None)
        # Names that go round in a circle are changed all at once.
        rule = possible or _together(pending)
        pending = [it for it in pending if it is not possible] if possible else []
        if rule.nstars is not None and len(rename_line(rule.names, draft.current, _steps(rule))) > 1:
            narrow = _by_module(rule, rule.nstars)
            if len(narrow) <= _MAX_NARROW:
                pending = [*narrow, *pending]
                continue
        _propose(draft, rule)


def _by_module(rule: _Rule, nstars: int) -> list[_Rule]:
    """Return a rule for each module instead of one for all of them, which would be for other tensors too."""
    rules: dict[object, _Rule] = {}
    for old, new in rule.names.items():
        mine, others = _starred(old, nstars), _starred(new, nstars)
        is_leaf_same = mine[-1] == others[-1] and len(mine) > 1 < len(others)
        core, other = (mine[:-1], others[:-1]) if is_leaf_same else (mine, others)
        narrow = _Rule(core, other, is_leaf_same, reasons=rule.reasons, modules=rule.modules, is_only=rule.is_only)
        rules.setdefault((core, other), narrow).names[old] = new
    return list(rules.values())


def _together(rules: Sequence[_Rule]) -> _Rule:
    whole = _Rule((), (), False)
    for rule in rules:
        whole.names.update(rule.names)
        whole.reasons.update(rule.reasons)
    return whole


def _differing(old: str, new: str, nstars: int) -> _Rule:
    mine, others = _starred(old, nstars), _starred(new, nstars)
    shared = 0
    while shared < min(len(mine), len(others)) and mine[-1 - shared] == others[-1 - shared]:
        shared += 1
    core, other = mine[: len(mine) - shared], others[: len(others) - shared]
    # A star is one number on both sides: with different numbers of them nothing tells which is which.
    while shared and core.count("*") != other.count("*"):
        shared -= 1
        core, other = mine[: len(mine) - shared], others[: len(others) - shared]
    return _Rule(core, other, shared > 0, nstars=nstars)


def _starred(name: str, nstars: int) -> tuple[str, ...]:
    parts: list[str] = []
    for part in name.split("."):
        is_star = part.isascii() and part.isdecimal() and nstars > 0
        nstars -= is_star
        parts.append("*" if is_star else part)
    return tuple(parts)


def _is_possible(draft: Draft, rule: _Rule) -> bool:
    return all(new not in draft.current or new in rule.names for new in rule.names.values())


def _propose(draft: Draft, rule: _Rule) -> None:
    steps = _steps(rule)
    code = rename_line(rule.names, draft.current, steps)
    is_rule = len(code) == 1
    summary = f"{_shown(rule.old, rule.has_rest)} -> {_shown(rule.new, rule.has_rest)}" if is_rule else _listed(rule)
    count = f"{len(rule.names)} tensors" if len(rule.names) > 1 else "1 tensor"
    draft.propose(
        Proposal(
            kind="rename",
            certainty=_certainty(draft, rule, is_rule=is_rule),
            summary=f"rename {summary} ({count})",
            reason="; ".join(rule.reasons),
            covers=draft.pairs(rule.names),
            code=code,
            selection=SelectionPart(rename=_selection(draft, rule)),
        )
    )
    draft.rename(rule.names)


def _certainty(draft: Draft, rule: _Rule, *, is_rule: bool) -> Certainty:
    """Return how sure a rule is: certain if all of a subtree is called otherwise, and nothing is left over."""
    if len(rule.modules) < 2 and not rule.is_only:
        # Names alone have decided between several.
        return "likely"
    if not is_rule or not rule.has_rest or len(rule.names) < 2 or not rule.old or not rule.new:
        return "likely"
    if any(draft.current[old].shape != draft.live[new].shape for old, new in rule.names.items()):
        return "likely"
    shapes = {draft.current[old].shape for old in rule.names}
    below = re.compile(_pattern(rule.new, has_rest=True))
    news = set(rule.names.values())
    is_all = all(name in news for name in draft.live if below.match(name))
    return "certain" if is_all and len(shapes) > 1 and any(len(shape) > 1 for shape in shapes) else "likely"


def _steps(rule: _Rule) -> tuple[tuple[str, str], ...]:
    if not rule.old or rule.old.count("*") != rule.new.count("*"):
        return ()
    stars = 0
    parts = []
    for part in rule.new:
        stars += part == "*"
        parts.append(rf"\g<{stars}>" if part == "*" else part.replace("\\", r"\\"))
    replacement = ".".join(parts) + ("." if rule.has_rest and rule.new else "")
    return ((_pattern(rule.old, has_rest=rule.has_rest), replacement),)


def _pattern(parts: tuple[str, ...], *, has_rest: bool) -> str:
    text = r"\.".join(r"(\d+)" if part == "*" else re.escape(part) for part in parts)
    return f"^{text}" + (r"\." if has_rest else r"\Z")


def _shown(parts: tuple[str, ...], has_rest: bool) -> str:
    return ".".join((*parts, "*") if has_rest else parts)


def _listed(rule: _Rule) -> str:
    old, new = next(iter(rule.names.items()))
    return f"{old} -> {new}" + (", …" if len(rule.names) > 1 else "")


def _selection(draft: Draft, rule: _Rule) -> dict[str, str]:
    """Return rules of a `Selection`: a star at the end for each module of which all tensors are renamed."""
    rules: dict[str, str] = {}
    for old, new in rule.names.items():
        (before, dot, leaf), (now, _, other) = old.rpartition("."), new.rpartition(".")
        begin, end = f"{before}{dot}", now + ("." if now else "")
        if not before or leaf != other:
            return dict(rule.names)
        if rules.setdefault(f"{begin}*", f"{end}*") != f"{end}*":
            return dict(rule.names)
    starts = tuple(old[:-1] for old in rules)
    if any(name not in rule.names for name in draft.current if name.startswith(starts)):
        return dict(rule.names)
    if "*" not in rule.old and rule.has_rest and rule.old:
        short, now = _shown(rule.old, True), _shown(rule.new, True)
        if all(name in rule.names for name in draft.current if name.startswith(short[:-1])):
            return {short: now}
    return rules
