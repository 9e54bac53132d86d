"""One log for one run: loggers go on with the log of the attempt that is continued, from where it was then.

Lightning's loggers begin anew in each process. Here they take up the version or id that is recorded beside the
attempt, before they begin; and once everything was restored, log files are put back to where they ended when the
checkpoint was saved. Loggers never make a training fail.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptmgr.errors import CheckpointNotFoundError, CkptmgrError
from ckptmgr.launch.logger_record import LoggerRecord, read_loggers, write_loggers
from ckptmgr.lightning.logger_kinds import CsvLogs, LoggerKind, NotContinued, describe, kind_of, place_in_run
from ckptmgr.run.catalog import Catalog
from ckptmgr.storage.open import open_storage
from ckptmgr.training_run import TrainingRun

__all__ = ["Logs", "begin_logs", "log_positions"]

_log = logging.getLogger("ckptmgr")
_told: set[str] = set()


def begin_logs(trainer: Any, run_dir: str, resume: str, *, storage_options: Mapping[str, Any] | None) -> Logs:
    """Return the loggers of a Trainer whose ``fit`` begins, with the logs that it will probably go on with.

    Args:
        trainer: Best before any of its loggers has begun.
        run_dir: The run.
        resume: The manager's choice.
        storage_options: For the run.
    """
    # Loggers write on rank 0 alone.
    logs = Logs(trainer.loggers if trainer.is_global_zero else [], run_dir)
    # A second `fit` goes on from what is in memory.
    if trainer.global_step == 0:
        logs.adopt(resume, storage_options=storage_options)
        logs.keep_others()
    return logs


def log_positions(loggers: Sequence[Any]) -> list[dict[str, Any] | None]:
    """Return where each logger's files end, everything logged so far written out."""
    return [_position(logger) for logger in loggers]


@dataclass(frozen=True, slots=True)
class _Adopted:
    logger: Any
    kind: LoggerKind
    record: LoggerRecord
    before: str | int | None
    since: Any


class Logs:
    """The loggers of one ``fit``.

    Args:
        loggers: The Trainer's.
        run_dir: The run.
    """

    def __init__(self, loggers: Sequence[Any], run_dir: str) -> None:
        self._loggers = list(loggers)
        self._run_dir = run_dir
        self._adopted: list[_Adopted] = []
        self._records: tuple[LoggerRecord, ...] = ()
        self._is_from_checkpoint = False
        self._undo = contextlib.ExitStack()

    def adopt(self, resume: str, *, storage_options: Mapping[str, Any] | None) -> None:
        """Take up the logs of the attempt that will probably be continued."""
        if not self._loggers or resume == "never":
            return
        try:
            catalog = Catalog(open_storage(self._run_dir, storage_options=storage_options))
            attempt = self._attempt_to_continue(catalog, resume)
            self._records = () if attempt is None else read_loggers(catalog.storage, attempt)
        except CkptmgrError as error:
            # Where the run itself is at fault, it is said when it is opened.
            _log.debug("no logs are continued: %s", error)
            return
        except Exception as error:
            _log.warning("no logs are continued: %s: %s", type(error).__name__, error)
            return
        taken: set[int] = set()
        for index, logger in enumerate(self._loggers):
            kind = kind_of(logger)
            if kind is not None:
                with _warning_of_failure(logger):
                    self._adopt(logger, kind, _match(self._records, logger, kind, index, self._run_dir, taken))

    def keep_others(self) -> None:
        """Keep the files of another run where a logger that goes on with nothing is set up to write, and would delete.

        A fork has its parent's configuration, and with it the place of the parent's log.
        """
        going_on = {id(adopted.logger) for adopted in self._adopted}
        for logger in self._loggers:
            kind = kind_of(logger)
            if isinstance(kind, CsvLogs) and id(logger) not in going_on:
                with _warning_of_failure(logger):
                    kept = kind.set_aside(logger)
                    if kept is not None:
                        _log.warning(
                            "%s begins a new log; the one that was there is now %s", type(logger).__qualname__, kept
                        )

    def chosen(self, run: TrainingRun) -> None:
        """Let go of what was taken up, if the run goes on from something else than was to be expected."""
        if not self._adopted:
            return
        continued = run.continued
        with contextlib.suppress(CkptmgrError):
            if continued is None and not self._is_from_checkpoint:
                return
            if continued is not None and Catalog(run.storage).line.holds(continued.manifest.id):
                return
        for adopted in self._adopted:
            with _warning_of_failure(adopted.logger):
                adopted.kind.release(adopted.logger, adopted.before)
        self._adopted.clear()
        self._undo.close()
        self.keep_others()

    def begin(self, run: TrainingRun, saved: Sequence[Mapping[str, Any] | None]) -> None:
        """Put log files back to where they were, and record which logs this attempt writes.

        Args:
            run: Accepted.
            saved: What `log_positions` returned at the checkpoint.
        """
        for adopted in self._adopted:
            with _warning_of_failure(adopted.logger):
                self._rewind(adopted, run.attempt, saved)
        records: list[LoggerRecord] = []
        for logger in self._loggers:
            records.append(LoggerRecord(kind="other", type=type(logger).__qualname__))
            with _warning_of_failure(logger):
                records[-1] = _with_start(describe(logger, self._run_dir), _position(logger))
                self._tell(logger, records[-1], len(records) - 1)
        if records:
            try:
                write_loggers(run.storage, run.attempt, records)
            except (CkptmgrError, OSError) as error:
                _log.warning("which logs are written is not recorded, so a resume begins new ones: %s", error)

    def close(self) -> None:
        """Leave nothing of ours on the loggers. Idempotent."""
        self._undo.close()

    def _attempt_to_continue(self, catalog: Catalog, resume: str) -> int | None:
        if not catalog.is_run:
            return None
        is_own = resume not in ("auto", "must") and not any(mark in resume for mark in "/@\\")
        try:
            manifest = catalog.resolve(resume if is_own else "latest")
        except CheckpointNotFoundError:
            if catalog.on_line:
                raise
            # Nothing was ever saved: it begins again.
            known = [number for number, records in catalog.attempts.items() if "loggers" in records]
            return max(known, default=None)
        if not catalog.line.holds(manifest.id):
            _log.warning("%s is not on the run's line, so new logs are begun", manifest.checkpoint)
            return None
        self._is_from_checkpoint = True
        return manifest.attempt

    def _adopt(self, logger: Any, kind: LoggerKind, record: LoggerRecord | None) -> None:
        if record is None:
            return
        before = kind.version(logger)
        try:
            since = kind.adopt(logger, record, self._undo)
        except NotContinued:
            raise
        except Exception:
            kind.release(logger, before)
            raise
        self._adopted.append(_Adopted(logger, kind, record, before, since))
        _log.info("%s goes on with %s", type(logger).__qualname__, _name_of(logger, record))

    def _tell(self, logger: Any, record: LoggerRecord, index: int) -> None:
        before = self._records[index] if index < len(self._records) else record
        if record.kind == "other" and before.type == record.type and before.version not in (None, record.version):
            what = "%s is not known here, and has begun %r; the run's earlier log is %r"
            _log.warning(what, record.type, record.version, before.version)
        if getattr(logger, "_log_model", False):
            what = "%s(log_model=...) uploads nothing: it knows files only, and a checkpoint is a folder"
            _log.warning(what, record.type)

    def _rewind(self, adopted: _Adopted, attempt: int, saved: Sequence[Mapping[str, Any] | None]) -> None:
        record, logger = adopted.record, adopted.logger
        key = (record.kind, record.version)
        found = [position for position in saved if position and (position["kind"], position["version"]) == key]
        position = found[0]["end"] if found else record.start
        if position is None or (self._is_from_checkpoint and not found):
            return
        mark = f"dropped-attempt-{attempt:06d}"
        dropped, missing = adopted.kind.rewind(logger, position, adopted.since, mark=mark)
        if dropped:
            _log.info("what was logged after the checkpoint is kept in %s", ", ".join(dropped))
        if missing:
            _log.warning("the log of %s is incomplete: %s", type(logger).__qualname__, missing)


def _match(
    records: Sequence[LoggerRecord], logger: Any, kind: LoggerKind, index: int, run_dir: str, taken: set[int]
) -> LoggerRecord | None:
    place, in_run = kind.place(logger), place_in_run(kind, logger, run_dir)
    same_kind = [i for i, record in enumerate(records) if record.kind == kind.name and i not in taken]
    same = [i for i in same_kind if records[i].place == place or (in_run and records[i].place_in_run == in_run)]
    if not same:
        if same_kind:
            raise NotContinued(f"it is set up for {place} now, and for {records[same_kind[0]].place} before")
        return None
    number = index if index in same else same[0]
    taken.add(number)
    return records[number]


def _position(logger: Any) -> dict[str, Any] | None:
    kind = kind_of(logger)
    if kind is None:
        return None
    try:
        end = kind.position(logger)
    except Exception as error:
        _tell_once(f"{type(logger).__qualname__} could not be written out, so a resume may repeat lines: {error}")
        return None
    return None if end is None else {"kind": kind.name, "version": kind.version(logger), "end": end}


def _with_start(record: LoggerRecord, position: Mapping[str, Any] | None) -> LoggerRecord:
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return LoggerRecord(**{**fields, "start": position["end"] if position else None})


def _name_of(logger: Any, record: LoggerRecord) -> str:
    folder = getattr(logger, "log_dir", None)
    return str(folder) if record.kind in ("csv", "tensorboard") else f"run {record.version}"


@contextlib.contextmanager
def _warning_of_failure(logger: Any) -> Any:
    try:
        yield
    except NotContinued as reason:
        _log.warning("%s does not go on with the run's earlier log: %s", type(logger).__qualname__, reason)
    except Exception as error:
        name = type(logger).__qualname__
        _log.warning("the log of %s could not be continued: %s: %s", name, type(error).__name__, error)


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.warning("%s", message)
