"""The preprocessor of a manager: saved with the model, and compared with the checkpoint's before training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ckptmgr.errors import StateMismatchError
from ckptmgr.loading import LoadedCheckpoint
from ckptmgr.preprocess.handler import PREPROCESSOR
from ckptmgr.state.capture import capture_state, check_state, restore_state
from ckptmgr.state.entry import CapturedEntry

__all__ = ["PREPROCESSOR", "KeptPreprocessor"]

_log = logging.getLogger("ckptmgr")


class KeptPreprocessor:
    """What was given as ``preprocessor=``.

    Args:
        value: The live preprocessor; None where there is none.

    Attributes:
        state: It by the name of its entry; empty where there is none.
    """

    def __init__(self, value: Any) -> None:
        self.state: Mapping[str, Any] = {} if value is None else {PREPROCESSOR: value}

    @property
    def value(self) -> Any:
        """The live preprocessor, or None."""
        return self.state.get(PREPROCESSOR)

    def capture(self) -> list[CapturedEntry]:
        """Return its entry; nothing where there is none.

        Raises:
            UnsupportedStateError: Nothing knows how to store it.
        """
        return capture_state(self.state)

    def check(self, loaded: LoadedCheckpoint, entry: CapturedEntry | None) -> None:
        """Compare it with the checkpoint's. Changes nothing.

        Args:
            loaded: The checkpoint.
            entry: Its preprocessor, if it is to be restored.

        Raises:
            StateMismatchError: They are not the same, or the manager was given none.
        """
        if entry is None:
            return
        if not self.state:
            raise StateMismatchError(
                f"{loaded.reference} has a preprocessor, and the manager was given none",
                why="model and preprocessor are one unit: from here on the run would be saved without it",
                next="CheckpointManager(..., preprocessor=...) as in the run that saved; "
                "or begin another run without it: selection=Selection.without('preprocessor')",
            )
        check_state(self.state, {PREPROCESSOR: entry})

    def restore(self, entry: CapturedEntry | None) -> None:
        """Put the checkpoint's state into it.

        Raises:
            StateMismatchError: It does not fit.
        """
        if entry is not None:
            restore_state(self.state, {PREPROCESSOR: entry})
        elif self.state:
            _log.info(
                "the checkpoint's preprocessor is not restored, or it has none: from now on the live one is saved"
            )
