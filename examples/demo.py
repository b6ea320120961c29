"""The dial in two minutes: weights exp(s * loss) with s = -0.7, 0 and 0.5, with right and with wrong labels.

s = 0 is plain cross-entropy, s < 0 turns away from large losses, s > 0 turns towards them. A small network
learns scikit-learn's digits, first from right labels, then with 40% of them wrong. Data, grids and rules are
those of `examples/evidence/dial.py`, of which this is a part: learning rate and weight decay are chosen for
each s on validation data, split, initial network and order of batches are the same for all, and differences
are taken seed by seed over 12 seeds.

Run it with `make demo`, or `python examples/demo.py`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent / "evidence"))

import dial
from harness import Arm, Grid, Result, Session, Store, Table, digits
from harness.pictures import BLUE, GREY, ORANGE, pyplot, save
from harness.row import QUICK_SEEDS, SEEDS, versions

SCALES = (-0.7, 0.0, 0.5)
NOISES = (0.0, 0.4)
METRICS = ("accuracy", "worst_tenth")
GRID = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.004, 0.016))


def train(session: Session) -> Table:
    """Every s with each share of wrong labels."""
    session.expect(len(SCALES) * len(NOISES), GRID)
    results: list[Result] = []
    for noise in NOISES:
        problem = digits(noise, **({"epochs": 3} if session.quick else {}))
        for s in SCALES:
            arm = Arm(dial.name(s), dial.weighting(s))
            chosen = session.sweep(problem, arm, GRID)
            results.append(Result(dial.setting("digits", noise), chosen, "" if s == 0 else dial.PLAIN))
    return Table.of({"command": "python examples/demo.py", "versions": versions()}, METRICS, results)


def markdown(table: Table) -> str:
    """The table of the README."""
    lines = [
        "| | s = -0.7: `rgd.KL(scale=-0.7)` | s = 0: plain "
        "| s = 0.5: `rgd.KL(math.inf, scale=0.5)`, no clip |",
        "|---|---|---|---|",
    ]
    shown = {
        "accuracy": ("test accuracy, %", 100.0, ".1f"),
        "worst_tenth": ("loss of the worst tenth", 1.0, ".2f"),
    }
    for noise in NOISES:
        labels = "right labels" if noise == 0 else f"{100 * noise:g}% wrong labels"
        for metric, (name, factor, form) in shown.items():
            cells: list[str] = []
            for s in SCALES:
                line = table.line(dial.setting("digits", noise), dial.name(s), metric)
                cell = f"{factor * line.mean:{form}}"
                if line.baseline:
                    difference = (
                        f"{factor * line.difference:+{form}} ± {factor * line.difference_half:{form}}"
                    )
                    cell += f" (**{difference}**)" if line.finding else f" ({difference})"
                cells.append(cell)
            lines.append(f"| {labels}: {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(table: Table, path: pathlib.Path) -> None:
    """Accuracy, seed by seed, as a difference to plain training."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(NOISES), figsize=(9, 3.6), sharey=True)
    for panel, noise in zip(axes, NOISES, strict=True):
        here = dial.setting("digits", noise)
        plain = table.values(here, dial.PLAIN, "accuracy")
        for place, (s, color) in enumerate(zip(SCALES, (BLUE, GREY, ORANGE), strict=True)):
            points = 100 * (table.values(here, dial.name(s), "accuracy") - plain)
            spread = [place + (k - len(points) / 2) * 0.03 for k in range(len(points))]
            panel.plot(spread, points, "o", color=color, alpha=0.45, markersize=5)
            panel.plot([place - 0.28, place + 0.28], [points.mean()] * 2, color=color, linewidth=3)
            if s == 0:
                continue
            panel.annotate(
                f"{points.mean():+.1f}",
                (place + 0.3, points.mean()),
                color=color,
                fontweight="bold",
                va="center",
            )
        panel.axhline(0, color="#c9ced6", zorder=0)
        panel.set_xlim(-0.6, len(SCALES) - 0.2)
        panel.set_xticks(
            range(len(SCALES)),
            ["s = -0.7\naway from\nlarge losses", "s = 0\nplain", "s = 0.5\ntowards\nlarge losses"],
        )
        panel.set_title(f"{100 * noise:g}% of the labels are wrong", loc="left", fontsize=11)
    axes[0].set_ylabel("test accuracy, points above plain")
    figure.suptitle("One dial, exp(s · loss): a dot a seed", x=0.012, ha="left", fontweight="bold")
    save(figure, path, table)


def main(arguments: Sequence[str] | None = None) -> Table:
    parser = argparse.ArgumentParser(
        description="One dial: right and wrong labels, away from large losses, plain, towards them"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2 seeds, few steps")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "docs" / "dial.png",
        help="the picture",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tqdm(desc="the dial", unit="run", smoothing=0.05, mininterval=0.5) as progress:
        session = Session(options.quick, Store(), progress, QUICK_SEEDS if options.quick else SEEDS)
        table = train(session)
    print(markdown(table))
    print("In brackets: the difference to plain training, mean and half of the 95% interval over the seeds;")
    print("bold where p is below .001 in the paired t test and in Wilcoxon's test.")
    picture(table, options.output)
    print(f"\nPicture: {options.output}")
    return table


if __name__ == "__main__":
    main()
