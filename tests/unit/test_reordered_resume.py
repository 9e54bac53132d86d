"""A program whose optimizer was reordered between the kill and the resume trains as if it had not been."""

from __future__ import annotations

import logging
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
def test_losses_after_a_reordered_resume_are_those_of_the_uninterrupted_run(
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

    caplog.clear()
    FACES[face](str(tmp_path / "run"), 99, "reordered")
    after = losses(capfd.readouterr().out)
    assert 1 < min(after) <= 5
    assert losses(killed.stdout) | after == straight
    said = [(r.levelno, r.getMessage()) for r in caplog.records if "optimizer" in r.getMessage()]
    assert said == [(logging.INFO, "optimizer AdamW: state carried by name for 6 of 6 parameters")]
