"""A/A: plain training against plain training. It checks the harness, and asks nothing of re-weighting.

Asked: how often does a 95% interval exclude 0 where there is nothing to find? About 5 in 100 must; the design
that this one replaced chose one cell for all seeds, and its placebo came out in 14 of 100.

Arms: pairs of plain trainings, each with an initial network and an order of batches of its own, on the same
split. Each arm of a pair is tuned by itself, as every arm of every row is. Accuracies and losses of the rows
are compared, the losses too where accuracy chose: this breaks a rule of the rows, to test more intervals. In
some seeds of breast cancer the losses diverge. Such a seed widens the interval of a loss, so that accuracies
and losses are counted apart.

Protocol: that of `dial.py`, on digits and on breast cancer with right and wrong labels.

Run it with `make evidence ROW=aa`, or `python examples/evidence/aa.py --full`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from harness import Arm, Grid, Problem, Result, Row, Session, Table, breast_cancer, digits, main
from harness.pictures import BLUE, GREY, ORANGE, pyplot, save
from harness.problems import higher_is_better
from harness.results import Line

PAIRS = 8
METRICS = (
    "accuracy", "worst_class_accuracy", "mean_loss", "worst_tenth", "scaled_mean_loss", "scaled_worst_tenth",
)  # fmt: skip
GRID = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004, 0.008, 0.016))


def problems(quick: bool) -> dict[str, Problem]:
    """What is learnt, by the name of the setting."""
    epochs = {"epochs": 2} if quick else {}
    found: dict[str, Problem] = {
        f"digits, {100 * noise:g}% wrong labels": digits(noise, **epochs) for noise in (0.0, 0.1, 0.2, 0.4)
    }
    found["digits, 30% pairs"] = digits(0.3, pairs=True, **epochs)
    found |= {
        f"breast cancer, {100 * noise:g}% wrong labels": breast_cancer(noise, **epochs)
        for noise in (0.0, 0.2, 0.4)
    }
    return dict(list(found.items())[:1]) if quick else found


def run(session: Session) -> list[Result]:
    pairs = 2 if session.quick else PAIRS
    tasks = problems(session.quick)
    session.expect(2 * pairs * len(tasks), GRID)
    results: list[Result] = []
    for here, problem in tasks.items():
        for k in range(pairs):
            first, second = (f"plain, start {2 * k + side}" for side in (0, 1))
            for name, start, baseline in ((first, 2 * k, ""), (second, 2 * k + 1, first)):
                chosen = session.sweep(problem, Arm(name).started(start), GRID)
                results.append(Result(here, chosen, baseline))
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), sharey=True)
    for panel, (kind, lines) in zip(axes, kinds(table).items(), strict=True):
        # Differences in halves of their intervals: one beyond 1 has an interval that excludes 0.
        scores = np.sort([line.difference / line.difference_half for line in lines])
        colors = [GREY if abs(score) <= 1 else BLUE if score > 0 else ORANGE for score in scores]
        panel.scatter(np.arange(len(scores)), scores, c=colors, s=9)
        for edge in (-1, 1):
            panel.axhline(edge, color=GREY, linewidth=0.8)
        panel.set_xlabel("comparisons, sorted")
        panel.set_title(f"{kind}: {counted(lines)}", loc="left", fontsize=11)
        panel.tick_params(length=0)
    axes[0].set_ylabel("difference in halves of its 95% interval")
    figure.suptitle(
        "Plain against plain training: intervals beyond a line exclude 0",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def kinds(table: Table) -> dict[str, list[Line]]:
    """The comparisons of accuracies, and those of losses."""
    compared = table.compared()
    return {
        "accuracies": [line for line in compared if higher_is_better(line.metric)],
        "losses": [line for line in compared if not higher_is_better(line.metric)],
    }


def rate(lines: Sequence[Line]) -> tuple[int, int]:
    """How many intervals exclude 0, and of how many."""
    return sum(line.outside for line in lines), len(lines)


def counted(lines: Sequence[Line]) -> str:
    """How many intervals exclude 0, in words."""
    outside, number = rate(lines)
    return f"{outside} of {number} ({100 * outside / number:.1f}%)"


def rates(table: Table) -> str:
    """How many intervals of each kind exclude 0, in words."""
    of_kind = kinds(table)
    return (
        f"accuracies {counted(of_kind['accuracies'])}, losses {counted(of_kind['losses'])}; some losses "
        "diverge, which widens their intervals"
    )


def sentence(table: Table) -> str:
    return f"Plain training against plain training, intervals that exclude 0: {rates(table)}."


ROW = Row("aa", "A/A: plain against plain", None, METRICS, run, picture, sentence)

if __name__ == "__main__":
    main(ROW)
