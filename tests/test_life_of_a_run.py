"""The README's tour of an experiment, replayed: every command, as a reader types it, prints what the README says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = re.search(
    r"^## An experiment, from its configuration.*?(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S
)
HOME = "/home/me/spirals"
OMITTED = "…"

# What differs from one machine, day or start to the next.
CHANGING = [
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "<time>"),
    (r"\b[0-9a-f]{16}\b", "<id>"),
    (r"\b\d+(\.\d+)? (ms|s|min|h)\b", "<duration>"),
    (r"\b\d+(\.\d+)? (B|KiB|MiB)\b", "<size>"),
    (r"process \d+ on \S+", "<process>"),
    (r"\b\S+:\d+\b(?= +ckptmgr )", "<host>"),
    (r"(?<=[=:] )?\b\d+\.\d+\b", "<number>"),
    # Which step was best is the processor's choice.
    (r"(best \S+) at step \d+", r"\1 at <step>"),
    (r"<number>( at step |@)\d+", "<number> at <step>"),
    (r"\s+", " "),
]


def files() -> dict[str, str]:
    assert SECTION is not None
    return dict(re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```$', SECTION[0], re.M | re.S))


def steps() -> list[tuple[str, list[str]]]:
    """Return each command of the tour, and the lines that follow it."""
    assert SECTION is not None
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console tour\n(.*?)^```$", SECTION[0], re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line.removeprefix("$ "), []))
            else:
                steps[-1][1].append(line)
    return steps


def settled(line: str) -> str:
    for pattern, word in CHANGING:
        line = re.sub(pattern, word, line)
    return line.strip()


def run(command: str, folder: Path) -> list[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CKPTMGR_", "SLURM_"))}
    environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    program, *arguments = shlex.split(command)
    assert program == "ckptmgr"
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ckptmgr")), *arguments],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    # The shell's own word for it.
    killed = ["Killed"] if done.returncode == -9 else []
    return [*done.stdout.replace(str(folder), HOME).splitlines(), *killed]


def check(command: str, printed: list[str], promised: list[str]) -> None:
    """Compare line by line; where the README leaves lines out, it says so."""
    found, wanted = [settled(line) for line in printed], [settled(line) for line in promised]
    place, may_skip = 0, False
    for line in wanted:
        if line == OMITTED:
            may_skip = True
            continue
        where = found.index(line, place) if line in found[place:] else -1
        assert where == place or (may_skip and where > place), "\n".join([command, f"expected: {line}", *printed])
        place, may_skip = where + 1, False
    assert may_skip or place == len(found), "\n".join([command, "printed more than the README says:", *printed])


@pytest.mark.timeout(600)
def test_the_tour_of_the_readme_prints_what_it_says(tmp_path: Path) -> None:
    folder = (tmp_path / "project").resolve()
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert len(steps()) >= 10
    for command, promised in steps():
        check(command, run(command, folder), promised)
