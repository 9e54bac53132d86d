"""The globals of a pickle as facts to show: judged, and looked for without being imported."""

from __future__ import annotations

from collections.abc import Mapping

from ckptmgr.diagnose.artifact import GlobalUse
from ckptmgr.diagnose.find_code import where_is
from ckptmgr.diagnose.known_globals import old_name, verdict_of
from ckptmgr.diagnose.plain_words import clean

__all__ = ["global_uses"]

_ORDER = {"dangerous": 0, "code": 1, "plain": 2}
_MAX_LOOKED_FOR = 200


def global_uses(found: Mapping[tuple[str, str], str]) -> tuple[GlobalUse, ...]:
    """Return each global with its verdict, the dangerous ones first, and where it was looked for.

    Args:
        found: ``(module, qualified name)`` → a few words, as in `PickleFacts.globals`.
    """
    uses: dict[str, GlobalUse] = {}
    looked_for = 0
    for (module, name), words in found.items():
        verdict = verdict_of(module, name)
        if verdict != "plain" and ("replaced" in words or "could not be examined" in words):
            verdict = "dangerous"
        module, name = old_name(module, name)
        place = None
        if verdict == "code" and looked_for < _MAX_LOOKED_FOR:
            looked_for += 1
            place = where_is(module, name)
        notes = [note for note in (words, place) if note]
        full = clean(f"{module}.{name}", 200)
        uses[full] = GlobalUse(full, verdict, clean("; ".join(notes), 300) if notes else None)
    return tuple(sorted(uses.values(), key=lambda use: _ORDER[use.verdict]))
