"""The README's tours, replayed: every command, as a reader types it, prints what the README says."""

from __future__ import annotations

from pathlib import Path

import pytest
from readme_replay import replay


@pytest.mark.timeout(600)
def test_the_life_of_a_run_is_as_the_readme_tells_it(tmp_path: Path) -> None:
    folder = (tmp_path / "project").resolve()
    assert replay("An experiment, from its configuration", "console tour", folder, home="/home/me/spirals") >= 10


@pytest.mark.timeout(600)
def test_a_model_loads_as_it_was_or_is_refused_as_the_readme_tells_it(tmp_path: Path) -> None:
    folder = (tmp_path / "project").resolve()
    assert replay("A model that loads as it was", "console replay", folder, home="/home/me/sentiment") >= 6
