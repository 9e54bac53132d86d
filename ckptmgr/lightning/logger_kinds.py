"""The kinds of loggers that can go on with an earlier log: what names their log, and how they take it up."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ckptmgr.launch.logger_record import LoggerRecord
from ckptmgr.launch.redact import redact_text, redact_url, secret_values
from ckptmgr.lightning.compat import TREES
from ckptmgr.lightning.log_files import (
    csv_header,
    csv_position,
    cut_csv,
    cut_events,
    event_files,
    event_folders,
    has_only_version,
    mend_csv,
)

__all__ = ["CsvLogs", "LoggerKind", "NotContinued", "describe", "kind_of", "place_in_run"]

_log = logging.getLogger("ckptmgr")


class NotContinued(Exception):
    """A logger goes its own way; the text says why."""


class LoggerKind(Protocol):
    """What is to be known about one class of loggers of Lightning's."""

    name: str

    def place(self, logger: Any) -> str:
        """Return what the log's version or id is unique in."""

    def version(self, logger: Any) -> str | int | None:
        """Return the version or run id; None if there is none yet. Creates nothing."""

    def adopt(self, logger: Any, record: LoggerRecord, undo: contextlib.ExitStack) -> Any:
        """Go on with the recorded log.

        Args:
            logger: Before or after it has begun.
            record: What it goes on with.
            undo: Takes what is to be done when the ``fit`` has ended.

        Returns:
            What `rewind` needs to know about this moment.

        Raises:
            NotContinued: That is not possible, or not wanted. The logger is as it was.
        """

    def release(self, logger: Any, version: str | int | None) -> None:
        """Undo `adopt`, where that is possible, before anything was logged."""

    def position(self, logger: Any) -> dict[str, Any] | None:
        """Write out what is buffered, and return where the log's files end now; None for a log without files."""

    def rewind(self, logger: Any, position: Mapping[str, Any], since: Any, *, mark: str) -> tuple[list[str], str]:
        """Put the files back to a position.

        Args:
            logger: It adopted its log.
            position: What `position` returned at the checkpoint.
            since: What `adopt` returned.
            mark: For the names of the files that keep what is cut off.

        Returns:
            These files, and what is missing, for people.
        """


class _Folders:
    """What CSV and TensorBoard have in common: a folder for each version."""

    def place(self, logger: Any) -> str:
        place = os.path.expanduser(os.path.expandvars(str(logger.root_dir)))  # noqa: PTH111
        return redact_url(place) if "://" in place else redact_text(str(Path(place).absolute()), _secrets())

    def version(self, logger: Any) -> str | int | None:
        version: str | int | None = logger._version
        return version

    def release(self, logger: Any, version: str | int | None) -> None:
        if logger._experiment is not None:
            logger.finalize("failed")
        logger._version, logger._experiment = version, None

    def go_to(self, logger: Any, version: str | int | None) -> None:
        # It comes out of the run directory, and files are cut where it leads to.
        if version is None or (
            isinstance(version, str) and (".." in Path(version).parts or Path(version).is_absolute())
        ):
            raise NotContinued(f"{version!r} is no version")
        before, logger._version = logger._version, version
        if not logger._fs.exists(logger.log_dir):
            folder, logger._version = logger.log_dir, before
            raise NotContinued(f"{folder} is gone")


class CsvLogs(_Folders):
    """``CSVLogger``."""

    name = "csv"

    def adopt(self, logger: Any, record: LoggerRecord, undo: contextlib.ExitStack) -> Any:
        fresh = logger._experiment
        if fresh is not None and fresh.metrics:
            fresh.save()
        self.go_to(logger, record.version)
        cls = _continuing(type(fresh) if fresh is not None else _module_of(logger, "csv_logs").ExperimentWriter)
        writer = cls(log_dir=logger.log_dir)
        mend_csv(logger._fs, writer.metrics_file_path)
        writer.metrics_keys = csv_header(logger._fs, writer.metrics_file_path)
        logger._experiment = writer
        if fresh is not None and fresh.log_dir != writer.log_dir:
            writer.hparams = fresh.hparams
            _remove_if_empty(logger._fs, fresh.log_dir)
        return csv_position(logger._fs, writer.metrics_file_path)

    def set_aside(self, logger: Any) -> str | None:
        """Rename the file that a logger would delete when it begins, and return its new path; None if there is none."""
        if logger._experiment is not None or logger._version is None:
            return None
        path = posixpath.join(str(logger.log_dir), "metrics.csv")
        if not logger._fs.exists(path):
            return None
        stem = path.removesuffix(".csv")
        beside = next(name for n in count(1) if not logger._fs.exists(name := f"{stem}.replaced-{n}.csv"))
        logger._fs.mv(path, beside)
        return beside

    def position(self, logger: Any) -> dict[str, Any]:
        logger.experiment.save()
        return csv_position(logger._fs, logger.experiment.metrics_file_path)

    def rewind(self, logger: Any, position: Mapping[str, Any], since: Any, *, mark: str) -> tuple[list[str], str]:
        writer = logger.experiment
        writer.save()
        path = writer.metrics_file_path
        dropped = f"{path.removesuffix('.csv')}.{mark}.csv"
        missing = cut_csv(logger._fs, path, position, since, dropped)
        writer.metrics_keys = csv_header(logger._fs, path)
        return [dropped] if logger._fs.exists(dropped) else [], missing or ""


class TensorBoardLogs(_Folders):
    """``TensorBoardLogger``."""

    name = "tensorboard"

    def adopt(self, logger: Any, record: LoggerRecord, undo: contextlib.ExitStack) -> Any:
        fresh, fresh_dir = logger._experiment, logger.log_dir if logger._experiment is not None else None
        self.go_to(logger, record.version)
        if fresh is not None:
            logger._experiment = None
            path = getattr(getattr(fresh.file_writer, "event_writer", None), "_file_name", None)
            fresh.close()
            if path is not None and fresh_dir != logger.log_dir and has_only_version(logger._fs, path):
                logger._fs.rm_file(path)
                _remove_if_empty(logger._fs, fresh_dir)
        if record.has_hparams:
            # They are in the log, at step 0, and would be there twice.
            undo.callback(setattr, logger, "_default_hp_metric", logger._default_hp_metric)
            logger._default_hp_metric = False
        return set(event_files(logger._fs, event_folders(logger._fs, logger.log_dir), logger.log_dir))

    def position(self, logger: Any) -> dict[str, Any]:
        logger.experiment.flush()
        folders = [str(folder) for folder in logger.experiment.all_writers or {}]
        return {"files": event_files(logger._fs, {logger.log_dir, *folders}, logger.log_dir)}

    def rewind(self, logger: Any, position: Mapping[str, Any], since: Any, *, mark: str) -> tuple[list[str], str]:
        dropped, missing = cut_events(logger._fs, logger.log_dir, position["files"], since, mark)
        return dropped, f"{', '.join(missing)}: gone, or shorter than at the checkpoint" if missing else ""


class _Service:
    """What W&B and MLflow have in common: a run with an id, in a store that only grows."""

    def release(self, logger: Any, version: str | int | None) -> None:
        """Nothing: the run has begun."""

    def position(self, logger: Any) -> None:
        return None

    def rewind(self, logger: Any, position: Mapping[str, Any], since: Any, *, mark: str) -> tuple[list[str], str]:
        return [], ""


class WandbLogs(_Service):
    """``WandbLogger``: the run's id is kept. What W&B has stored cannot be taken back."""

    name = "wandb"

    def place(self, logger: Any) -> str:
        return str(logger._project)

    def version(self, logger: Any) -> str | int | None:
        version: str | None = logger.version
        return version

    def adopt(self, logger: Any, record: LoggerRecord, undo: contextlib.ExitStack) -> Any:
        current = getattr(sys.modules.get("wandb"), "run", None)
        if logger._experiment is not None or current is not None or logger._id is not None:
            own = logger.version or getattr(current, "id", None)
            if own == record.version:
                return None
            raise NotContinued(f"run {own} was chosen before `fit`; the earlier one is {record.version}")
        logger._id = logger._wandb_init["id"] = record.version
        return None


class MlflowLogs(_Service):
    """``MLFlowLogger``: the run's id is kept. Points and parameters that MLflow has stored cannot be taken back."""

    name = "mlflow"

    def place(self, logger: Any) -> str:
        uri = str(logger._tracking_uri)
        scheme, found, path = uri.partition(":")
        if not found or scheme == "file":
            uri = str(Path((path if found else uri).removeprefix("//")).absolute())
        return f"{redact_text(uri, _secrets())} {logger._experiment_name}"

    def version(self, logger: Any) -> str | int | None:
        version: str | None = logger._run_id
        return version

    def adopt(self, logger: Any, record: LoggerRecord, undo: contextlib.ExitStack) -> Any:
        if logger._run_id == record.version:
            return None
        if logger._run_id is not None:
            raise NotContinued(f"run {logger._run_id} was chosen before `fit`; the earlier one is {record.version}")
        client = logger._mlflow_client
        run = client.get_run(record.version)
        if run.info.lifecycle_stage != "active":
            raise NotContinued(f"run {record.version} was deleted")
        logger._run_id = record.version
        client.update_run(record.version, status="RUNNING")
        original = client.log_batch

        def log_batch(run_id: str, *args: Any, params: Any = (), **kwargs: Any) -> Any:
            fixed = dict(run.data.params)
            changed = [param.key for param in params if fixed.get(param.key, param.value) != param.value]
            if changed:
                _log.warning("MLflow run %s keeps the first values of %s: MLflow allows no others", run_id, changed)
            return original(run_id, *args, params=[param for param in params if param.key not in changed], **kwargs)

        # A parameter with another value, such as an overridden learning rate, would be refused, and end the training.
        client.log_batch = log_batch
        undo.callback(vars(client).pop, "log_batch", None)
        return None


_KINDS: dict[tuple[str, str], LoggerKind] = {
    ("csv_logs", "CSVLogger"): CsvLogs(),
    ("tensorboard", "TensorBoardLogger"): TensorBoardLogs(),
    ("wandb", "WandbLogger"): WandbLogs(),
    ("mlflow", "MLFlowLogger"): MlflowLogs(),
}


def kind_of(logger: Any) -> LoggerKind | None:
    """Return what is known about a logger, or about the class that it extends; None for any other."""
    for cls in type(logger).__mro__:
        for (module, name), kind in _KINDS.items():
            if cls.__name__ == name and any(cls.__module__ == f"{tree}.loggers.{module}" for tree in TREES):
                return kind
    return None


def describe(logger: Any, run_dir: str) -> LoggerRecord:
    """Return the record of a logger that has begun."""
    kind = kind_of(logger)
    if kind is None:
        version = getattr(logger, "version", None)
        known = version if isinstance(version, str | int) else None
        return LoggerRecord(kind="other", type=type(logger).__qualname__, version=known)
    return LoggerRecord(
        kind=kind.name,
        type=type(logger).__qualname__,
        place=kind.place(logger),
        place_in_run=place_in_run(kind, logger, run_dir),
        version=kind.version(logger),
        has_hparams=bool(getattr(logger, "hparams", None)),
    )


def place_in_run(kind: LoggerKind, logger: Any, run_dir: str) -> str | None:
    """Return the path of a log's folder below the run directory; None where it lies elsewhere."""
    if "://" not in run_dir and isinstance(kind, _Folders):
        with contextlib.suppress(ValueError):
            return Path(kind.place(logger)).relative_to(run_dir).as_posix()
    return None


def _continuing(cls: type[Any]) -> type[Any]:
    if not hasattr(cls, "_check_log_dir_exists"):
        raise NotContinued(f"{cls.__qualname__} would delete the file that it is given")
    # It deletes a file that it finds.
    return type(cls.__name__, (cls,), {"_check_log_dir_exists": lambda self: None, "__module__": cls.__module__})


def _module_of(logger: Any, name: str) -> Any:
    for cls in type(logger).__mro__:
        if cls.__module__.endswith(f".loggers.{name}"):
            return sys.modules[cls.__module__]
    raise NotContinued(f"{type(logger).__qualname__} is not one of Lightning's")


def _remove_if_empty(fs: Any, folder: Any) -> None:
    with contextlib.suppress(OSError):
        if not fs.ls(folder, detail=False):
            fs.rmdir(folder)


def _secrets() -> tuple[str, ...]:
    return secret_values(os.environ)
