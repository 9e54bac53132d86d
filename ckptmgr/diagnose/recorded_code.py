"""The classes that a model was made of when it was saved, and what is here of them now. Nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptmgr.diagnose.find_code import source_texts, where_is
from ckptmgr.format.manifest import Manifest
from ckptmgr.state.sources import text_digest

__all__ = ["CodeFacts", "compare_code", "recorded_classes"]

_MAX_CLASSES = 200
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class CodeFacts:
    """Classes as ``code.CLASS``, for `ckptmgr.diagnose.drift.grade`.

    Attributes:
        then: Digest of the source when the checkpoint was written.
        now: Digest of the source that is here; a class that is not found is not in it.
        reasons: Of those, where they were looked for.
    """

    then: dict[str, str] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def recorded_classes(manifest: Manifest) -> dict[str, str | None]:
    """Return the classes that a checkpoint's entries were made of: full name → digest of the source, None if unread."""
    return {cls: digest for entry in manifest.entries for cls, digest in entry.classes.items()}


def compare_code(saved: Mapping[str, str | None], live: Mapping[str, str | None] | None = None) -> CodeFacts:
    """Compare recorded classes with those of live modules, or else with what their source files have.

    A class without a readable source, or of the inside of a function, cannot be compared and is left out.

    Args:
        saved: As `recorded_classes` returns them.
        live: The same of the live modules, as far as there are any.
    """
    facts = CodeFacts()
    for cls, digest in list(saved.items())[:_MAX_CLASSES]:
        if digest is None or "<locals>" in cls or cls.startswith("__main__."):
            continue
        now = (live or {}).get(cls)
        if now is None:
            digests = [text_digest(text) for text in source_texts(cls)]
            now = digest if digest in digests else next(iter(digests), None)
        facts.then[f"code.{cls}"] = digest[:_SHOWN]
        if now is not None:
            facts.now[f"code.{cls}"] = now[:_SHOWN]
            continue
        module, _, name = cls.rpartition(".")
        facts.reasons[f"code.{cls}"] = where_is(module, name) or "it is not found here"
    return facts
