"""Which logs an attempt writes: a record beside it, by which a later attempt goes on with the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import FORMAT_VERSION, encode_record
from ckptmgr.run.lineage import read_attempt_record
from ckptmgr.storage.protocol import Storage

__all__ = ["LoggerRecord", "LoggersRecord", "read_loggers", "write_loggers"]


class LoggerRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One logger, at its place among the loggers of its Trainer.

    Attributes:
        kind: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``; ``other`` for one that is left alone.
        type: Name of its class.
        place: Folder of all versions, project, or tracking URI and experiment. Without credentials.
        place_in_run: The folder's path below the run directory, where it lies there: a run may be moved.
        version: Version or run id.
        start: Where its files ended when the attempt began to train.
        has_hparams: Hyper-parameters were logged.
    """

    kind: str
    type: str
    place: str | None = None
    place_in_run: str | None = None
    version: str | int | None = None
    start: dict[str, Any] | None = None
    has_hparams: bool = False


class LoggersRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """``loggers.json`` of an attempt."""

    version: int
    attempt: int
    loggers: tuple[LoggerRecord, ...] = ()


def write_loggers(storage: Storage, attempt: int, loggers: Sequence[LoggerRecord]) -> None:
    """Record once which logs an attempt writes."""
    record = LoggersRecord(version=FORMAT_VERSION, attempt=attempt, loggers=tuple(loggers))
    storage.write(attempt_key(attempt, "loggers"), [encode_record(record)], exclusive=True)


def read_loggers(storage: Storage, attempt: int) -> tuple[LoggerRecord, ...]:
    """Read which logs an attempt wrote; empty if it had none.

    Raises:
        CorruptCheckpointError, FormatVersionError: The record cannot be read.
    """
    try:
        return read_attempt_record(storage, attempt, "loggers", LoggersRecord).loggers
    except FileNotFoundError:
        return ()
