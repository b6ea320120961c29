"""The dial against wrong labels in two minutes: plain training, the dial turned down, and the dial as a ramp.

A small network learns scikit-learn's digits from right labels, from labels of which 30% are flipped to the
next class, and from labels of which 40% are any other class. The loss is cross-entropy, plain or weighted by
exp(s * loss): s = -0.7, or s falling from 0 to -1 in the first half of the training. The placebo is plain
training times the mean weight of the ramp.

Nothing is tuned here. Each of the 12 seeds trains at the learning rate and weight decay that it chose on its
own validation labels in `examples/evidence/ramp.py`, of which this is a part; `make evidence ROW=ramp`
chooses them again. At the end the demo times one step of `RGDLoss` beside one of `nn.CrossEntropyLoss`.

Run it with `make demo`, or `python examples/demo.py`.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rgd.torch import RGDLoss
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent / "evidence"))

import ramp
from harness import Arm, Cell, Chosen, Result, Store, Table, digits, retrained
from harness.arms import times_mean_weight
from harness.pictures import BLUE, GREEN, GREY, PURPLE, pyplot, save
from harness.row import QUICK_SEEDS, SEEDS, versions

CONTROL = f"plain x mean weight of {ramp.RAMP}"
ARMS = {ramp.PLAIN: GREY, ramp.CONSTANT: BLUE, ramp.RAMP: GREEN, CONTROL: PURPLE}
WORDS = {
    ramp.PLAIN: "plain",
    ramp.CONSTANT: "s = -0.7",
    ramp.RAMP: "ramp to -1",
    CONTROL: "placebo",
}
METRIC = "accuracy"


def chosen_cells(table: Table, setting: str, arm: str, seeds: int) -> list[Cell]:
    """The learning rate and weight decay that each seed chose in the committed runs."""
    runs = table.by_arm[setting, arm][:seeds]
    return [Cell(float(run["learning_rate"]), float(run["weight_decay"])) for run in runs]


def train(quick: bool, progress: tqdm) -> Table:
    """Every arm on every kind of labels."""
    before, store = Table.read(ramp.ROW.path), Store()
    seeds = QUICK_SEEDS if quick else SEEDS
    arms = {arm.name: arm for arm in (Arm(ramp.PLAIN), *ramp.ARMS)}
    progress.reset(seeds * len(ARMS) * len(ramp.NOISES))
    results: list[Result] = []
    for words, (noise, pairs) in ramp.NOISES.items():
        problem = digits(noise, pairs=pairs, **({"epochs": 3} if quick else {}))
        here, found = ramp.setting("digits", words), dict[str, Chosen]()
        for name in ARMS:
            if name == CONTROL:
                arms[CONTROL] = times_mean_weight(arms[ramp.RAMP], found[ramp.RAMP].mean_weight)
            cells = chosen_cells(before, here, name, seeds)
            found[name] = retrained(problem, arms[name], cells, store=store, progress=progress)
        results += [Result(here, c, "" if name == ramp.PLAIN else ramp.PLAIN) for name, c in found.items()]
    return Table.of({"command": "python examples/demo.py", "versions": versions()}, (METRIC,), results)


def markdown(table: Table) -> str:
    """The table of the README: test accuracy, and its difference to plain training."""
    lines = [
        "| test accuracy, % | plain | `RGDLoss(scale=-0.7)` | ramp, 0 to -1 | placebo |",
        "|---|---|---|---|---|",
    ]
    for words in ramp.NOISES:
        cells: list[str] = []
        for name in ARMS:
            line = table.line(ramp.setting("digits", words), name, METRIC)
            cell = f"{100 * line.mean:.1f}"
            if line.baseline:
                cell += f" (**{line.points()}**)" if line.outside else f" ({line.points()})"
            cells.append(cell)
        title = words if words == "right labels" else f"{words.replace(' ', ' wrong, ')}"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(table: Table, path: pathlib.Path) -> None:
    """Accuracy, seed by seed, as a difference to plain training."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(ramp.NOISES), figsize=(11, 3.8), sharey=True)
    for panel, words in zip(axes, ramp.NOISES, strict=True):
        here = ramp.setting("digits", words)
        plain = table.values(here, ramp.PLAIN, METRIC)
        panel.axhline(0, color="#c9ced6", zorder=0)
        shown, words_below = [name for name in ARMS if name != ramp.PLAIN], list[str]()
        for place, name in enumerate(shown):
            points, color = 100 * (table.values(here, name, METRIC) - plain), ARMS[name]
            spread = [place + (k - len(points) / 2) * 0.03 for k in range(len(points))]
            panel.plot(spread, points, "o", color=color, alpha=0.45, markersize=5)
            panel.plot([place - 0.28, place + 0.28], [points.mean()] * 2, color=color, linewidth=3)
            words_below.append(f"{WORDS[name]}\n{points.mean():+.1f}")
        panel.set_xlim(-0.6, len(shown) - 0.4)
        panel.set_xticks(range(len(shown)), words_below, fontweight="bold")
        for word, name in zip(panel.get_xticklabels(), shown, strict=True):
            word.set_color(ARMS[name])
        panel.tick_params(length=0)
        title = words if words == "right labels" else f"{words.replace(' ', ' wrong, ')}"
        panel.set_title(title, loc="left", fontsize=11)
    axes[0].set_ylabel("test accuracy, points above plain")
    figure.suptitle(
        "The dial against wrong labels on digits: a dot a seed", x=0.012, ha="left", fontweight="bold"
    )
    save(figure, path, table)


def step_of(criterion: nn.Module, logits: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a loss."""

    def step() -> None:
        logits.grad = None
        criterion(logits, target).backward()

    return step


def times(rounds: int) -> dict[str, float]:
    """Microseconds of a step from 128 logits of 10 classes, medians, the two losses in turn."""
    logits, target = torch.randn(128, 10, requires_grad=True), torch.randint(10, (128,))
    steps = {
        "nn.CrossEntropyLoss()": step_of(nn.CrossEntropyLoss(), logits, target),
        "RGDLoss(scale=-0.7)": step_of(RGDLoss(scale=-0.7), logits, target),
    }
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(10):
                step()
            seen[name].append((time.perf_counter() - begin) / 10 * 1e6)
    return {name: statistics.median(values) for name, values in seen.items()}


def main(arguments: Sequence[str] | None = None) -> Table:
    parser = argparse.ArgumentParser(description="The dial against wrong labels, constant and as a ramp")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2 seeds, few steps")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "docs" / "dial.png",
        help="the picture",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tqdm(desc="the dial", unit="run", smoothing=0.05, mininterval=0.5) as progress:
        table = train(options.quick, progress)
    print(markdown(table))
    print("In brackets: the difference to plain training and half of its 95% interval over the seeds; bold")
    print("where that excludes 0. The seeds train at the rates that they chose in examples/evidence/ramp.py.")
    picture(table, options.output)
    print(f"\nPicture: {options.output}")
    print("\nThe swap, and a step of it from (128, 10) logits, forward and backward, in one thread:")
    for name, microseconds in times(20 if options.quick else 300).items():
        print(f"    criterion = {name:<24}# {microseconds:.0f} microseconds")
    return table


if __name__ == "__main__":
    main()
