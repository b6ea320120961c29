"""Copy the crate, and put a fault into the copy that a job must find.

`make fuzz PLANT=1` and `make asan PLANT=1` run `python tools/plant.py weights target/planted/crate`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a job has to find: a file, a piece of it that is there once, and the piece that takes its place.
FAULTS = {
    # A run that begins in the middle of the last axis goes on beyond its end.
    "layout": (
        "src/layout.rs",
        "(size - position % size).min(self.end - position)",
        "size.min(self.end - position)",
    ),
    # The last classes of a row are summed twice.
    "cross_entropy": (
        "src/cross_entropy/rows.rs",
        "sums[1].add::<I>(end, max, t, Some(ends.tile(rest)))",
        "sums[1].add::<I>(end, max, t, None)",
    ),
    # A loss at the threshold itself is left out.
    "weights": ("src/weightings/threshold.rs", "*l <= self.max_loss", "*l < self.max_loss"),
    # A thread that sees that all parts are finished need not see what they wrote.
    "loom": (
        "src/job.rs",
        "self.finished.fetch_add(1, Ordering::Release)",
        "self.finished.fetch_add(1, Ordering::Relaxed)",
    ),
    # An element behind the last one is read, and changes no number.
    "asan": (
        "src/layout.rs",
        "                        *x = y.widen().to_f64();\n                    }",
        "                        *x = y.widen().to_f64();\n                    }\n"
        "                    std::hint::black_box(first.add(length).read_volatile());",
    ),
}


def plant(name: str, copy: Path) -> None:
    """Copies the crate and its fuzz targets to `copy`, with the fault of this name.

    Raises:
        SystemExit: If there is no such fault, or its piece of code is not there exactly once.
    """
    if name not in FAULTS:
        sys.exit(f"there is no fault '{name}' to plant: {', '.join(FAULTS)}")
    file, piece, fault = FAULTS[name]
    code = (ROOT / file).read_text(encoding="utf-8")
    if code.count(piece) != 1:
        sys.exit(f"{file} has the code of the fault '{name}' {code.count(piece)} times: adapt tools/plant.py")
    for part in ("src", "benches", "fuzz"):
        shutil.rmtree(copy / part, ignore_errors=True)
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.py", "target", "corpus"))
    for part in ("Cargo.toml", "Cargo.lock"):
        shutil.copy2(ROOT / part, copy / part)
    (copy / file).write_text(code.replace(piece, fault), encoding="utf-8")


if __name__ == "__main__":
    plant(sys.argv[1], Path(sys.argv[2]))
