"""Where a training process is killed, interrupted or made to fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ckptmgr.storage.local import LocalStorage

__all__ = ["Fault", "Faults", "Sabotage"]

Act = Literal["kill", "terminate", "raise"]


class Sabotage(RuntimeError):
    """The exception that a fault raises."""


@dataclass(frozen=True)
class Fault:
    """What happens at the first time that training passes a point at a turn (batch, from 1) or later.

    ==============  ================================================================================
    point           where
    ==============  ================================================================================
    fetched         the batch is there, nothing was done with it
    forward         the loss is there
    optimizing      inside of the optimizer's step, parameters have changed
    stepped         the optimizer has stepped; scheduler, EMA and `Checkpointer.step` come next
    validating      in the middle of validation
    turn-end        after everything of the turn, the save included; the next batch is not fetched
    manifest        a save in the background is about to write its manifest (turn = step of the save)
    epoch-hooks     Lightning only: in ``on_train_epoch_end``; turn-end is in ``on_train_epoch_start``
    committed       the manifest is written, nobody was told yet
    any             wherever the process is, so many ms (not turns) after it started
    ==============  ================================================================================
    """

    point: str
    turn: int
    act: Act = "kill"

    def __str__(self) -> str:
        return f"{self.act} at {self.point} {self.turn}"


class Faults:
    """The fault of one process start, or none."""

    def __init__(self, fault: Fault | None) -> None:
        self._fault = fault
        if fault is not None and fault.point in ("manifest", "committed"):
            self._watch_manifests()
        if fault is not None and fault.point == "any":
            # Nobody handles this signal: the system ends the process at once, as with SIGKILL.
            signal.setitimer(signal.ITIMER_REAL, fault.turn / 1000)

    def reached(self, point: str, turn: int) -> None:
        """Training passes a point."""
        fault = self._fault
        if fault is None or point != fault.point or turn < fault.turn:
            return
        self._fault = None
        if fault.act == "raise":
            raise Sabotage(str(fault))
        os.kill(os.getpid(), signal.SIGKILL if fault.act == "kill" else signal.SIGTERM)

    def _watch_manifests(self) -> None:
        write = LocalStorage.write

        def watched(storage: LocalStorage, key: str, parts: Iterable[Any], *, exclusive: bool = False) -> None:
            is_manifest = key.endswith("/manifest.json")
            step = int(key.split("/")[1].split("-")[0]) if is_manifest else 0
            if is_manifest:
                self.reached("manifest", step)
            write(storage, key, parts, exclusive=exclusive)
            if is_manifest:
                self.reached("committed", step)

        LocalStorage.write = watched  # type: ignore[method-assign]
