"""What is wrong with a file or directory, and what to do: everything that is known about it, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ckptmgr.diagnose.artifact import Artifact, TensorFacts, is_damaged
from ckptmgr.diagnose.difference import Difference, selection_code
from ckptmgr.diagnose.drift import Drift, grade
from ckptmgr.diagnose.match import match
from ckptmgr.diagnose.recorded_code import compare_code, recorded_classes
from ckptmgr.diagnose.then_and_now import environment_now, environment_then
from ckptmgr.errors import CkptmgrError
from ckptmgr.format.manifest import Manifest
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.environment import recorded_versions
from ckptmgr.run.reference import parse_reference
from ckptmgr.storage.open import open_storage

__all__ = ["Diagnosis", "Look", "diagnose"]

Look: TypeAlias = Callable[[str], Artifact]

_RUN_KINDS = ("run", "run-checkpoint")
_LIGHTNINGS = ("lightning", "pytorch-lightning")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that is known about an artifact.

    Attributes:
        artifact: What it is.
        difference: From the model that it was compared with; None where there was none.
        against: What it was compared with, as it was named.
        uncomparable: Why it could not be compared, where one was asked for.
        drifts: What is not as it was when it was written, the likeliest cause of a failure first.
        reading: Lines of Python that give ``state``, the tensors by name, and ``model``, as far as that is known.
        reference: Of the checkpoint of ours that it was compared with; None for anything else.
        selection: A `Selection` that applies all proposals to a checkpoint of ours; None where that is not possible.
        is_damaged: Bytes of it are missing, or not those that were written.
    """

    artifact: Artifact
    difference: Difference | None = None
    against: str | None = None
    uncomparable: str | None = None
    drifts: tuple[Drift, ...] = ()
    reading: tuple[str, ...] = ()
    reference: str | None = None
    selection: str | None = None
    is_damaged: bool = False

    @property
    def is_well(self) -> bool:
        """Whether it was recognised, nothing is wrong with it, and it fits what it was compared with."""
        is_known = self.artifact.kind != "unknown" and not self.artifact.problems and not self.is_damaged
        is_safe = all(use.verdict != "dangerous" for use in self.artifact.globals)
        return is_known and is_safe and self.uncomparable is None and (self.difference is None or self.difference.fits)

    @property
    def advice(self) -> tuple[str, ...]:
        """What reads it. Where it does not fit its model, nothing that would load it into that as it is."""
        if self.difference is None or self.difference.fits:
            return self.artifact.advice
        return tuple(line for line in self.artifact.advice if "load_state_dict(" not in line)

    def code(self) -> tuple[str, ...]:
        """Return the lines that read the tensors, apply all proposals that are not unknown, and load the result."""
        lines = self.difference.code() if self.difference is not None else ()
        if not lines:
            return ()
        every = (*self.reading, *lines)
        imports = dict.fromkeys(line for line in every if line.startswith(("import ", "from ")))
        return (*imports, *(line for line in every if line not in imports))


def diagnose(
    place: str,
    look: Look,
    *,
    live: Sequence[TensorFacts] | None = None,
    against: str | None = None,
    building: Sequence[str] = (),
) -> Diagnosis:
    """Look at a file or directory, and compare it with a model where there is one. Nothing of it is executed.

    Args:
        place: A path, a URL or a reference.
        look: Recognises it.
        live: The tensors that a model has.
        against: What they are of, as the user named it.
        building: Lines of Python that give ``model``.

    Raises:
        CheckpointNotFoundError, StorageError: As ``look``.
    """
    artifact = look(place)
    difference = uncomparable = None
    if live is not None:
        if artifact.tensors is None:
            uncomparable = f"the tensors of {artifact.title} cannot be listed"
        else:
            difference = match(artifact.tensors, live)
    is_run = artifact.kind in _RUN_KINDS
    recorded = _recorded(place, artifact) if is_run else None
    return Diagnosis(
        artifact=artifact,
        difference=difference,
        against=against,
        uncomparable=uncomparable,
        drifts=tuple(_drifts(artifact, recorded)),
        reading=(*_reading(place, artifact), *building),
        reference=recorded[2] if recorded is not None else None,
        selection=_selection(difference, recorded[1]) if difference is not None and recorded is not None else None,
        is_damaged=is_damaged(artifact),
    )


def _recorded(place: str, artifact: Artifact) -> tuple[Catalog, Manifest, str] | None:
    checkpoint = artifact.details.get("checkpoint")
    if not isinstance(checkpoint, str):
        return None
    try:
        run_dir = parse_reference(place).run_dir
        if f"/checkpoints/{checkpoint}" in run_dir:
            run_dir = run_dir.partition(f"/checkpoints/{checkpoint}")[0]
        catalog = Catalog(open_storage(run_dir))
        selector = "latest" if artifact.kind == "run" else checkpoint
        return catalog, catalog.resolve(checkpoint), f"{run_dir}@{selector}"
    except CkptmgrError:
        # What is wrong with it stands among the problems of the artifact.
        return None


def _drifts(artifact: Artifact, found: tuple[Catalog, Manifest, str] | None) -> list[Drift]:
    if found is not None:
        code = compare_code(recorded_classes(found[1]))
        then, now = environment_then(found[0].storage, found[1]), environment_now()
        return grade({**then, **code.then}, {**now, **code.now}, code.reasons)
    now = recorded_versions()
    # A file tells versions of many things; those that this program has a use for are compared.
    then = {name: version for name, version in artifact.versions.items() if name in now or name in _LIGHTNINGS}
    for name in _LIGHTNINGS:
        # Published twice: a file says one of the names, and either of them reads it.
        if name in then and name not in now and (other := next((it for it in _LIGHTNINGS if it in now), None)):
            now[name] = now[other]
    return grade(then, now)


def _selection(difference: Difference, manifest: Manifest) -> str | None:
    modules = [entry.name for entry in manifest.entries if entry.handler == "module"]
    # Of several modules the names begin with the entry, and a selection would have to take that apart.
    return selection_code(difference.proposals, entry=modules[0]) if len(modules) == 1 else None


def _reading(place: str, artifact: Artifact) -> tuple[str, ...]:
    """Return the lines that give the tensors of a file by name, where a line or two can do that safely."""
    details: Mapping[str, Any] = artifact.details
    if artifact.kind == "safetensors":
        return ("from safetensors.torch import load_file", f"state = load_file({place!r})")
    has_code = any(use.verdict != "plain" for use in artifact.globals)
    if artifact.kind in ("state-dict", "lightning-checkpoint", "trainer-checkpoint") and not has_code:
        key = details.get("weights_key") or ("state_dict" if artifact.kind == "lightning-checkpoint" else None)
        part = f"[{key!r}]" if isinstance(key, str) else ""
        return (
            "import torch",
            f'state = torch.load({place!r}, map_location="cpu", weights_only=True){part}',
        )
    if artifact.kind in _RUN_KINDS:
        return ("state = ...  # the model's tensors by name, as `ckptmgr export` writes them",)
    return ("state = ...  # the tensors of the file by name",)
