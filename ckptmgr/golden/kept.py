"""The golden samples of a plain loop, proved before anything is claimed, or once the preprocessor has been filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ckptmgr.errors import GoldenSampleError, UsageError
from ckptmgr.golden.record import GoldenRecorder
from ckptmgr.golden.samples import Golden
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.preprocess.handler import PREPROCESSOR
from ckptmgr.preprocess.kinds import find_kind
from ckptmgr.state.capture import capture_state
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.selection import Selection

__all__ = ["KeptGolden"]


class KeptGolden:
    """Runs the samples with the model and the preprocessor of a state.

    A preprocessor that lacks what a checkpoint has, such as an unfitted estimator, is filled by it. Until then no
    sample works, which is no error of the sample's.

    Args:
        name: Of the entry.
        golden: What the user gave; None for nothing.
        state: The user's objects by name.

    Raises:
        UsageError: There are samples, and no module that they are for.
    """

    def __init__(self, name: str, golden: Golden | None, state: Mapping[str, object]) -> None:
        self._recorder = GoldenRecorder(name, golden)
        self._model = None if golden is None else _model_of(state)
        self._preprocessor = state.get(PREPROCESSOR)
        self._unproved: GoldenSampleError | None = None

    def entries(self, *, is_alone: bool) -> list[CapturedEntry]:
        """Run the samples with the model as it is now; nothing where there are none.

        Args:
            is_alone: The job has one rank.

        Raises:
            GoldenSampleError: A sample raises, and none has worked before.
        """
        return self._recorder.entries(self._model, self._preprocessor, is_alone=is_alone)

    def first_entries(self, *, is_alone: bool) -> list[CapturedEntry]:
        """Do the same before it is known what training goes on from.

        Raises:
            GoldenSampleError: A sample raises, and no checkpoint can help it.
        """
        self._unproved = None
        try:
            return self.entries(is_alone=is_alone)
        except GoldenSampleError as error:
            if self._preprocessor is None or not find_kind(self._preprocessor).is_restorable(self._preprocessor):
                raise
            self._unproved = error
            return []

    def check(self, loaded: LoadedCheckpoint | None, selection: Selection | None = None) -> None:
        """Raise if a sample does not work, and the checkpoint does not fill the preprocessor. Changes nothing.

        Args:
            loaded: What training goes on from; None where it begins from nothing.
            selection: What of it is to be restored; all by default.

        Raises:
            GoldenSampleError: So it is.
        """
        if self._unproved is not None and (loaded is None or not self._is_filled_by(loaded, selection)):
            raise self._unproved

    def prove_restored(self, *, is_alone: bool) -> None:
        """Run the samples that have not worked yet, now that the preprocessor is restored.

        Raises:
            GoldenSampleError: A sample raises.
        """
        if self._unproved is not None:
            self._unproved = None
            self.entries(is_alone=is_alone)

    def _is_filled_by(self, loaded: LoadedCheckpoint, selection: Selection | None) -> bool:
        if selection is not None and not selection.may_take(PREPROCESSOR):
            return False
        (live,) = capture_state({PREPROCESSOR: self._preprocessor})
        saved = {entry.name: entry.fingerprint for entry in loaded.manifest.entries}
        return saved.get(PREPROCESSOR) not in (None, live.fingerprint)


def _model_of(state: Mapping[str, Any]) -> nn.Module:
    """Return the module that golden samples are for.

    Raises:
        UsageError: There is none, or one of several is meant.
    """
    modules = {name: v for name, v in state.items() if isinstance(v, nn.Module) and name != PREPROCESSOR}
    chosen = modules.get("model", next(iter(modules.values()), None) if len(modules) == 1 else None)
    if chosen is None:
        raise UsageError(
            "golden samples are given, and no model for them",
            why=f"the state has the modules {', '.join(modules)}" if modules else "the state has no module",
            next="give the module that predicts the name 'model' in the state",
        )
    return chosen
