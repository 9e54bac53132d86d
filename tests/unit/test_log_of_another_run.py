"""A logger that is set up to write where another run has logged does not delete what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning_samples import Model, make_trainer, plain_loader

from ckptmgr.lightning import CheckpointManager


def fit(root: Path, name: str, resume: str = "auto", **options: Any) -> None:
    logger = CSVLogger(root / "logs", name="exp", version="fixed")
    manager = CheckpointManager(root / name, resume=resume)
    trainer = make_trainer(root, manager, logger=logger, **options)
    trainer.fit(Model(), plain_loader())


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("resume", ["auto", "parent"])
def test_a_run_that_logs_where_another_has_logged_keeps_its_log(
    tmp_path: Path, resume: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs" / "exp" / "fixed"
    fit(tmp_path, "parent", max_epochs=1)
    before = (folder / "metrics.csv").read_text()
    fit(tmp_path, "child", "auto" if resume == "auto" else f"{tmp_path}/parent", max_epochs=2)
    assert (folder / "metrics.replaced-1.csv").read_text() == before
    assert "metrics.replaced-1.csv" in caplog.text
    own = (folder / "metrics.csv").read_text()
    # What goes on with its own log has nothing to set aside.
    fit(tmp_path, "child", max_epochs=3)
    assert (folder / "metrics.csv").read_text().startswith(own)
    assert sorted(path.name for path in folder.glob("*.csv")) == ["metrics.csv", "metrics.replaced-1.csv"]
