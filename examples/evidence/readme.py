"""Writes the table of `README.md` from the committed results, each row's sentence computed from its CSV.

`make evidence` runs it after the programs. A test compares the file with what this gives.
"""

from __future__ import annotations

import importlib
import pathlib

from harness import Row, Table

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = "<!-- results: written by readme.py -->\n", "<!-- end of results -->"


def rows() -> list[Row]:
    """Every program of this folder."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.name != "readme.py")
    return [importlib.import_module(name).ROW for name in names]


def results() -> str:
    """The table."""
    lines = ["| row | command | result |", "|---|---|---|"]
    for row in rows():
        if row.path.exists():
            table = Table.read(row.path)
            found = f"{len(table.findings())} of {table.comparisons} comparisons are findings."
            links = f"[table](results/{row.name}.csv), [picture](results/{row.name}.png)"
            lines.append(
                f"| [{row.title}]({row.name}.py) | `make evidence ROW={row.name}` "
                f"| {row.sentence(table)} {found} {links} |"
            )
    return "\n".join(lines) + "\n"


def text() -> str:
    """The README with the table as it should be."""
    before, rest = (FOLDER / "README.md").read_text().split(BEGIN)
    return before + BEGIN + results() + END + rest.split(END)[1]


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(text())
