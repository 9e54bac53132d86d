"""Programs whose optimizer has changed between the kill and the resume: reordered, or with a frozen layer."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from reordered_program import FACES, STEPS


def losses(printed: str) -> dict[int, str]:
    lines = [line.split() for line in printed.splitlines()]
    return {int(line[0]): line[1] for line in lines if len(line) == 2 and line[0].isdigit()}


@pytest.mark.parametrize("face", list(FACES))
def test_a_reordered_optimizer_trains_on_as_before_and_a_frozen_layer_is_told(
    face: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    if face == "lightning":
        pytest.importorskip("lightning")
    caplog.set_level(logging.INFO, logger="ckptmgr")
    FACES[face](str(tmp_path / "straight"), 99, "usual")
    straight = losses(capfd.readouterr().out)
    assert len(straight) == STEPS

    program = Path(__file__).with_name("reordered_program.py")
    command = [sys.executable, str(program), face, str(tmp_path / "run"), "5", "usual"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    shutil.copytree(tmp_path / "run", tmp_path / "frozen")
    caplog.clear()
    FACES[face](str(tmp_path / "run"), 99, "reordered")
    after = losses(capfd.readouterr().out)
    assert 1 < min(after) <= 5
    assert losses(killed.stdout) | after == straight
    said = [(r.levelno, r.getMessage()) for r in caplog.records if r.getMessage().startswith("optimizer")]
    assert said == [(logging.INFO, "optimizer AdamW: state carried by name for 6 of 6 parameters")]

    caplog.clear()
    FACES[face](str(tmp_path / "frozen"), 99, "frozen")
    frozen = losses(capfd.readouterr().out)
    first = min(frozen)
    assert (first, max(frozen)) == (min(after), STEPS)
    assert frozen[first] == straight[first]
    assert frozen[STEPS] != straight[STEPS]
    (told,) = (r for r in caplog.records if r.getMessage().startswith("optimizer AdamW"))
    assert told.levelno == logging.WARNING
    assert "carried by name for 4 of 4 parameters; dropped for 2 (model/" in told.getMessage()
