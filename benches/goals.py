"""Holds the committed figures of `torch_step.py` and `weightings.py` against the goals of this project.

It times nothing: run the two with `--write` first. Run `make bench BENCH=benches/goals.py`, or this file:
`--write` writes the table of docs/speed.md and its picture.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import matplotlib
from _report import RESULTS, ROOT, described, place

CROSS_ENTROPY = "nn.CrossEntropyLoss"
# By size and dtype, the largest ratio to nn.CrossEntropyLoss with one thread and with several.
STEPS: dict[tuple[tuple[int, ...], str], tuple[float, float]] = {
    ((128, 10), "float32"): (0.75, 0.85),
    ((128, 10), "bfloat16"): (0.75, 0.85),
    ((512, 100), "float32"): (0.70, 0.80),
    ((512, 100), "bfloat16"): (0.70, 0.80),
    ((1024, 1000), "float32"): (0.40, 0.55),
    ((1024, 1000), "bfloat16"): (0.40, 0.55),
    ((8, 21, 256, 256), "float32"): (0.25, 0.25),
    ((8, 21, 256, 256), "bfloat16"): (0.45, 0.45),
    ((2048, 32000), "float32"): (0.20, 0.20),
    ((2048, 32000), "bfloat16"): (0.20, 0.20),
    ((256, 128256), "float32"): (0.20, 0.20),
    ((256, 128256), "bfloat16"): (0.20, 0.20),
}
MEMBERS = 1.0, 1.1
PICTURE = ROOT / "docs" / "speed.png"
COLORS = "#1f5fa8", "#c2571a"


class Held(NamedTuple):
    """A figure beside its goal."""

    what: str
    dtype: str
    threads: str
    goal: float
    figure: dict[str, Any]

    def line(self) -> str:
        """A line of the table."""
        median, low, high = (self.figure[name] for name in ("median", "low", "high"))
        shown = f"{median:.2f} ({low:.2f}-{high:.2f})"
        shown = f"**{shown}**" if round(median, 2) <= self.goal else shown
        return f"| {self.what} | {self.dtype} | {self.threads} | {self.goal:.2f} | {shown} |"

    def row(self) -> str:
        """Its row in the picture, which figures of all numbers of threads share."""
        step = self.what.partition(": ")[0].replace("`RGDLoss()` at ", "").removeprefix("the ")
        return f"{step}, {self.dtype}"


def results(name: str) -> dict[str, Any]:
    """The committed figures of a program."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def held() -> tuple[list[Held], dict[str, Any]]:
    """Every goal with its figure, and the machine of these."""
    of_steps, of_members = results("torch_step"), results("weightings")
    threads = str(of_steps["machine"]["threads"])
    found = []
    for (size, dtype), goals in STEPS.items():
        for peer, goal, number in zip(
            (f"{CROSS_ENTROPY}, one thread", CROSS_ENTROPY), goals, ("1", threads), strict=True
        ):
            (figure,) = (
                one
                for one in of_steps["figures"]
                if (tuple(one["size"]), one["dtype"], one["peer"]) == (size, dtype, peer)
            )
            found.append(Held(f"`RGDLoss()` at {size}", dtype, number, goal, figure))
    members = [one for one in of_members["figures"] if one["loss"].startswith("`")]
    for size in dict.fromkeys(tuple(one["size"]) for one in members):
        for number, goal in zip(("1", threads), MEMBERS, strict=True):
            here = [one for one in members if (tuple(one["size"]), str(one["threads"])) == (size, number)]
            slowest = max(here, key=lambda one: one["median"])
            what = f"the slowest weighting at {size}: {slowest['loss']}"
            found.append(Held(what, "float32", number, goal, slowest))
    return found, of_steps["machine"]


def draw(found: list[Held], machine: dict[str, Any]) -> None:
    """Draw each step's points, one for each number of threads, and its goals."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(dict.fromkeys(one.row() for one in found))
    figure, axes = plt.subplots(figsize=(8.2, 0.34 * len(names) + 1.3), layout="constrained")
    axes.axvline(1.0, color="#9aa3b2", linewidth=1)
    for threads, color, shift in zip(
        dict.fromkeys(one.threads for one in found), COLORS, (-0.15, 0.15), strict=True
    ):
        lines = [one for one in found if one.threads == threads]
        heights = [names.index(one.row()) + shift for one in lines]
        medians = [one.figure["median"] for one in lines]
        off = [[abs(one.figure[end] - one.figure["median"]) for one in lines] for end in ("low", "high")]
        axes.errorbar(medians, heights, xerr=off, fmt="o", color=color, markersize=5, linewidth=1)
        axes.plot([one.goal for one in lines], heights, "|", color=color, markersize=11, markeredgewidth=2)
        axes.plot([], [], "o", color=color, label=f"{threads} thread{'s' * (threads != '1')}")
    axes.plot([], [], "|", color="#4a5568", markersize=11, markeredgewidth=2, label="goal")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.set_xlabel("time of a step over that of nn.CrossEntropyLoss: left is faster")
    figure.suptitle(f"Median and quartiles, {described(machine)}", fontsize=9)
    axes.legend(loc="upper right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="also write the table of docs/speed.md")
    arguments = parser.parse_args()
    found, machine = held()
    text = "\n".join([
        f"The time of a step over that of `nn.CrossEntropyLoss`, on {described(machine)}: the goal, and",
        "the median with quartiles. Bold: it meets the goal. `make bench WRITE=1` measures and writes it.",
        "",
        "| step | dtype | threads | goal | measured |",
        "|---|---|---|---|---|",
        *(one.line() for one in found),
    ])  # fmt: skip
    print(text)
    if arguments.write:
        place("docs/speed.md", "goals", text)
        draw(found, machine)


if __name__ == "__main__":
    main()
