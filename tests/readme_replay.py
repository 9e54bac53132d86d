"""A section of the README, replayed: every command, as a reader types it, prints what the README says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["replay"]

ROOT = Path(__file__).parents[1]
OMITTED = "…"

# What differs from one machine, day or start to the next.
CHANGING = [
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "<time>"),
    (r"\b[0-9a-f]{16}\b", "<id>"),
    (r"\b[0-9a-f]{12}\b", "<digest>"),
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


def replay(title: str, language: str, folder: Path, *, home: str) -> int:
    """Write the files of a section, run its commands, and compare what they print; return how many there were.

    Args:
        title: What the section's heading begins with.
        language: What its blocks of commands begin with.
        folder: Where it happens.
        home: What the README calls that folder.
    """
    section = re.search(rf"^## {re.escape(title)}.*?(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section is not None
    for name, text in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```$', section[0], re.M | re.S):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    steps = _steps(section[0], language)
    for command, promised in steps:
        _check(command, _run(command, folder, home), promised)
    return len(steps)


def _steps(section: str, language: str) -> list[tuple[str, list[str]]]:
    """Return each command, and the lines that follow it."""
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line.removeprefix("$ "), []))
            else:
                steps[-1][1].append(line)
    return steps


def _settled(line: str) -> str:
    for pattern, word in CHANGING:
        line = re.sub(pattern, word, line)
    return line.strip()


def _run(command: str, folder: Path, home: str) -> list[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CKPTMGR_", "SLURM_"))}
    environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    program, *arguments = shlex.split(command.partition("  #")[0])
    assert program in ("ckptmgr", "python", "sed")
    place = program if program == "sed" else str(Path(sys.executable).with_name(program))
    done = subprocess.run(
        [place, *arguments],
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
    return [*done.stdout.replace(str(folder), home).splitlines(), *killed]


def _check(command: str, printed: list[str], promised: list[str]) -> None:
    """Compare line by line; where the README leaves lines out, it says so."""
    found, wanted = [_settled(line) for line in printed], [_settled(line) for line in promised]
    place, may_skip = 0, False
    for line in wanted:
        if line == OMITTED:
            may_skip = True
            continue
        where = found.index(line, place) if line in found[place:] else -1
        assert where == place or (may_skip and where > place), "\n".join([command, f"expected: {line}", *printed])
        place, may_skip = where + 1, False
    assert may_skip or place == len(found), "\n".join([command, "printed more than the README says:", *printed])
