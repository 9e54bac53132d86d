"""A checkpoint as something that predicts: model, preprocessor, and the proof that both are what they were."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ckptmgr.diagnose.recorded_code import recorded_classes
from ckptmgr.errors import CkptmgrError, GoldenMismatchError, NotAllowedError, StateMismatchError, UsageError
from ckptmgr.experiment.rebuild import rebuild
from ckptmgr.golden.compare import compare_golden, refuse_differences
from ckptmgr.golden.record import HANDLER as GOLDEN
from ckptmgr.golden.run import Chain
from ckptmgr.golden.samples import described_function
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.load import load_target
from ckptmgr.instantiate.targets import Target
from ckptmgr.lightning.assemble import MODEL, TRAINER, load_model
from ckptmgr.loading import LoadedCheckpoint, load_checkpoint
from ckptmgr.preprocess.differing_token import first_differing_token
from ckptmgr.preprocess.handler import PreprocessorHandler
from ckptmgr.preprocess.kinds import build_preprocessor
from ckptmgr.resume_drift import drift_since, tell_code_drift
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.reference import Reference, parse_reference
from ckptmgr.state.capture import restore_state
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.names import ParameterNames, unwrapped_module
from ckptmgr.state.sources import class_sources
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage

__all__ = ["Inference", "load_inference"]

_log = logging.getLogger("ckptmgr")

PREPROCESSOR = PreprocessorHandler.name
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Inference:
    """A model that is ready to predict, with what belongs to it.

    Attributes:
        model: In eval mode.
        preprocessor: What turns raw input into what the model takes; None where the run has none.
        reference: Names exactly the checkpoint.
        step: Optimizer updates that the model has seen.
        ngolden: How many golden samples gave what they gave at the save; None where none were run.
    """

    model: nn.Module
    preprocessor: Any
    reference: str
    step: int
    ngolden: int | None
    _chain: Chain

    def predict(self, raw: Any) -> Any:
        """Return what the model makes of one raw input, without gradients.

        Args:
            raw: As the golden samples are: text, values, an array.

        Returns:
            The model's output, for a batch of one where the preprocessor makes batches.
        """
        return self._chain(raw)


def load_inference(
    reference: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    preprocessor: Any = None,
    encode: Callable[[Any, Any], Any] | None = None,
    predict: Callable[[Any, Any], Any] | None = None,
    golden: bool = True,
    allow: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Inference:
    """Load model and preprocessor of a checkpoint, as they were, to predict with.

    Args:
        reference: ``RUN_DIR``, ``RUN_DIR@best``, … of a run of `Checkpointer` or `CheckpointManager`.
        model: The module that the weights go into, or a class or function that makes it (a LightningModule's class is
            given the hyper-parameters of the run). By default it is built as the run's configuration says.
        preprocessor: One to be compared with the checkpoint's. By default that of the checkpoint is built.
        encode: As in `Golden`: how the preprocessor is used. By default as its kind is, or as the golden samples were
            made, if ``allow`` admits that function.
        predict: As in `Golden`, in the same way.
        golden: Run the golden samples again, and refuse the model if one gives something else.
        allow: Names of code that the checkpoint may have imported, such as ``my_pkg.*``; besides those of the project.
        storage_options: For a URL; never recorded.

    Raises:
        StateMismatchError: The weights do not fit the model, or the preprocessor given is not that of the checkpoint.
        GoldenMismatchError: A golden sample no longer gives what it gave. Names stage, place and values.
        NotAllowedError: The checkpoint names code that nobody has allowed. Nothing of it was imported.
        UsageError: Nothing says how to build the model, or the preprocessor.
        CheckpointNotFoundError, CorruptCheckpointError: There is nothing (whole) to load.
    """
    meant = parse_reference(os.fspath(reference))
    allowed = AllowList.gather(cwd=Path.cwd(), extra=allow)
    catalog = Catalog.of_existing_run(open_storage(meant.run_dir, storage_options=storage_options))
    loaded = _load(meant, catalog, storage_options)
    built = partial(rebuild, catalog, loaded.manifest.attempt, allowed)
    module = _model(model, loaded, built)
    tell_code_drift(loaded, class_sources(module))
    with _drift_told(catalog.storage, loaded, module):
        _restore(module, loaded)
    _set_eval_mode(module)
    entries = {entry.handler: entry for entry in loaded.entries.values()}
    samples = entries[GOLDEN].tree if GOLDEN in entries else None
    raw_samples = [sample["raw"] for sample in samples["samples"]] if samples else []
    chosen = _preprocessor(preprocessor, entries.get(PREPROCESSOR), raw_samples, loaded, allowed, built)
    chain = Chain(
        module,
        chosen,
        encode=_function("encode", encode, samples, allowed, is_needed=golden),
        predict=_function("predict", predict, samples, allowed, is_needed=golden),
    )
    ngolden = None
    if golden and samples is not None:
        ngolden = len(samples["samples"])
        with _drift_told(catalog.storage, loaded, module):
            refuse_differences(compare_golden(samples, chain), reference=loaded.reference, nsamples=ngolden)
        _log.info("%s: %d golden samples give what they gave", loaded.reference, ngolden)
    elif golden:
        _log.warning("%s has no golden samples: nothing proves that it predicts as it did", loaded.reference)
    return Inference(module, chosen, loaded.reference, loaded.manifest.step, ngolden, chain)


@contextmanager
def _drift_told(storage: Storage, loaded: LoadedCheckpoint, module: nn.Module) -> Iterator[None]:
    """Say beside a failure what is not as it was at the save, and may be its cause."""
    try:
        yield
    except (StateMismatchError, GoldenMismatchError) as error:
        drifts = [drift for drift in drift_since(storage, loaded, class_sources(module)) if drift.grade != "info"]
        if not drifts:
            raise
        since = "; ".join(f"{drift} ({drift.why})" for drift in drifts[:_SHOWN])
        why = f"{error.why}\n        not as it was then: {since}"
        raise type(error)(error.what, why=why, next=error.next) from error


def _load(meant: Reference, catalog: Catalog, storage_options: Mapping[str, Any] | None) -> LoadedCheckpoint:
    manifest = catalog.resolve(meant.selector)
    wanted = [
        entry.name for entry in manifest.entries if entry.handler in ("module", "lightning", PREPROCESSOR, GOLDEN)
    ]
    return load_checkpoint(meant, names=wanted, storage_options=storage_options)


def _model(
    given: nn.Module | Callable[..., nn.Module] | None,
    loaded: LoadedCheckpoint,
    built: Callable[..., dict[str, Any]],
) -> nn.Module:
    if isinstance(given, nn.Module):
        return unwrapped_module(given)
    made: Any = built(parts=("model",)).get("model") if given is None else given(**_hyper_parameters(given, loaded))
    if made is None:
        raise UsageError(
            f"nothing says how to build the model of {loaded.reference}",
            why="the run was not built from a configuration, and a checkpoint holds no code" + _classes(loaded),
            next="load_inference(..., model=YourModel(...)), or model=YourModel for a class that is called",
        )
    if not isinstance(made, nn.Module):
        raise UsageError(f"the model is a {type(made).__qualname__}, and no torch.nn.Module")
    return made


def _classes(loaded: LoadedCheckpoint) -> str:
    names = list(recorded_classes(loaded.manifest))[:_SHOWN]
    return f"; the classes that it was made of: {', '.join(names)}" if names else ""


def _hyper_parameters(factory: Any, loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Return what a LightningModule's class was called with, as far as the run has kept it."""
    if TRAINER not in loaded.entries or not hasattr(factory, "load_from_checkpoint"):
        return {}
    saved = loaded.entries[TRAINER].tree["lightning"].get("hyper_parameters", {})
    return {str(name): value for name, value in dict(saved).items()}


def _restore(module: nn.Module, loaded: LoadedCheckpoint) -> None:
    if TRAINER in loaded.entries and hasattr(module, "on_load_checkpoint"):
        load_model(module, loaded)
        return
    modules = {name: entry for name, entry in loaded.entries.items() if entry.handler == "module"}
    entry = modules.get(MODEL, next(iter(modules.values()), None) if len(modules) == 1 else None)
    if entry is None:
        raise StateMismatchError(
            f"{loaded.reference} has no entry 'model'",
            why=f"its modules are {', '.join(modules)}" if modules else "it has no module at all",
            next="Checkpointer(..., state={NAME: module}).restore(reference) restores any entry",
        )
    restore_state({entry.name: module}, {entry.name: entry})


def _set_eval_mode(module: nn.Module) -> None:
    module.eval()
    # An overridden train() may have left parts as they were; golden samples are run with all of them in eval mode.
    stayed = [name for name, part in module.named_modules() if part.training]
    if stayed:
        shown = ", ".join(map(repr, stayed[:_SHOWN])) + (", …" if len(stayed) > _SHOWN else "")
        _log.warning("%d parts of the model stayed in training mode after eval(), and were set: %s", len(stayed), shown)
        for part in module.modules():
            part.training = False


def _preprocessor(
    given: Any,
    entry: CapturedEntry | None,
    raw_samples: Sequence[Any],
    loaded: LoadedCheckpoint,
    allowed: AllowList,
    built: Callable[..., dict[str, Any]],
) -> Any:
    if entry is None:
        if given is not None:
            _log.warning("%s has no preprocessor: nothing proves that this is the one", loaded.reference)
        return given

    def allow(name: str) -> Any:
        return load_target(Target("preprocessor", name), allowed)

    if given is None:
        try:
            return build_preprocessor(entry.tree, allow)
        except (StateMismatchError, NotAllowedError):
            # The configuration may build one to put the state into; what it names is allowed, or refused there.
            given = built(parts=("preprocessor",)).get("preprocessor")
            if given is None:
                raise
    handler, names = PreprocessorHandler(), ParameterNames({})
    try:
        handler.check(given, entry.tree, names)
    except StateMismatchError as error:
        token = _differing_token(entry, given, raw_samples, allow)
        raise StateMismatchError(
            f"the preprocessor given is not the one that {loaded.reference} was trained with",
            why="\n        ".join(filter(None, (token, error.why))),
            next="leave preprocessor= out to get the one of the checkpoint; for another one a model has to be trained",
        ) from error
    handler.restore(given, entry.tree, names)
    return given


def _differing_token(
    entry: CapturedEntry, given: Any, samples: Sequence[Any], allow: Callable[[str], Any]
) -> str | None:
    """Return the first token of the golden samples on which the checkpoint's preprocessor and another one differ."""
    # It makes a refusal clearer; where it cannot be had, the refusal stands without it.
    with suppress(CkptmgrError):
        found = first_differing_token(build_preprocessor(entry.tree, allow), given, samples)
        return None if found is None else f"golden {found}"
    return None


def _function(
    argument: str,
    given: Callable[[Any, Any], Any] | None,
    samples: Mapping[str, Any] | None,
    allowed: AllowList,
    *,
    is_needed: bool,
) -> Callable[[Any, Any], Any] | None:
    """Return the function that the golden samples were made with, or the one given; say so if it has changed."""
    recorded = None if samples is None else samples[argument]
    if recorded is None:
        return given
    name = recorded["name"].replace(":", ".")
    found = given
    if found is None:
        if not is_needed and allowed.source_of(name) is None:
            return None
        if allowed.source_of(name) is None:
            raise UsageError(
                f"the golden samples were made with {argument}={recorded['name']}",
                why="a checkpoint holds no code, and nobody has allowed this to be imported",
                next=f"load_inference(..., {argument}=that function), or allow=[{name!r}]",
            )
        found = load_target(Target(argument, name), allowed)
    if (described_function(found) or {}).get("source") != recorded["source"]:
        _log.warning("the source of %s=%s is not what it was at the save", argument, recorded["name"])
    return found
