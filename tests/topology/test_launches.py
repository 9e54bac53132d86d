"""A cell that fails, or takes its launch with it, does not take the others with it."""

from __future__ import annotations

from pathlib import Path

from launches import Failure, Task, launch_all

# Does its jobs as `jobs.py` does, without torch: fails at the first, dies at the second, and comes to the third.
PROGRAM = """
import json, os, pathlib, sys

for job in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    if job["topology"] == "dies":
        print("about to die")
        sys.stdout.flush()
        os._exit(3)
    pathlib.Path(job["result"] + ".rank0.error").write_text("ValueError: " + job["topology"] + "\\nTraceback")
"""


def test_a_cell_that_takes_its_launch_with_it_leaves_the_others_to_another_launch(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    tasks = [Task(name, tmp_path / name, run_dir=None) for name in ("first", "dies", "last")]
    found = launch_all(str(tmp_path / "program.py"), tasks, processes=1)
    assert list(found) == tasks
    first, died, last = found.values()
    assert isinstance(first, Failure)
    assert isinstance(died, Failure)
    assert isinstance(last, Failure)
    assert first.first_line == "ValueError: first"
    assert died.first_line == "the launch ended with code 1 in the middle of it"
    assert "about to die" in died.report
    assert last.first_line == "ValueError: last"
