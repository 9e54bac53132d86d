"""A limit in bytes over other policies: what matters most is kept, as far as it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptmgr.errors import UsageError
from ckptmgr.policy.quantities import parse_nbytes
from ckptmgr.policy.retention import CheckpointFacts, RetentionPolicy, Union, check_policies, oldest_first

__all__ = ["Budget"]


@dataclass(frozen=True, slots=True, init=False)
class Budget:
    """Keep what other policies keep, as long as it fits: ``Budget("500GB", KeepBest(3, "acc", "max"), KeepAll())``.

    The newest checkpoint, and what is tagged, stays whatever it takes, and counts. Then the policies have their turn,
    the first one first, each with what matters most to it first: the best, or the newest. What does not fit is left
    out, and something smaller behind it may still come in.

    A checkpoint counts with all files that its manifest names, also where another checkpoint names them too.

    Args:
        limit: A number of bytes, or text such as ``"500GB"`` or ``"1.5TiB"``.
        *policies: In the order of their importance; at least one.
    """

    nbytes: int
    policies: tuple[RetentionPolicy, ...]
    _words: str = field(repr=False, compare=False)

    def __init__(self, limit: int | str, *policies: RetentionPolicy) -> None:
        if not policies:
            raise UsageError(
                f"Budget({limit!r}) was given no policy",
                why="it limits what other policies keep",
                next=f"Budget({limit!r}, KeepAll()) keeps the newest ones that fit",
            )
        object.__setattr__(self, "nbytes", parse_nbytes(limit, of="Budget(limit)"))
        object.__setattr__(self, "policies", check_policies(policies, of="Budget"))
        object.__setattr__(self, "_words", limit.strip() if isinstance(limit, str) else f"{self.nbytes} bytes")

    def reasons_to_keep(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, tuple[str, ...]]:
        return self._decide(checkpoints)[0]

    def reasons_to_drop(self, checkpoints: Sequence[CheckpointFacts]) -> dict[str, str]:
        return self._decide(checkpoints)[1]

    def _decide(self, checkpoints: Sequence[CheckpointFacts]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        ordered = oldest_first(checkpoints)
        by_id = {facts.id: facts for facts in ordered}
        union = Union(*self.policies)
        wanted = union.reasons_to_keep(ordered)
        kept: dict[str, tuple[str, ...]] = {}
        for facts in ordered[::-1]:
            if facts.tags:
                kept[facts.id] = tuple(f"tagged {tag}" for tag in sorted(facts.tags))
        if ordered:
            kept.setdefault(ordered[-1].id, ("newest",))
        spent = sum(by_id[id].nbytes for id in kept)
        over = dict(union.reasons_to_drop(ordered))
        for id, reasons in wanted.items():
            if not reasons or id not in by_id:
                continue
            if id in kept:
                kept[id] = tuple(dict.fromkeys((*kept[id], *reasons)))
            elif spent + by_id[id].nbytes <= self.nbytes:
                kept[id] = reasons
                spent += by_id[id].nbytes
            else:
                over[id] = f"over the budget of {self._words} (would be: {', '.join(reasons)})"
        return kept, over
