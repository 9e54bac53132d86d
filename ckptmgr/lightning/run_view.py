"""What users and Lightning ask a manager for: the run directory, paths, scores, what has changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ckptmgr.errors import CheckpointNotFoundError
from ckptmgr.launch.run_directory import default_run_dir, job_name
from ckptmgr.lightning.filesystem import url_of
from ckptmgr.lightning.loops import LoopHooks
from ckptmgr.lightning.saving import Saver
from ckptmgr.run.catalog import Catalog
from ckptmgr.state.changed_options import OptionChange
from ckptmgr.state.selection import SelectionReport
from ckptmgr.storage.open import open_storage
from ckptmgr.training_run import Monitor, TrainingRun

__all__ = ["RunView"]


class RunView:
    """The part of `CheckpointManager` that answers questions. Knows the run directory, and the run while it is open."""

    _run_dir: str | None
    _monitor: Monitor | None
    _storage_options: Mapping[str, Any] | None
    _hooks: LoopHooks | None
    _saver: Saver | None
    _past: TrainingRun | None
    _report: SelectionReport | None
    monitor: str | None

    @property
    def run_dir(self) -> str | None:
        """The run directory; None as long as it depends on a Trainer that this manager has not met."""
        return self._run_dir

    @property
    def dirpath(self) -> str | None:
        """The run directory, under ModelCheckpoint's name."""
        return self._run_dir

    @property
    def best_model_path(self) -> str:
        """URL of the best checkpoint, of the newest one without ``monitor``; empty if there is none.

        Can be given to ``ckpt_path`` and to ``load_from_checkpoint``.
        """
        if self._monitor is None:
            return self.last_model_path
        known = self._known_run()
        if known is not None:
            found = known.best()
            return "" if found is None else self._url(found[0])
        try:
            catalog = self._catalog()
            return (
                "" if catalog is None else self._url(catalog.best(self._monitor.metric, self._monitor.mode).checkpoint)
            )
        except CheckpointNotFoundError:
            return ""

    @property
    def best_model_score(self) -> torch.Tensor | None:
        """The best checkpoint's value of the monitored metric."""
        known = self._known_run()
        if self._monitor is None or known is None:
            return None
        found = known.best()
        return None if found is None else torch.tensor(found[1])

    @property
    def current_score(self) -> torch.Tensor | None:
        """The newest value of the monitored metric."""
        value = None if self._saver is None else self._saver.latest_metrics.get(str(self.monitor))
        return None if value is None else torch.tensor(value)

    @property
    def last_model_path(self) -> str:
        """URL of the newest checkpoint; empty if there is none."""
        known = self._known_run()
        if known is not None:
            latest = known.latest()
            return "" if latest is None else self._url(latest)
        try:
            catalog = self._catalog()
            return "" if catalog is None else self._url(catalog.latest().checkpoint)
        except CheckpointNotFoundError:
            return ""

    @property
    def changes(self) -> list[OptionChange]:
        """What ``fit`` trains with otherwise than the checkpoint did: options that were applied, batch size."""
        return [] if self._hooks is None or self._hooks.options is None else self._hooks.options.applied

    @property
    def report(self) -> SelectionReport | None:
        """What ``fit`` did not restore of the checkpoint, by the ``selection``; None where there was no selection."""
        return self._report

    @property
    def state_key(self) -> str:
        """Unique among all callbacks: two managers of one run are refused with a message of ours."""
        return f"CheckpointManager({self._run_dir!r}, {id(self)})"

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: what is best and newest follows from the run directory."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        if self._run_dir is None:
            self._settle_run_dir(trainer, fresh=False)
        return {self.last_model_path} - {""}

    def wait(self) -> None:
        """Wait until the last save is durable.

        Raises:
            SaveFailedError, Fenced: It failed.
        """
        if self._saver is not None:
            self._saver.run.wait()

    def _settle_run_dir(self, trainer: Any, *, fresh: bool) -> None:
        if self._run_dir is None and (fresh or job_name(os.environ) is not None):
            self._run_dir = default_run_dir(os.fspath(trainer.default_root_dir))

    def _known_run(self) -> TrainingRun | None:
        return self._past if self._saver is None else self._saver.run

    def _catalog(self) -> Catalog | None:
        if self._run_dir is None:
            return None
        catalog = Catalog(open_storage(self._run_dir, storage_options=self._storage_options))
        return catalog if catalog.is_run else None

    def _url(self, checkpoint: Any) -> str:
        return url_of(f"{self._run_dir}@{checkpoint}")
