"""Shared code of the programs: the machine, their figures as JSON, and their tables in the pages."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"


def processor() -> str:
    """The processor's name, if the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """The machine and the versions with which the figures were measured."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def described(found: dict[str, object] | None = None) -> str:
    """A machine in words: this one, or that of some results."""
    found = found or machine()
    torch_version = str(found["torch"]).partition("+")[0]
    return f"{found['cores']} cores of an {found['processor']}, torch {torch_version}"


def write(path: str | Path, figures: list[dict[str, object]]) -> None:
    """The figures as JSON, with the machine."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")


def place(page: str, name: str, text: str) -> None:
    """Put a text between its markers in a page.

    Args:
        page: The page, from the root of the repository.
        name: What the markers are called.
        text: What goes between the markers.

    Raises:
        ValueError: If the page has no such markers.
    """
    begin, end = f"<!-- bench {name}: begin -->\n", f"<!-- bench {name}: end -->"
    path = ROOT / page
    before = path.read_text()
    if begin not in before or end not in before:
        raise ValueError(f"{page} has no markers {begin.strip()} and {end}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    path.write_text(re.sub(pattern, lambda _: f"{begin}{text.strip()}\n{end}", before, flags=re.DOTALL))


def publish(page: str, name: str, text: str, figures: list[dict[str, object]]) -> None:
    """Put a program's text between its markers in a page, and its figures under `benches/results`.

    Args:
        page: The page, from the root of the repository.
        name: What the markers and the file are called.
        text: What goes between the markers.
        figures: The figures.

    Raises:
        ValueError: If the page has no such markers.
    """
    place(page, name, text)
    write(RESULTS / f"{name}.json", figures)
