"""Our own run directories and their checkpoints, as artifacts like any other."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.plain_words import clean, plural
from ckptmgr.errors import CkptmgrError
from ckptmgr.format.encoding import DTYPE_WORDS
from ckptmgr.format.layout import CHECKPOINTS, RUN_MARKER, CheckpointId
from ckptmgr.format.manifest import Manifest
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.imported import source_of, ways_on
from ckptmgr.run.reference import URL_PREFIX, parse_reference
from ckptmgr.storage.open import open_storage
from ckptmgr.words import printable_place

__all__ = ["checkpoint_folder", "reference_of", "run_checkpoint", "run_directory"]


def reference_of(place: str) -> tuple[str, str] | None:
    """Return run directory and selector of ``RUN_DIR@REF``; None where the text is no such reference."""
    if not place.startswith(URL_PREFIX) and ("@" not in place or os.path.lexists(place)):
        return None
    try:
        reference = parse_reference(place)
    except CkptmgrError:
        return None
    is_named = place.startswith(URL_PREFIX) or str(reference) == place
    return (reference.run_dir, reference.selector) if is_named else None


def checkpoint_folder(place: str) -> tuple[str, str] | None:
    """Return the run and the id of a checkpoint's folder, ``RUN_DIR/checkpoints/ID``; None for any other place."""
    head, _, last = place.rstrip("/").rpartition("/")
    try:
        CheckpointId.parse(last)
    except ValueError:
        return None
    run, slash, middle = head.rpartition("/")
    return ((run if slash else "."), last) if f"{middle}/" == CHECKPOINTS else None


def run_directory(place: str, options: Mapping[str, Any] | None) -> Artifact:
    """Describe a run.

    Raises:
        RunNotFoundError: It is none.
        StorageError: It cannot be read.
    """
    catalog = Catalog.of_existing_run(open_storage(place, storage_options=options))
    problems, details = [], dict[str, Any]()
    newest: Manifest | None = None
    try:
        for checkpoint in reversed(catalog.on_line):
            reason = catalog.why_not_intact(checkpoint)
            if reason is None:
                newest = catalog.manifest(checkpoint)
                break
            problems.append(f"checkpoint {checkpoint} is not intact: {clean(reason, 300)}")
    except CkptmgrError as error:
        problems.append(f"its line cannot be followed: {clean(error.what, 300)}")
    if not catalog.is_run:
        problems.append(f"{RUN_MARKER} is missing")
    shown = printable_place(catalog.storage.url)
    title = f"a run of ckptmgr with {plural(len(catalog.committed), 'checkpoint')}"
    if newest is not None:
        title += f", the newest at step {newest.step}"
        details.update(step=newest.step, checkpoint=newest.checkpoint, epoch=newest.epoch)
    elif catalog.committed:
        problems.insert(0, "none of its checkpoints can be used")
    details.update(checkpoints=len(catalog.committed), torn=len(catalog.torn), attempts=len(catalog.attempts))
    typed = shlex.quote(shown)
    return Artifact(
        place=shown,
        kind="run",
        title=title,
        certainty="certain",
        nbytes=sum(catalog.sizes.values()),
        versions=_versions(newest),
        tensors=_tensors(newest) if newest is not None else None,
        contents=_contents(newest) if newest is not None else {},
        problems=tuple(problems[:20]),
        advice=(
            f"ckptmgr show {typed}",
            *_going_on(catalog, newest, shown),
            f"ckptmgr verify {typed} reads every byte",
        ),
        details=details,
    )


def _going_on(catalog: Catalog, newest: Manifest | None, shown: str) -> tuple[str, ...]:
    is_imported = newest is not None and source_of(newest) is not None
    if newest is not None and is_imported and not any("start" in records for records in catalog.attempts.values()):
        return ways_on(newest, shown)
    return (f"ckptmgr resume {shlex.quote(shown)}",)


def run_checkpoint(run_dir: str, selector: str, options: Mapping[str, Any] | None, *, place: str) -> Artifact:
    """Describe one checkpoint of a run.

    Raises:
        RunNotFoundError, CheckpointNotFoundError: There is no such run or checkpoint.
        StorageError: It cannot be read.
        CorruptCheckpointError: Its manifest cannot be read.
    """
    catalog = Catalog.of_existing_run(open_storage(run_dir, storage_options=options))
    manifest = catalog.resolve(selector)
    reason = catalog.why_not_intact(manifest.id)
    reference = shlex.quote(f"{printable_place(catalog.storage.url)}@{manifest.checkpoint}")
    return Artifact(
        place=printable_place(place),
        kind="run-checkpoint",
        title=f"the checkpoint of a run of ckptmgr at step {manifest.step}",
        certainty="certain",
        nbytes=manifest.nbytes,
        versions=_versions(manifest),
        tensors=_tensors(manifest),
        contents=_contents(manifest),
        problems=(f"it is not intact: {clean(reason, 300)}",) if reason else (),
        advice=(f"ckptmgr show {reference}", f"ckptmgr verify {reference} reads every byte"),
        details={"step": manifest.step, "epoch": manifest.epoch, "checkpoint": manifest.checkpoint},
    )


def _versions(manifest: Manifest | None) -> dict[str, str]:
    names = ("ckptmgr", "torch", "lightning", "python")
    environment = manifest.environment if manifest is not None else {}
    return {name: clean(environment[name], 40) for name in names if name in environment}


def _tensors(manifest: Manifest) -> tuple[TensorFacts, ...]:
    """Return the tensors of the modules; of several modules with the entry's name in front."""
    modules = [entry.name for entry in manifest.entries if entry.handler == "module"]
    facts: dict[str, TensorFacts] = {}
    for tensor in manifest.tensors:
        if tensor.entry in modules:
            name = clean(tensor.name if len(modules) == 1 else f"{tensor.entry}.{tensor.name}", 300)
            dtype = tensor.logical_dtype or DTYPE_WORDS.get(tensor.dtype, tensor.dtype)
            shape = tensor.global_shape or tensor.logical_shape or tensor.shape
            facts.setdefault(name, TensorFacts(name, dtype.removeprefix("torch."), tuple(shape)))
            for alias in tensor.aliases:
                other = clean(alias if len(modules) == 1 else f"{tensor.entry}.{alias}", 300)
                facts.setdefault(other, TensorFacts(other, facts[name].dtype, facts[name].shape, name))
    return tuple(facts.values())


def _contents(manifest: Manifest) -> dict[str, str]:
    counts: dict[str, int] = {}
    for tensor in manifest.tensors:
        counts[tensor.entry] = counts.get(tensor.entry, 0) + 1
    return {
        clean(entry.name): f"{clean(entry.handler)}, {plural(counts.get(entry.name, 0), 'tensor')}"
        for entry in manifest.entries[:200]
    }
