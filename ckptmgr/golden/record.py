"""Golden samples as an entry of the state: made at the save, from the live objects."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ckptmgr.errors import GoldenSampleError
from ckptmgr.golden.run import Chain
from ckptmgr.golden.samples import Golden, described_function
from ckptmgr.state.entry import CapturedEntry

__all__ = ["HANDLER", "VERSION", "GoldenRecorder", "capture_golden"]

_log = logging.getLogger("ckptmgr")

HANDLER = "golden"
VERSION = 1


class GoldenRecorder:
    """Makes the entry of golden samples at each save of a run.

    Before training a sample that raises is an error. Once all of them have worked, one that raises costs the save its
    golden samples, and not the save. In a job of several ranks the entry stays then, without samples: a checkpoint has
    the same entries on all of them.

    Args:
        name: Of the entry.
        golden: What the user gave; None for nothing.
    """

    def __init__(self, name: str, golden: Golden | None) -> None:
        self._name = name
        self._golden = golden
        self._has_worked = False

    def entries(self, model: Any, preprocessor: Any, *, is_alone: bool) -> list[CapturedEntry]:
        """Return the entry for what the model is now; nothing where there are no golden samples.

        Args:
            model: The live model, in any mode; afterwards it is as it was.
            preprocessor: What belongs to it, or None.
            is_alone: The job has one rank.

        Raises:
            GoldenSampleError: A sample raises, and none has worked before.
        """
        if self._golden is None:
            return []
        try:
            entry = capture_golden(self._name, self._golden, model, preprocessor)
        except GoldenSampleError as error:
            if not self._has_worked:
                raise
            _log.warning("saving without golden samples: %s", error)
            return [] if is_alone else [_entry(self._name, self._golden, [], "cpu")]
        self._has_worked = True
        return [entry]


def capture_golden(name: str, golden: Golden, model: Any, preprocessor: Any) -> CapturedEntry:
    """Run every golden sample through preprocessor and model, and return what came of it.

    Args:
        name: Of the entry.
        golden: What the user gave.
        model: The live model, in any mode; afterwards it is as it was.
        preprocessor: What belongs to it, or None.

    Raises:
        GoldenSampleError: A sample raises. Its cause is chained.
    """
    chain = Chain(model, preprocessor, encode=golden.encode, predict=golden.predict)
    samples = [_sample(chain, index, raw) for index, raw in enumerate(golden.samples)]
    return _entry(name, golden, samples, chain.device)


def _entry(name: str, golden: Golden, samples: list[dict[str, Any]], device: str) -> CapturedEntry:
    tree = {
        "samples": samples,
        "rtol": golden.rtol,
        "atol": golden.atol,
        "device": device,
        "torch": str(torch.__version__),
        "encode": described_function(golden.encode),
        "predict": described_function(golden.predict),
    }
    # Each rank has its own: buffers may differ between ranks, and what one rank cannot run must not stop the others.
    return CapturedEntry(name, HANDLER, VERSION, tree, "per-rank")


def _sample(chain: Chain, index: int, raw: Any) -> dict[str, Any]:
    stage = "preprocessed"
    try:
        inputs = chain.encoded(raw)
        stage = "given to the model"
        return {"raw": raw, "inputs": inputs, "output": chain.predicted(inputs)}
    except Exception as error:
        raise GoldenSampleError(
            f"golden sample {index} cannot be {stage}",
            why=f"{type(error).__name__}: {error}",
            next="leave it out of golden=[...], or say with Golden(samples, encode=..., predict=...) what to do",
        ) from error
