"""Tables in a terminal: whatever fits stays whole."""

from __future__ import annotations

import re

import pytest

from ckptmgr.cli import output

Output = pytest.CaptureFixture[str]

HEADERS = ["attempt", "time", "changed", "checkpoints", "command"]
ROWS = [
    ["1", "2026-11-23 04:25:19", "", "4", "ckptmgr run cnn.yaml run_dir=runs/a"],
    ["2", "2026-11-23 04:33:45", "trainer.max_epochs: 4 -> 6", "", "ckptmgr resume runs/a trainer.max_epochs=6"],
]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: Output, request: pytest.FixtureRequest) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.print_table(HEADERS, ROWS, right=["attempt", "checkpoints"])
    return [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("lines", [70, 80, 100, 120, 200], indirect=True)
def test_a_table_fits_into_the_terminal(lines: list[str], request: pytest.FixtureRequest) -> None:
    assert max(map(len, lines)) <= request.node.callspec.params["lines"]


@pytest.mark.parametrize("lines", [90], indirect=True)
def test_words_stay_whole_where_they_fit(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert all(word in text for word in ("trainer.max_epochs:", "trainer.max_epochs=6", "run_dir=runs/a"))


@pytest.mark.parametrize("lines", [200], indirect=True)
def test_a_wide_terminal_has_each_row_on_one_line(lines: list[str]) -> None:
    assert len(lines) == 1 + len(ROWS)
