"""Class imbalance: does re-weighting by loss help rare classes, alone or on top of the methods made for them?

Asked: with few images of some digits, which method gives the best balanced accuracy and the best worst class,
and what does RGD add to each?

Arms: cross-entropy; focal loss; class-balanced weights; logit adjustment, of which the balanced softmax is
the same loss in other words; LDAM; RGD (`rgd.KL(tau=1)`); and RGD on top of each, which is compared with what
it stands on. The others are compared with cross-entropy. Controls: RGD with weights divided by their mean,
cross-entropy times RGD's mean weight, and RGD with the opposite sign. All are in `harness/losses.py` with
their papers, but the weights, which are rgd's.

Protocol: scikit-learn's digits. The most frequent digit has 110 training images, the others fewer, in
geometric steps, down to 110 divided by the imbalance factor, and 1 at least. Which digit is rare is drawn
anew for each seed. Validation (20 images a digit) and test (40 a digit) are balanced, for every factor. A
multilayer perceptron with 64 hidden units, some 400 steps of SGD with momentum 0.9 and a cosine schedule,
batches of 32; the last step's network is measured. Learning rate and weight decay are chosen for every arm by
the mean validation accuracy over 12 seeds, and lie inside their grid. At factor 1 class-balanced weights and
logit adjustment are cross-entropy itself, and are left out. "worst_group_accuracy" is the smallest accuracy
of the three most frequent, the four middle and the three rarest digits.

Run it with `make evidence ROW=imbalance`, or `python examples/evidence/imbalance.py --full`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np
import rgd
import torch
from harness import Arm, Classification, Data, Grid, Part, Result, Row, Session, Table, main
from harness.arms import mean_one, opposite_sign, times_mean_weight
from harness.losses import class_balanced, focal, ldam, logit_adjusted
from harness.pictures import BLUE, GREEN, GREY, PURPLE, pyplot, save
from harness.problems import load

FACTORS = (1, 10, 50, 200)
CLASSES, LARGEST, VALIDATION, TEST, STEPS, BATCH = 10, 110, 20, 40, 400, 32
METRICS = ("balanced_accuracy", "worst_class_accuracy", "worst_group_accuracy", "mean_loss")
PLAIN, RGD = "cross-entropy", "RGD"
BASES = {
    PLAIN: Arm(PLAIN),
    "focal loss": Arm("focal loss", loss=focal),
    "class-balanced": Arm("class-balanced", class_weights=class_balanced),
    "logit adjustment": Arm("logit adjustment", loss=logit_adjusted),
    "LDAM": Arm("LDAM", loss=ldam, cosine=True),
}
NEEDS_IMBALANCE = ("class-balanced", "logit adjustment")


def setting(factor: float) -> str:
    return f"digits, factor {factor:g}"


def class_sizes(factor: float) -> list[int]:
    """Training images of the most frequent class first."""
    return [max(1, round(LARGEST * factor ** (-k / (CLASSES - 1)))) for k in range(CLASSES)]


def draw(seed: int, factor: float) -> Data:
    """Long-tailed training data, balanced validation and test data; groups say how frequent a digit is."""
    inputs, target = load("digits")
    random = np.random.default_rng([21, seed])
    parts: list[list[np.ndarray]] = [[], [], []]
    group_of = np.zeros(CLASSES, np.int64)
    for rank, (digit, size) in enumerate(zip(random.permutation(CLASSES), class_sizes(factor), strict=True)):
        rows = random.permutation(np.flatnonzero(target == digit))
        test, validation, rest = np.split(rows, [TEST, TEST + VALIDATION])
        group_of[digit] = (rank > 2) + (rank > 6)
        for part, chosen in zip(parts, (rest[:size], validation, test), strict=True):
            part.append(chosen)
    return Data(
        *(
            Part(
                torch.tensor(inputs[rows], dtype=torch.float32),
                torch.tensor(target[rows]),
                torch.tensor(group_of[target[rows]]),
            )
            for rows in map(np.concatenate, parts)
        )
    )


def problem(factor: float, quick: bool) -> Classification:
    """About `STEPS` steps, whatever the number of images."""
    epochs = round((20 if quick else STEPS) / (sum(class_sizes(factor)) // BATCH))
    return Classification(
        setting(factor), functools.partial(draw, factor=factor), 64, CLASSES, epochs=epochs, batch_size=BATCH
    )


def run(session: Session) -> list[Result]:
    grid = Grid((0.05, 0.1, 0.2, 0.4), (0.0, 0.001, 0.004, 0.016))
    factors = (50,) if session.quick else FACTORS
    session.expect(len(factors) * (2 * len(BASES) + 3) - 4, grid)
    results: list[Result] = []
    for factor in factors:
        task, here = problem(factor, session.quick), setting(factor)
        for base, arm in BASES.items():
            if factor == 1 and base in NEEDS_IMBALANCE:
                continue
            results.append(Result(here, session.sweep(task, arm, grid), "" if base == PLAIN else PLAIN))
            on_top = RGD if base == PLAIN else f"{RGD} on {base}"
            weighted = dataclasses.replace(arm, name=on_top, weighting=rgd.KL(tau=1.0))
            chosen = session.sweep(task, weighted, grid)
            results.append(Result(here, chosen, base))
            if base == PLAIN:
                controls = (
                    mean_one(weighted),
                    times_mean_weight(weighted, chosen.mean_weight),
                    opposite_sign(weighted),
                )
                results += [Result(here, session.sweep(task, control, grid), PLAIN) for control in controls]
    return results


def picture(table: Table, path: pathlib.Path) -> None:
    plt = pyplot()
    colors = dict(zip(BASES, (GREY, PURPLE, BLUE, GREEN, "#56b4e9"), strict=True))
    factors = [f for f in FACTORS if setting(f) in table.settings()]
    panels = {
        "balanced_accuracy": "balanced accuracy, %",
        "worst_class_accuracy": "accuracy of the worst class, %",
    }
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6))
    for panel, (metric, label) in zip(axes, panels.items(), strict=True):
        for k, (base, color) in enumerate(colors.items()):
            for arm, style, fill in (
                (base, "-", color),
                (RGD if base == PLAIN else f"{RGD} on {base}", ":", "white"),
            ):
                here = [x for x, f in enumerate(factors) if arm in table.arms(setting(f))]
                lines = [table.line(setting(factors[x]), arm, metric) for x in here]
                panel.errorbar(
                    [x + 0.05 * (k - 2) for x in here], [100 * line.mean for line in lines],
                    [100 * line.half for line in lines], color=color, linestyle=style, marker="o",
                    markersize=5.5, markerfacecolor=fill, linewidth=1.4, elinewidth=1, label=arm,
                )  # fmt: skip
        panel.set_xticks(range(len(factors)), [str(f) for f in factors])
        panel.set_xlabel("imbalance factor")
        panel.set_title(label, loc="left", fontsize=11)
        panel.grid(axis="y", color="#e3e6eb")
        panel.tick_params(length=0)
    axes[0].legend(frameon=False, fontsize=8.5, loc="lower left")
    figure.suptitle(
        f"Long-tailed digits: mean and 95% interval over {table.lines[0].seeds} seeds; dotted: RGD on top",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    save(figure, path, table)


def sentence(table: Table) -> str:
    def points(*arms: str) -> str:
        lines = {arm: table.line(setting(50), arm, "balanced_accuracy") for arm in arms}
        return ", ".join(f"{arm} {line.points()}" for arm, line in lines.items())

    return (
        "Balanced accuracy at factor 50, in points. Against cross-entropy: "
        f"{points('class-balanced', 'logit adjustment', 'LDAM', 'focal loss', RGD)}. "
        "Against what it stands on: "
        f"{points(f'{RGD} on logit adjustment', f'{RGD} on class-balanced')}."
    )


ROW = Row("imbalance", "Class imbalance", METRICS, run, picture, sentence)

if __name__ == "__main__":
    main(ROW)
