"""Long campaigns run only when they are asked for: ``pytest -m campaign``. What is left out is said at the end."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before anybody imports torch, for this process and all that it starts: several test at once, on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LEFT_OUT = pytest.StashKey[int]()
# Few tests that take long: begun last, they would be waited for by one process while the other has nothing to do.
LONG = ("test_life_of_a_run", "test_examples", "test_configs", "crash", "resume", "topology")


@pytest.fixture(autouse=True)
def _a_command_that_ran_in_this_process_leaves_no_logging_behind() -> Iterator[None]:
    logger = logging.getLogger("ckptmgr")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(part in item.nodeid.split("::")[0] for part in LONG))
    if "campaign" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker process left out: each of them collects everything."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    number = config.stash.get(LEFT_OUT, 0)
    if number:
        terminalreporter.write_line(f"left out: {number} tests of long campaigns; `pytest -m campaign` runs them")
