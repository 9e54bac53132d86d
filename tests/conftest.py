"""Long campaigns run only when they are asked for: ``pytest -m campaign``."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "campaign" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    number = config.stash.get(LEFT_OUT, 0)
    if number:
        terminalreporter.write_line(f"left out: {number} tests of long campaigns; `pytest -m campaign` runs them")


LEFT_OUT = pytest.StashKey[int]()
