"""Renders the README's tables of topologies from the record of what the tests found.

Usage: python tests/topology/table.py, after the tests ran with CKPTMGR_WRITE_MATRIX=1; ``make matrix`` does both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "README", "RECORD", "render", "with_table"]

README = Path(__file__).parents[2] / "README.md"
RECORD = Path(__file__).parent / "matrix.json"
"""The outcomes of all cells; the tests write it where the environment asks for it."""

BEGIN, END = "<!-- topologies: made by `make matrix` -->", "<!-- topologies: end -->"
FACES = {"plain": "Plain PyTorch", "lightning": "Lightning"}


def render(record: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Return the tables.

    Args:
        record: Face → date, versions, tolerance and cells.
        titles: Name → title of the topologies.
    """
    return "\n\n".join("\n".join(_face(FACES[face], record[face], titles)) for face in FACES if face in record)


def with_table(text: str, table: str) -> str:
    """Return a text with the table between its marks, instead of what was there."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _face(title: str, face: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    cells = face["cells"]
    versions = ", ".join(f"{name} {version}" for name, version in face["versions"].items())
    well = sum(cell["is_well"] for row in cells.values() for cell in row.values())
    yield f"{title} ({versions}; {face['date']}): {well} of {len(cells) ** 2} are well."
    yield ""
    yield f"| saved on ↓, resumed on → | {' | '.join(titles[name] for name in cells)} |"
    yield "|---" * (len(cells) + 1) + "|"
    problems: list[str] = []
    for saved, row in cells.items():
        yield f"| {titles[saved]} | {' | '.join(_cell(row[name], saved == name, problems) for name in cells)} |"
    if problems or face["notes"]:
        yield ""
    for number, problem in enumerate(problems, 1):
        yield f"- ✗{number}: {problem}"
    for note in face["notes"]:
        yield f"- {note}"


def _cell(cell: Mapping[str, Any], is_same: bool, problems: list[str]) -> str:
    """Return a cell's text; a problem that is new is added to the list, and the cell has its number."""
    if cell["is_well"]:
        return "identical" if is_same else f"{cell['loss_difference']:.1e}" if cell["loss_difference"] else "0"
    if cell["problem"] not in problems:
        problems.append(cell["problem"])
    return f"✗{problems.index(cell['problem']) + 1}"


def main() -> None:
    """Write the tables into the README."""
    # Not at the top: whoever only renders need not wait for torch.
    from topologies import TOPOLOGIES

    table = render(json.loads(RECORD.read_text()), {name: topology.title for name, topology in TOPOLOGIES.items()})
    README.write_text(with_table(README.read_text(), table))


if __name__ == "__main__":
    main()
