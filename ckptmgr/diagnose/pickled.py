"""From a pickle that was followed to what is told about the file that holds it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, GlobalUse
from ckptmgr.diagnose.global_uses import global_uses
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.known_globals import EXAMINED
from ckptmgr.diagnose.pickle_facts import PickleFacts
from ckptmgr.diagnose.pickle_tree import Recognised, recognise, tensor_facts
from ckptmgr.diagnose.pickle_values import Storage
from ckptmgr.diagnose.plain_words import clean, listed

__all__ = ["pickled_artifact", "storages_of"]

_CONTAINERS = {
    "torch-zip": "torch.save",
    "torch-legacy": "torch.save, in its format of before 1.6",
    "torch-tar": "torch.save, in its format of before 0.2",
    "pickle": "pickle",
    "joblib": "joblib",
}

# Of these the tensors can be read from the bytes of the file.
_READABLE = ("torch-zip", "torch-legacy", "pickle")
_READERS = {"lightning": ("lightning", "pytorch-lightning"), "scikit-learn": ("scikit-learn",)}
_DAMAGE = ("truncated", "damaged", "cut off", "are missing", "declared to need", "lies outside")


def storages_of(found: Recognised) -> dict[str, Storage]:
    """Return the storages of the weights by key, each as long as the longest claim on it."""
    storages: dict[str, Storage] = {}
    for _, value in found.weights:
        storage = getattr(value, "storage", None)
        if storage is not None and storage.numel >= getattr(storages.get(storage.key), "numel", -1):
            storages[storage.key] = storage
    return storages


def pickled_artifact(
    place: str,
    facts: PickleFacts,
    *,
    container: str,
    nbytes: int,
    found: Recognised | None = None,
    versions: Mapping[str, str] | None = None,
    problems: Iterable[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Artifact:
    """Describe a file by its pickle.

    Args:
        place: As it was named.
        facts: Its pickle.
        container: What the pickle lies in: ``torch-zip``, ``torch-legacy``, ``torch-tar``, ``pickle``, ``joblib``.
        nbytes: Size of the file.
        found: What the object is, where the caller has looked already.
        versions, problems, details: What the file tells besides.
    """
    found = found or recognise(facts.root)
    uses = global_uses(facts.globals)
    kind = found.kind
    if kind == "pickle" and container != "pickle":
        kind = "joblib" if container == "joblib" else "torch-file"
    told = [*problems, *(f"its pickle: {problem}" for problem in facts.problems), *found.problems]
    told += _about_code(kind, uses)
    if facts.is_ambiguous:
        told.insert(0, "it is made so that it cannot be told what unpickling it would run: do not load it")
    locations = sorted({storage.location for storage in storages_of(found).values()} - {"", "cpu"})
    more: dict[str, Any] = {"container": container, **found.details, **(details or {})}
    if facts.protocol is not None:
        more["pickle_protocol"] = facts.protocol
    if found.weights_key is not None:
        more["weights_key"] = clean(found.weights_key)
    if locations:
        more["devices"] = [clean(location) for location in locations]
    if facts.sources:
        more["sources"] = {clean(of): clean(file) for of, file in list(facts.sources.items())[:100]}
    return Artifact(
        place=place,
        kind=kind,
        title=f"{_title(found, facts)} ({_CONTAINERS[container]})",
        certainty="certain" if facts.is_complete else "likely",
        nbytes=nbytes,
        versions={**found.versions, **(versions or {})},
        tensors=tensor_facts(found.weights) if found.weights or kind == "lightning-checkpoint" else None,
        contents=found.contents,
        globals=uses,
        problems=tuple(told),
        advice=_advice(
            place,
            kind,
            container,
            uses,
            found,
            is_whole=facts.is_complete and not _is_damaged(told),
            is_ambiguous=facts.is_ambiguous,
        ),
        details=more,
    )


def _title(found: Recognised, facts: PickleFacts) -> str:
    is_lost = not facts.is_complete and facts.root is None
    return "a pickle that cannot be followed to its end" if is_lost else found.title


def _about_code(kind: str, uses: Sequence[GlobalUse]) -> list[str]:
    dangerous = [use.name for use in uses if use.verdict == "dangerous"]
    missing = [f"{use.name}: {use.found}" for use in uses if _is_missing(use)]
    told = []
    if dangerous:
        told.append(f"unpickling it would run {listed(dangerous)}: do not load it unless you know why")
    return told + missing[:10]


def _is_damaged(problems: Sequence[str]) -> bool:
    return any(word in problem for problem in problems for word in _DAMAGE)


def _is_missing(use: GlobalUse) -> bool:
    words = use.found or ""
    return use.verdict == "code" and any(
        part in words for part in ("is not importable here", " any more", "nobody can import", "not a module's name")
    )


def _advice(
    place: str,
    kind: str,
    container: str,
    uses: Sequence[GlobalUse],
    found: Recognised,
    *,
    is_whole: bool,
    is_ambiguous: bool,
) -> tuple[str, ...]:
    typed = shlex.quote(clean(place, 1000))
    verdicts = {use.verdict for use in uses}
    can_be_read = container in _READABLE and bool(found.weights)
    without_classes = f"ckptmgr import {typed} RUN_DIR --weights-only  # takes its tensors, without its classes"
    if "dangerous" in verdicts or is_ambiguous:
        lines = [
            "do not load it with pickle, joblib or weights_only=False: it would run more than its own classes",
            "ask whoever made it for the weights alone, as safetensors or a state dict",
        ]
        if can_be_read and is_whole and not is_ambiguous:
            lines.append(f"{without_classes}, and runs nothing of it")
        return tuple(lines)
    if not is_whole:
        return ("it is not what was written: copy or download it again, and compare the sizes",)
    is_torch = container.startswith("torch")
    load = f"torch.load({place!r}, map_location='cpu', weights_only={'code' not in verdicts})" if is_torch else ""
    load = load or (f"joblib.load({place!r})" if container == "joblib" else f"pickle.load(open({place!r}, 'rb'))")
    lines = []
    if kind == "lightning-checkpoint":
        lines.append(
            "this is a Lightning checkpoint: you want its key 'state_dict', or LightningModule.load_from_checkpoint"
        )
    if kind == "trainer-checkpoint":
        lines.append(f"this is a trainer's checkpoint: you want its key {clean(found.weights_key or '')!r}")
    if kind == "optimizer-state":
        lines.append(f"optimizer.load_state_dict({load}); the weights are in another file")
    if kind == "pickled-module" or "pickled_module" in found.details:
        if can_be_read:
            lines.append(f"ckptmgr import {typed} RUN_DIR  # takes its tensors, without its classes")
        lines.append("this is a whole pickled module: it loads only where its classes can be imported as they were")
        part = f"[{found.weights_key!r}]" if found.weights_key else ""
        lines.append(f"there, and if you trust it: torch.save({load}{part}.state_dict(), 'weights.pt')")
        lines += [] if can_be_read else ["then: ckptmgr import weights.pt RUN_DIR"]
    elif can_be_read and kind in ("lightning-checkpoint", "state-dict", "trainer-checkpoint"):
        needs_code = any(use.verdict == "code" and use.name != EXAMINED for use in uses)
        lines.append(without_classes if needs_code else f"ckptmgr import {typed} RUN_DIR")
    if kind in ("lightning-checkpoint", "trainer-checkpoint", "state-dict") and "pickled_module" not in found.details:
        part = f"[{found.weights_key!r}]" if found.weights_key else ""
        lines.append(f"model.load_state_dict({load}{part})")
    if "code" in verdicts and "pickled_module" not in found.details and kind != "pickled-module":
        lines.append("it holds objects of other classes: load it only where they can be imported, and if you trust it")
    for tool, names in _READERS.items():
        if tool in found.versions:
            lines.append(compared(tool, found.versions[tool], installed_version(*names)))
    if not lines or kind in ("pickle", "torch-file", "joblib", "sklearn-pickle", "tensor", "tensors"):
        lines.append(load)
    return tuple(lines)
